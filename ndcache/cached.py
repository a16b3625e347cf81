"""The functions that return no tensors, each with a `Loader` of its own: convert, check, delete."""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import requests

from .caller import PublicFrame, name_in_tracebacks
from .context import VerifyMode
from .export.conversion import ConvertReport
from .export.targets import Format
from .format.manifest import Manifest, NameFilter
from .format.shard_writer import Encoding
from .http.retry import RetryPolicy
from .loader import Loader
from .loaders.verification import VerifyReport
from .options import OPTION_NAMES, Source, check_keywords, document_options
from .progress import Progress

__all__ = ["convert", "delete", "is_cached", "read_manifest", "verify"]

P = ParamSpec("P")
R = TypeVar("R")


def _as_in_loader(declaration: Callable[P, R]) -> Callable[P, R]:
    """Replace a declaration by a function that calls the `Loader` method of its name, on a loader of its own.

    So the options, which the declarations repeat for readers and type checkers, are not repeated once more in calls.
    """
    known = inspect.signature(declaration).parameters.keys()

    @functools.wraps(declaration)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with PublicFrame() as __tracebackhide__:
            check_keywords(declaration, kwargs.keys() - known)
            options: dict[str, Any] = {name: kwargs.pop(name) for name in OPTION_NAMES if name in kwargs}
            with Loader(**options) as loader:
                result: R = getattr(loader, declaration.__name__)(*args, **kwargs)
                return result

    name_in_tracebacks(call, declaration.__name__)
    return document_options(call)


@_as_in_loader
def convert(
    source: Source,
    target: str | os.PathLike[str],
    *,
    format: Format | None = None,
    names: NameFilter = None,
    encode: Encoding | Mapping[str, Encoding] = "raw",
    decode: bool = True,
    shard_bytes: int | None = None,
    metadata: Mapping[str, Any] | None = None,
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
) -> ConvertReport:
    """Write a model to another format, piece by piece, with at most `memory_limit` bytes of it in memory.

    The files are byte for byte those that the usual writers make of the loaded tensors: the safetensors library,
    huggingface_hub, `numpy.savez` and TVM. Values never change, unless `encode` says so. The target appears when it is
    complete; a conversion that fails or is interrupted leaves what was there before.

    Parameters
    ----------
    source : str or path-like
        See `load`.
    target : str or path-like
        ``*.safetensors`` is one file, and so is ``*.npz``. Another path is a directory: of safetensors files and their
        index or, if the source is in safetensors files, of an NDArray cache; see ``format``. A path that ends with
        ``model.safetensors.index.json`` or ``tensor-cache.json`` is that of such a directory. Files that are there are
        replaced, and files of an older model in the directory are removed, unless it is the source.
    format : {"safetensors", "tensor-cache", "npz"}, optional
        The format of a directory; a file's follows from its name.
    names : str, iterable of str, mapping of str to slice, or callable, optional
        Tensors to write; see `load`.
    encode : {"raw", "f32-to-bf16"} or mapping of names to these, default "raw"
        ``"f32-to-bf16"`` rounds float32 to bfloat16, as `dump` does: half the size, without the lower half of the bits.
        `ConvertReport.halved` names these tensors. In a mapping, ``"*"`` stands for all other names.
    decode : bool, default True
        Write float32 that the source stores as bfloat16 as float32. If False, such tensors are bfloat16.
    shard_bytes : int, optional
        The most bytes of a file of a directory, unless it has only one tensor. Default 5 GB for safetensors, 32 MiB for
        an NDArray cache. If the source is in the same format, and split like this already, the files stay as they are.
    metadata : mapping, optional
        Replaces the metadata of the source. In safetensors files it is text; other values of the source are left out.
        Files of a directory without any have ``{"format": "pt"}``, which transformers expects.
    progress : True, callable, or iterable of callables, optional
        See `load`.
    trace, report : path-like, optional
        See `load`.
    {options}

    Returns
    -------
    ConvertReport

    Raises
    ------
    UnsupportedDtypeError
        The target has no name for a tensor's dtype; no .npz file has one for bfloat16 and float8. Nothing is fetched.
    DiskFullError
        The target's disk is full.
    OSError
        The target cannot be written, or is a directory instead of a file or the other way round.
    ValueError, TypeError
        An argument is unknown, or has a type or a value that it must not have.
    NdcacheError, KeyError
        See `load`.

    Examples
    --------
    >>> report = ndcache.convert("https://host/model/", "model.safetensors")
    >>> report.path.name, len(report.tensors)
    ('model.safetensors', 6)
    """
    raise NotImplementedError


@_as_in_loader
def read_manifest(
    source: Source,
    *,
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
) -> Manifest:
    """Return a model's manifest, parsed and checked, without fetching a shard.

    The manifest is kept in the cache if that can be written.

    Parameters
    ----------
    source : str or path-like
        See `load`.
    {options}

    Raises
    ------
    ManifestError, TransferError, OfflineError, NotFoundError

    Examples
    --------
    >>> manifest = ndcache.read_manifest("https://host/model/")
    >>> [manifest[name].shape for name in manifest]
    """
    raise NotImplementedError


@_as_in_loader
def is_cached(
    source: Source,
    *,
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
) -> bool:
    """Return whether the manifest and all shards, with the right sizes, are on disk. Make no request.

    Parameters
    ----------
    source : str or path-like
        See `load`.
    {options}

    Examples
    --------
    >>> ndcache.is_cached("https://host/model/")
    """
    raise NotImplementedError


@_as_in_loader
def verify(
    source: Source,
    *,
    progress: Progress = None,
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
) -> VerifyReport:
    """Compute the digests of what is cached, and set aside bad shards, so that the next load fetches them again.

    The files of a local source are only read; those that `fetch` put there are compared with what it noted. Companion
    files are checked, too, as far as anything is known of them. Make no request.

    Parameters
    ----------
    source : str or path-like
        See `load`.
    progress : True, callable, or iterable of callables, optional
        See `load`. Shards count when they are checked.
    {options}

    Raises
    ------
    NotFoundError
        Nothing of the model is cached.

    Examples
    --------
    >>> ndcache.verify("https://host/model/").ok
    """
    raise NotImplementedError


@_as_in_loader
def delete(
    source: Source,
    *,
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
) -> int:
    """Remove a model from the cache.

    Parameters
    ----------
    source : str or path-like
        See `load`. Also a directory in the cache.
    {options}

    Returns
    -------
    int
        Bytes freed; 0 if the model was not cached.

    Raises
    ------
    UnsafeCacheError
        `source` is a local directory outside the cache, or not one that ndcache made.

    Examples
    --------
    >>> freed = ndcache.delete("https://host/model/")
    """
    raise NotImplementedError
