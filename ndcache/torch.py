"""Load models into tensors and modules of PyTorch. Needs the extra ``ndcache[torch]``.

>>> import ndcache.torch
>>> weights = ndcache.torch.load("https://host/model/", "cuda")

``ndcache.load(source, "cuda")`` gives the same tensors. `load` and `stream` here take every device of PyTorch; on
``"cpu"``, they give tensors of PyTorch instead of NumPy arrays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from . import api
from .caller import PublicFrame
from .devices.torch.framework import import_torch
from .devices.torch.module import plan_module
from .devices.torch.opening import open_torch_device, parse_device
from .format.manifest import NameFilter
from .format.slices import check_slices
from .loader import Loader
from .options import OPTION_NAMES, Source, TorchDeviceLike, check_keywords, hide_keywords
from .progress import Progress
from .trace import tracing
from .weights import Weights

if TYPE_CHECKING:
    import torch

__all__ = ["load", "load_model", "stream"]


@hide_keywords
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
    report: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Weights[torch.Tensor]:
    """Load a model's weights as tensors of PyTorch, downloading what is not cached.

    Parameters
    ----------
    source, names, decode, progress, trace, report
        See `ndcache.load`.
    device : str or torch.device, default "cpu"
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or another device of PyTorch, such as ``"mps"``. With ``"cuda"``, it is
        PyTorch's current device.
    copy : bool, default False
        Give each tensor memory of its own. By default, tensors on the CPU whose stored bytes are their values are views
        of a private map of the shard: what is written to them never reaches the file.
    into : mapping of str to torch.Tensor, optional
        Contiguous tensors on the device, which receive the tensors of these names; see `ndcache.load`.
    {options}

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
    with PublicFrame() as __tracebackhide__:
        return api.load(
            source,
            parse_device(device),
            names=names,
            decode=decode,
            copy=copy,
            into=into,
            progress=progress,
            trace=trace,
            report=report,
            **options,
        )


@hide_keywords
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
    report: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Load a model, and yield each tensor of PyTorch as soon as it is there, in manifest order.

    Parameters
    ----------
    source, device, names, decode, copy, into, progress, trace, report
        See `load`.
    {options}

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
    with PublicFrame() as __tracebackhide__:
        return api.stream(
            source,
            parse_device(device),
            names=names,
            decode=decode,
            copy=copy,
            into=into,
            progress=progress,
            trace=trace,
            report=report,
            **options,
        )


@hide_keywords
def load_model(
    module: torch.nn.Module,
    source: Source,
    device: str | TorchDeviceLike | None = None,
    *,
    strict: bool = True,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Load a model's weights into the parameters and buffers of a module, as its ``load_state_dict`` does.

    The bytes are read into the memory that the parameters and buffers have, wherever that is. Tensors that have another
    dtype there, or are not contiguous, are loaded beside it first. Those on ``"meta"`` get memory, except for what the
    model does not have: missing tensors and buffers that are not persistent stay on ``"meta"``.

    Names and shapes are compared before any shard is requested. Hooks of ``load_state_dict`` are not called.

    Parameters
    ----------
    module : torch.nn.Module
        Its ``state_dict`` has the names of the model's tensors. Of tied parameters, which are the same or have the same
        memory, one name is enough; of several, the last one is loaded.
    source, decode, progress, trace, report
        See `load`. A module on several devices is loaded once for each of them, and ``trace`` and ``report`` show the
        last of these loads.
    device : str or torch.device, optional
        Where tensors on ``"meta"`` go. Default: the device of the others, or the CPU.
    strict : bool, default True
        Raise an error if the module has tensors that the model does not have, or the other way round.
    names : str, iterable of str, mapping of str to slice, or callable, optional
        The model's tensors to load, see `ndcache.load`; the others count as not there. The module's tensor has the
        shape of the slice.
    copy : bool, default False
        Give tensors that were on ``"meta"`` memory of their own, even where a view of the file would do.
    {options}

    Returns
    -------
    NamedTuple
        With ``missing_keys`` and ``unexpected_keys``, as PyTorch's ``load_state_dict`` returns it.

    Raises
    ------
    RuntimeError
        Shapes differ, or names do and `strict` is set. It lists them as PyTorch does. The module is unchanged.
    NdcacheError, KeyError, ValueError, TypeError
        See `load`. If the error has an attribute ``undefined``, it has the names of the tensors whose memory may hold
        anything now; the module's other tensors are loaded or as they were.

    Examples
    --------
    >>> with torch.device("meta"):
    ...     module = Transformer(config)
    >>> ndcache.torch.load_model(module, "https://host/model/", "cuda")
    <All keys matched successfully>
    """
    with PublicFrame() as __tracebackhide__, ExitStack() as stack:
        torch = import_torch()
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}; the source comes after it")
        check_keywords(load_model, options.keys() - OPTION_NAMES)
        check_slices(names)
        target = None if device is None else open_torch_device(parse_device(device)).handle
        loader = stack.enter_context(Loader(**options))
        with tracing(source, trace, report, only_of_failure=True):
            manifest = loader.read_manifest(source)
            selected = {record.name: record for shard in manifest.shards_with(names) for record in shard.records}
            plan = plan_module(module, selected, target, decode=decode, strict=strict)
        for where, part in plan.parts.items():
            chosen: NameFilter = None if len(part.names) == len(manifest) else part.names
            weights = loader.load(
                source,
                where,
                names={name: names[name] for name in part.names} if isinstance(names, Mapping) else chosen,
                decode=decode,
                copy=copy,
                into=part.into,
                progress=progress,
                trace=trace,
                report=report,
            )
            plan.finish(part, weights)
    # The type of PyTorch's own results has no public name.
    incompatible_keys = type(torch.nn.Module().load_state_dict({}))
    return incompatible_keys(plan.missing, plan.unexpected)
