"""The functions `load` and `stream`, which use a `Loader` of their own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import requests

from .context import VerifyMode
from .devices.cpu import Array
from .devices.gpu.tensor import GPUTensor
from .format.manifest import NameFilter
from .http.retry import RetryPolicy
from .loader import Loader
from .options import (
    OPTION_NAMES,
    CUDAName,
    GPUDeviceLike,
    GPUName,
    Source,
    TorchDeviceLike,
    check_keywords,
    hide_keywords,
)
from .progress import Progress
from .weights import Weights

if TYPE_CHECKING:
    import torch

__all__ = ["load", "stream"]

T = TypeVar("T")


@overload
def load(
    source: Source,
    device: Literal["cpu"] = "cpu",
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    into: Mapping[str, Array] | None = None,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | None = None,
    memory_limit: int = 512 << 20,
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
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | None = None,
    memory_limit: int = 512 << 20,
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
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | None = None,
    memory_limit: int = 512 << 20,
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
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | None = None,
    memory_limit: int = 512 << 20,
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
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Weights[Any]:
    """Load a model's weights, downloading what is not cached.

    Parameters
    ----------
    source : str or path-like
        The http(s) URL of a model directory or of its manifest, ``hf://owner/name[@revision][/folder]``, the page of a
        Hugging Face repository, ``file://`` or a local path. A local directory is read in place. While arrays of a load
        are in use, do not overwrite or truncate its files; replace them by renaming others over them.
    device : {"cpu", "gpu", "gpu:N", "cuda", "cuda:N", "auto"}, wgpu.GPUDevice or torch.device, default "cpu"
        ``"gpu:1"`` is the second adapter that ``ndcache doctor`` lists, for wgpu. ``"cuda:1"`` is the second device of
        CUDA, and gives tensors of PyTorch; so does a `torch.device`. ``"auto"`` is the first adapter that is real
        hardware, else the CPU; `Weights.device` tells which.
    names : str, iterable of str, or callable, optional
        Tensors to load: names, glob patterns (``"model.layers.0.*"``), or a predicate that is called with each name.
        Only shards that hold a match are fetched. If a shard holds few matches, only their bytes are fetched, and not
        compared with a digest (`LoadStats.integrity` counts such shards) until something asks for the rest. Shards come
        whole if they or their manifest have a digest in `integrity`, or with ``verify="always"``.
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
    progress : True, callable, or iterable of callables, optional
        True draws a bar on standard error. A callable is called with each `ProgressReport`, on this thread.
    trace : path-like, optional
        Write a timeline of the call, by thread, to this file, however the call ends. It is in the Trace Event Format,
        which https://ui.perfetto.dev shows.
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
        from the server stays in memory.

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
    check_keywords(load, options.keys() - OPTION_NAMES)
    with Loader(**options) as loader:
        return loader.load(
            source, device, names=names, decode=decode, copy=copy, into=into, progress=progress, trace=trace
        )


@overload
def stream(
    source: Source,
    device: Literal["cpu"] = "cpu",
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    into: Mapping[str, Array] | None = None,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | None = None,
    memory_limit: int = 512 << 20,
    cancel: threading.Event | None = None,
) -> Iterator[tuple[str, Array]]: ...


@overload
def stream(
    source: Source,
    device: GPUName | GPUDeviceLike,
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | None = None,
    memory_limit: int = 512 << 20,
    cancel: threading.Event | None = None,
) -> Iterator[tuple[str, GPUTensor]]: ...


@overload
def stream(
    source: Source,
    device: CUDAName | TorchDeviceLike,
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    into: Mapping[str, torch.Tensor] | None = None,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | None = None,
    memory_limit: int = 512 << 20,
    cancel: threading.Event | None = None,
) -> Iterator[tuple[str, torch.Tensor]]: ...


@overload
def stream(
    source: Source,
    device: str | GPUDeviceLike | TorchDeviceLike,
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    into: Mapping[str, Any] | None = None,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | None = None,
    memory_limit: int = 512 << 20,
    cancel: threading.Event | None = None,
) -> Iterator[tuple[str, Any]]: ...


@hide_keywords
def stream(
    source: Source,
    device: Any = "cpu",
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    into: Mapping[str, Any] | None = None,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Iterator[tuple[str, Any]]:
    """Load a model, and yield each tensor as soon as it is there, in manifest order.

    Tensors that were yielded are not kept, so a model larger than memory can pass through. To stop early, close the
    iterator or drop it.

    Parameters
    ----------
    source, device, names, decode, copy, into, progress, trace
        See `load`.
    {options}

    Yields
    ------
    name : str
    tensor : numpy.ndarray, GPUTensor or torch.Tensor

    Raises
    ------
    NdcacheError
        See `load`. Errors of the manifest and the device are raised by the call, all others while iterating.
    KeyError, ValueError, TypeError
        See `load`. They are raised by the call.

    Examples
    --------
    >>> for name, array in ndcache.stream("https://host/model/"):
    ...     print(name, array.shape)
    """
    check_keywords(stream, options.keys() - OPTION_NAMES)
    loader = Loader(**options)
    try:
        tensors = loader.stream(
            source, device, names=names, decode=decode, copy=copy, into=into, progress=progress, trace=trace
        )
    except BaseException:
        loader.close()
        raise
    return _closing_after(tensors, loader)


def _closing_after(tensors: Iterator[T], loader: Loader) -> Iterator[T]:
    with loader:
        yield from tensors
