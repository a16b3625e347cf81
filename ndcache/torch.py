"""Load models into tensors and modules of PyTorch. Needs the extra ``ndcache[torch]``.

>>> import ndcache.torch
>>> weights = ndcache.torch.load("https://host/model/", "cuda")

``ndcache.load(source, "cuda")`` gives the same tensors. `load` and `stream` here take every device of PyTorch; on
``"cpu"``, they give tensors of PyTorch instead of NumPy arrays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from . import api
from .devices.torch.opening import parse_device
from .format.manifest import NameFilter
from .options import Source, TorchDeviceLike
from .progress import Progress
from .weights import Weights

if TYPE_CHECKING:
    import torch

__all__ = ["load", "stream"]


def load(
    source: Source,
    device: str | TorchDeviceLike = "cpu",
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    into: Mapping[str, torch.Tensor] | None = None,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Weights[torch.Tensor]:
    """Load a model's weights as tensors of PyTorch, downloading what is not cached.

    Parameters
    ----------
    source, names, decode, progress, trace
        See `ndcache.load`.
    device : str or torch.device, default "cpu"
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or another device of PyTorch, such as ``"mps"``. With ``"cuda"``, it is
        PyTorch's current device.
    copy : bool, default False
        Give each tensor memory of its own. By default, tensors on the CPU whose stored bytes are their values are views
        of a private map of the shard: what is written to them never reaches the file.
    into : mapping of str to torch.Tensor, optional
        Contiguous tensors on the device, which receive the tensors of these names; see `ndcache.load`.
    **options
        The options of `ndcache.Loader`.

    Returns
    -------
    Weights
        A mapping from names to `torch.Tensor`. Their bytes are on the device.

    Raises
    ------
    DeviceError
        PyTorch is not installed, or cannot use this device.
    UnsupportedDtypeError
        PyTorch or the device has no such dtype.
    ValueError
        `device` means nothing to PyTorch, or is ``"meta"``.
    NdcacheError, KeyError, TypeError
        See `ndcache.load`.

    Examples
    --------
    >>> weights = ndcache.torch.load("https://host/model/", "cuda", progress=True)
    >>> weights["layer.0"].device
    device(type='cuda', index=0)
    """
    return api.load(
        source,
        parse_device(device),
        names=names,
        decode=decode,
        copy=copy,
        into=into,
        progress=progress,
        trace=trace,
        **options,
    )


def stream(
    source: Source,
    device: str | TorchDeviceLike = "cpu",
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    into: Mapping[str, torch.Tensor] | None = None,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Load a model, and yield each tensor of PyTorch as soon as it is there, in manifest order.

    Parameters
    ----------
    source, device, names, decode, copy, into, progress, trace, **options
        See `load`.

    Yields
    ------
    name : str
    tensor : torch.Tensor
        Its bytes are on the device, and any stream of CUDA may use it.

    Raises
    ------
    NdcacheError, KeyError, ValueError, TypeError
        See `load`, and `ndcache.stream` for what the call raises and what the iterator does.

    Examples
    --------
    >>> for name, tensor in ndcache.torch.stream("https://host/model/", "cuda"):
    ...     print(name, tensor.shape)
    """
    return api.stream(
        source,
        parse_device(device),
        names=names,
        decode=decode,
        copy=copy,
        into=into,
        progress=progress,
        trace=trace,
        **options,
    )
