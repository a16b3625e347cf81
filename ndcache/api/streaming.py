"""The function `stream`, with its signature for each kind of device."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

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

if TYPE_CHECKING:
    import torch

__all__ = ["stream"]

T = TypeVar("T")


@overload
def stream(
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
) -> Iterator[tuple[str, Array]]: ...


@overload
def stream(
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
    files: bool = True,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Iterator[tuple[str, Any]]:
    """Load a model, and yield each tensor as soon as it is there, in manifest order.

    Tensors that were yielded are not kept, so a model larger than memory can pass through. To stop early, close the
    iterator or drop it.

    The tensors of a file come once its digest has been compared. Those of a file of more than 8 MiB on a server that
    has no digest come while the rest of it is downloaded.

    Parameters
    ----------
    source, device, names, decode, copy, into, files, progress, trace, report
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
    with PublicFrame() as __tracebackhide__:
        check_keywords(stream, options.keys() - OPTION_NAMES)
        loader = Loader(**options)
        try:
            tensors = loader.stream(
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
        except BaseException:
            loader.close()
            raise
    return _closing_after(tensors, loader)


def _closing_after(tensors: Iterator[T], loader: Loader) -> Iterator[T]:
    with PublicFrame() as __tracebackhide__, loader:
        yield from tensors
