"""The functions that fill, read, check and delete what is cached, each with a `Loader` of its own."""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import requests

from .context import VerifyMode
from .format.manifest import Manifest, NameFilter
from .http.retry import RetryPolicy
from .loader import Loader
from .options import OPTION_NAMES, Source, check_keywords, document_options
from .pipeline import VerifyReport
from .progress import Progress

__all__ = ["delete", "fetch", "is_cached", "read_manifest", "verify"]

P = ParamSpec("P")
R = TypeVar("R")


def _as_in_loader(declaration: Callable[P, R]) -> Callable[P, R]:
    """Replace a declaration by a function that calls the `Loader` method of its name, on a loader of its own.

    So the options, which the declarations repeat for readers and type checkers, are not repeated once more in calls.
    """
    known = inspect.signature(declaration).parameters.keys()

    @functools.wraps(declaration)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check_keywords(declaration, kwargs.keys() - known)
        options: dict[str, Any] = {name: kwargs.pop(name) for name in OPTION_NAMES if name in kwargs}
        with Loader(**options) as loader:
            result: R = getattr(loader, declaration.__name__)(*args, **kwargs)
            return result

    return document_options(call)


@_as_in_loader
def fetch(
    source: Source,
    *,
    names: NameFilter = None,
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
) -> Path:
    """Download a model into the cache without decoding it.

    Parameters
    ----------
    source, names, progress, trace
        See `load`.
    {options}

    Returns
    -------
    pathlib.Path
        A model directory that ndcache, TVM and mlc_llm can read: the one in the cache, or the local source itself. If
        only some bytes of a shard were fetched, only ndcache can use them.

    Raises
    ------
    NdcacheError, KeyError, ValueError, TypeError
        See `load`.
    CacheUnavailableError
        The cache cannot be written.

    Examples
    --------
    >>> directory = ndcache.fetch("https://host/model/")
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
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | None = None,
    memory_limit: int = 512 << 20,
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
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | None = None,
    memory_limit: int = 512 << 20,
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
) -> VerifyReport:
    """Compute the digests of what is cached, and set aside bad shards, so that the next load fetches them again.

    The files of a local source are only read. Make no request.

    Parameters
    ----------
    source : str or path-like
        See `load`.
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
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | None = None,
    memory_limit: int = 512 << 20,
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
