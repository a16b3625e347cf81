"""The verbs as functions, each with a `Loader` of its own. Everything here is exported from `ndcache`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .format.manifest import Manifest, NameFilter
from .loader import Loader, Source
from .pipeline import VerifyReport
from .progress import Progress
from .weights import Weights

if TYPE_CHECKING:
    import wgpu

__all__ = ["delete", "fetch", "is_cached", "load", "read_manifest", "stream", "verify"]

T = TypeVar("T")


def load(
    source: Source,
    device: str | wgpu.GPUDevice = "cpu",
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Weights:
    """Load a model's weights, downloading what is not cached.

    Parameters
    ----------
    source : str or path-like
        The http(s) URL of a model directory or of its manifest, ``hf://owner/name[@revision][/folder]``, a Hugging Face
        repository's page, ``file://`` or a local path. A local directory is read in place: its files must not be
        overwritten or cut while arrays of a load are in use, only replaced by renaming others over them.
    device : {"cpu", "gpu", "gpu:N", "auto"} or wgpu.GPUDevice
        ``"gpu:1"`` is the second adapter that ``ndcache doctor`` lists; ``"auto"`` is the first adapter that is real
        hardware, else the CPU; `Weights.device` tells which.
    names : str, iterable of str, or callable, optional
        Names, glob patterns (``"model.layers.0.*"``), or a predicate that is given each name. Only shards that hold a
        match are fetched, and of one that holds few, only the bytes of these: they are compared with no digest, which
        `LoadStats.integrity` shows, until something asks for the rest. Shards with a digest in `integrity`, or in a
        manifest with one, come whole, and so does everything with ``verify="always"``.
    decode : bool
        Expand float32 that is stored as bfloat16 (the default). If False, such tensors are bfloat16.
    copy : bool
        Give each array memory of its own, which can be written and lets go of the file. By default, arrays that are
        stored as they are used are read-only views of the mapped shard. GPU tensors always have their own.
    progress : True, callable, or iterable of callables, optional
        True draws a bar on standard error. A callable is given each `ProgressReport`, on this thread.
    trace : path-like, optional
        Write to this file what was done when, and on which thread, however the call ends: in the Trace Event Format,
        which https://ui.perfetto.dev shows.
    **options
        Of `Loader`.

    Returns
    -------
    Weights

    Warns
    -----
    RuntimeWarning
        The server gave no valid manifest, for whatever reason, and the cached one is used. Or the cache cannot be
        written, and what comes from the server stays in memory.

    Raises
    ------
    NdcacheError
        See `ndcache.errors` for the tree. What had been fetched stays in the cache.
    KeyError
        A name or pattern matches no tensor.
    ValueError, TypeError
        An argument is none of the above.

    Examples
    --------
    >>> weights = ndcache.load("https://host/model/", device="gpu", progress=True)
    >>> weights["model.embed_tokens.q_weight"].buffer
    """
    with Loader(**options) as loader:
        return loader.load(source, device, names=names, decode=decode, copy=copy, progress=progress, trace=trace)


def stream(
    source: Source,
    device: str | wgpu.GPUDevice = "cpu",
    *,
    names: NameFilter = None,
    decode: bool = True,
    copy: bool = False,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Iterator[tuple[str, Any]]:
    """Like `load`, but give each tensor as soon as it is there, in manifest order.

    Nothing is kept of a tensor that was given, so a model larger than memory can pass through. To stop early, close the
    iterator or drop it.

    Yields
    ------
    name : str
    tensor : numpy.ndarray or GPUTensor

    Raises
    ------
    NdcacheError
        As `load`: what concerns the manifest and the device at once, the rest on the way.
    KeyError, ValueError, TypeError
        As `load`, at once.
    """
    loader = Loader(**options)
    try:
        tensors = loader.stream(source, device, names=names, decode=decode, copy=copy, progress=progress, trace=trace)
    except BaseException:
        loader.close()
        raise
    return _closing_after(tensors, loader)


def fetch(
    source: Source,
    *,
    names: NameFilter = None,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Path:
    """Bring a model into the cache without decoding it.

    Parameters, errors
        As `load`; and `CacheUnavailableError` if the cache cannot be written.

    Returns
    -------
    pathlib.Path
        A model directory that ndcache, TVM and mlc_llm can read: the one in the cache, or the local source itself.
        Shards of which only some bytes were asked for are known to ndcache alone.
    """
    with Loader(**options) as loader:
        return loader.fetch(source, names=names, progress=progress, trace=trace)


def read_manifest(source: Source, **options: Any) -> Manifest:
    """The model's manifest, parsed and checked; it is kept in the cache if that can be, shards are not asked for.

    Raises
    ------
    ManifestError, TransferError, OfflineError
    """
    with Loader(**options) as loader:
        return loader.read_manifest(source)


def is_cached(source: Source, **options: Any) -> bool:
    """Whether the manifest and every shard of the right size are on disk. Makes no request."""
    with Loader(**options) as loader:
        return loader.is_cached(source)


def verify(source: Source, **options: Any) -> VerifyReport:
    """Compute the digests of what is cached. Bad shards are set aside, so that the next load fetches them anew.

    A local source is only looked at. Makes no request.

    Raises
    ------
    NotFoundError
        Nothing of the model is cached.
    """
    with Loader(**options) as loader:
        return loader.verify(source)


def delete(source: Source, **options: Any) -> int:
    """Remove a model from the cache.

    Returns
    -------
    int
        Bytes freed; 0 if it was not there.

    Raises
    ------
    UnsafeCacheError
        `source` is a local directory outside the cache, or not one that ndcache made.
    """
    with Loader(**options) as loader:
        return loader.delete(source)


def _closing_after(tensors: Iterator[T], loader: Loader) -> Iterator[T]:
    with loader:
        yield from tensors
