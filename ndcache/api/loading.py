"""The function `load`, with its signature for each kind of device."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import requests

from ..caller import PublicFrame
from ..context import VerifyMode
from ..devices.cpu import Array
from ..devices.gpu.tensor import GPUTensor
from ..format.manifest import NameFilter
from ..http.retry import RetryPolicy
from ..loader import Loader
from ..options import (
    OPTION_NAMES,
    CUDAName,
    GPUDeviceLike,
    GPUName,
    Source,
    TorchDeviceLike,
    check_keywords,
    hide_keywords,
)
from ..progress import Progress
from ..weights import Weights

if TYPE_CHECKING:
    import torch

__all__ = ["load"]


@overload
def load(
    source: Source,
    device: Literal["cpu"] = "cpu",
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    into: Mapping[str, Array] | None = None,
    files: bool = True,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    revision: str | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | str | os.PathLike[str] | None = None,
    limit_rate: float | str | None = None,
    memory_limit: int = 512 << 20,
    progress_interval: float | None = None,
    cancel: threading.Event | None = None,
) -> Weights[Array]: ...


@overload
def load(
    source: Source,
    device: GPUName | GPUDeviceLike,
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    files: bool = True,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    revision: str | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | str | os.PathLike[str] | None = None,
    limit_rate: float | str | None = None,
    memory_limit: int = 512 << 20,
    progress_interval: float | None = None,
    cancel: threading.Event | None = None,
) -> Weights[GPUTensor]: ...


@overload
def load(
    source: Source,
    device: CUDAName | TorchDeviceLike,
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    into: Mapping[str, torch.Tensor] | None = None,
    files: bool = True,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    revision: str | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | str | os.PathLike[str] | None = None,
    limit_rate: float | str | None = None,
    memory_limit: int = 512 << 20,
    progress_interval: float | None = None,
    cancel: threading.Event | None = None,
) -> Weights[torch.Tensor]: ...


@overload
def load(
    source: Source,
    device: str | GPUDeviceLike | TorchDeviceLike,
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    into: Mapping[str, Any] | None = None,
    files: bool = True,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    revision: str | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | str | os.PathLike[str] | None = None,
    limit_rate: float | str | None = None,
    memory_limit: int = 512 << 20,
    progress_interval: float | None = None,
    cancel: threading.Event | None = None,
) -> Weights[Any]: ...


@hide_keywords
def load(
    source: Source,
    device: Any = "cpu",
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    into: Mapping[str, Any] | None = None,
    files: bool = True,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Weights[Any]:
    """Load a model's weights, downloading what is not cached.

    Parameters
    ----------
    source : str or path-like
        The http(s) URL of a model directory, of its manifest, or of a safetensors file or index,
        ``hf://owner/name[@revision][/folder]``, the page of a Hugging Face repository, ``s3://bucket/folder``,
        ``gs://…`` or ``az://…`` (``pip install 'ndcache[cloud]'``), ``file://`` or a local path. A local directory is
        read in place. While arrays of a load are in use, do not overwrite or truncate its files; replace them by
        renaming others over them.
    device : {"cpu", "gpu", "gpu:N", "cuda", "cuda:N", "auto"}, wgpu.GPUDevice or torch.device, default "cpu"
        ``"gpu:1"`` is the second adapter that ``ndcache doctor`` lists, for wgpu. ``"cuda:1"`` is the second device of
        CUDA, and gives tensors of PyTorch; so does a `torch.device`. ``"auto"`` is the first adapter that is real
        hardware, else the CPU; `Weights.device` tells which.
    names : str, iterable of str, mapping of str to slice, or callable, optional
        Tensors to load: names, glob patterns (``"model.layers.0.*"``), or a predicate that is called with each name.
        Only shards that hold a match are fetched. If a shard holds few matches, only their bytes are fetched, and not
        compared with a digest (`LoadStats.integrity` counts such shards) until something asks for the rest. Shards come
        whole if they or their manifest have a digest in `integrity`, or with ``verify="always"``.

        A mapping loads rows of the first dimension: ``{"w": slice(0, 512)}`` is ``w[0:512]``, and only these bytes are
        fetched. Its keys are exact names, and only these tensors are loaded. Ends may be negative or missing, as
        everywhere in Python; ``slice(None)`` is all rows. There is no step, and a scalar has no rows.
    decode : bool, default True
        Expand float32 that is stored as bfloat16. If False, such tensors are bfloat16.
    copy : bool, default False
        Copy each array into writable memory, so that the shard file can be closed. By default, arrays whose stored
        bytes are their values are read-only views of the mapped shard. GPU tensors always have memory of their own.
    into : mapping of str to memory, optional
        Your own memory for some of the tensors, by name; nothing else is allocated for them, and the result holds your
        objects. On the CPU: a writable, C-contiguous `numpy.ndarray` of the tensor's shape and dtype. On a GPU: a
        `GPUTensor`, a ``wgpu.GPUBuffer`` with usage COPY_DST, or a tuple of buffer and offset (a multiple of 4), of the
        device that you load with. On CUDA: a contiguous `torch.Tensor` on that device. All are checked before a shard
        is requested. Until the call returns, or `stream` yields the tensor, their content is undefined. If the call
        fails, the exception's ``undefined``, a tuple of names, says which of them may be incomplete.
    files : bool, default True
        Also fetch the companion files of a new or changed model, see `fetch`. If one cannot be fetched, there is a
        warning, and `LoadStats.failed_files` names it.
    progress : True, callable, or iterable of callables, optional
        True draws a bar on standard error. A callable is called with each `ProgressReport`, on this thread.
    trace : path-like, optional
        Write a timeline of the call, by thread, to this file, however the call ends. It is in the Trace Event Format,
        which https://ui.perfetto.dev shows.
    report : path-like, optional
        Write a page about the call, for a browser, to this file.
    {options}

    Returns
    -------
    Weights
        A mapping from names to `numpy.ndarray`, `GPUTensor` (if the tensors are in buffers of wgpu) or `torch.Tensor`;
        or to your objects of `into`.

    Warns
    -----
    RuntimeWarning
        The server gave no valid manifest, and the cached one is used. Or the cache cannot be written, and what comes
        from the server stays in memory. Or a companion file could not be fetched.

    Raises
    ------
    NdcacheError
        See `ndcache.errors` for the tree. What has been fetched stays in the cache.
    KeyError
        A name or pattern matches no tensor.
    ValueError, TypeError
        An argument is unknown, or has a type or a value that it must not have. Or memory of `into` does not fit: it is
        not for a tensor that is loaded, it has another shape, dtype or device, cannot be written, or overlaps other
        memory of `into`.

    Examples
    --------
    >>> weights = ndcache.load("https://host/model/", progress=True)
    >>> weights["layer.0"].shape
    (16384,)

    With ``device="gpu"``, the tensors are in GPU buffers: ``weights["layer.0"].buffer``. With ``device="cuda"``, they
    are tensors of PyTorch; `ndcache.torch` has more for them.
    """
    with PublicFrame() as __tracebackhide__:
        check_keywords(load, options.keys() - OPTION_NAMES)
        with Loader(**options) as loader:
            return loader.load(
                source,
                device,
                names=names,
                decode=decode,
                copy=copy,
                into=into,
                files=files,
                progress=progress,
                trace=trace,
                report=report,
            )
