"""The pipeline, top to bottom, and the verbs that run it.

::

    source ─ locate ─> manifest ─> fetch (cache hit | download ─> check ─> publish) ─> decode ─> device ─> Weights
                                   worker threads, bounded look-ahead                 caller's thread, in order
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import requests

from .context import LoadContext
from .devices import open_device
from .devices.base import Device, Upload
from .errors import CacheUnavailableError, ManifestError, NotFoundError, OfflineError, UnsafeCacheError, redact
from .files.descriptors import budget
from .format.integrity import parse_sri
from .format.manifest import Manifest, NameFilter, Shard
from .http.rate_limits import Limits
from .http.retry import RetryPolicy
from .http.transport import Transport
from .location.file_url import file_url, possible_models
from .location.hub import Login
from .location.locate import Location, locate, locate_mirror
from .options import check_options
from .progress import Progress, Reporter
from .sources import open_model
from .sources.client import Client
from .sources.download import Downloader
from .sources.model import Flaw, Model, ShardFile
from .store.cleanup import delete_model
from .store.directory import ModelDirectory
from .store.inventory import cache_scope
from .trace import Trace, open_trace
from .weights import Weights
from .workers.cancellation import Cancellation
from .workers.ordered import map_ordered
from .workers.pool import WorkerPool
from .workers.stop_iteration import WrappedStopIteration, unwrap_stop_iteration, wrap_stop_iteration

if TYPE_CHECKING:
    import wgpu

__all__ = ["Loader", "Source", "VerifyReport"]

logger = logging.getLogger("ndcache")

#: How often a model that is updated meanwhile is verified anew.
_LOOKS = 3
#: What a worker may have open at once: a socket or two, a lock, what it writes and reads, two folders that it publishes
#: in and one on the way there, the folder that is synced, and spare ones.
_FILES_PER_WORKER = 12
#: The limit of a single file, whose size no manifest gives; it keeps an endless body from filling the disk.
_MAX_FILE_BYTES = 64 << 30

Source = str | os.PathLike[str]
T = TypeVar("T")
#: A manifest, and by shard what it was checked by, or what is wrong with it.
_Checked: TypeAlias = tuple[Manifest, dict[str, str | Flaw]]


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes
    ----------
    checked : dict of str to str
        The good shards and how each was checked: ``"sha256"``, ``"md5"``, the algorithm of a pin, or ``"size"`` where
        no digest is known.
    bad : tuple of str
        Shards with wrong bytes or of the wrong size, or that cannot be read. In the cache they were set aside, and the
        next load fetches them.
    missing : tuple of str
        Shards that are not there, or are of another version of the model.
    nbytes : int
        Bytes of the good ones.
    kept : tuple of str
        Those of the bad ones in the cache that could not be set aside, as it cannot be written: loads still use them,
        unless with ``verify="always"``.
    """

    checked: dict[str, str]
    bad: tuple[str, ...]
    missing: tuple[str, ...]
    nbytes: int
    kept: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is bad."""
        return not self.bad


class Loader:
    """The verbs of this module as methods, with their options kept and connections reused. A context manager.

    Safe to use from several threads at once.

    Parameters
    ----------
    max_workers : int
        Threads that fetch shards, and so the most bodies under way at once; two more store what has come. Default 8.
        Fewer where file descriptors are scarce.
    cache_dir : path-like, optional
        The cache's top directory. Default: NDCACHE_HOME, else the system's place for caches. If it cannot be written,
        `load` and `stream` hold what comes from a server in memory, with a RuntimeWarning.
    scope : str
        A part of the cache of its own, such as one application's. Default ``"default"``.
    timeout : float or tuple of float
        Seconds to connect, and to wait for the next bytes. Default ``(10, 30)``.
    retries : int or RetryPolicy
        Tries after a failed one, with growing random waits between. Default 6.
    verify : {"download", "always", "never"}
        When a shard's digest is computed and compared: when it comes over the network (the default), also each time it
        is loaded from disk, or not at all. Sizes are compared always.
    offline : bool
        Make no request; what is missing is an `OfflineError`. Also with NDCACHE_OFFLINE=1 or HF_HUB_OFFLINE=1.
    session : requests.Session, optional
        Used for the requests: proxies, auth, headers. Its secrets go to the source's origin only. Retries of
        its adapters come on top of `retries`. With adapters or proxies of its own, stopping a call does not cut short
        its wait for the headers of an answer.
    mirrors : sequence of str
        Sources that hold the same files, tried in this order for a shard that the first one does not give.
    integrity : mapping of str to str, optional
        Digests that you demand, by file name, in the form of Subresource Integrity (sha256, sha384 or sha512, a hyphen,
        base64): ``{"tensor-cache.json": "sha256-…"}``. For the manifest, for shards by their ``dataPath``, or both. A
        pinned manifest vouches for the shards whose digests it has, and may come from a mirror, too. In a local
        directory, what is pinned or vouched for is read and compared at each load.
    memory_limit : int
        Bytes of shards that may be under way or waiting for the device at once. Default 512 MiB.
    cancel : threading.Event, optional
        Set it from another thread to stop a call with `CancelledError`.
    """

    def __init__(
        self,
        *,
        max_workers: int = 8,
        cache_dir: str | os.PathLike[str] | None = None,
        scope: str = "default",
        timeout: float | tuple[float, float] = (10.0, 30.0),
        retries: int | RetryPolicy = 6,
        verify: Literal["download", "always", "never"] = "download",
        offline: bool = False,
        session: requests.Session | None = None,
        mirrors: Sequence[str] = (),
        integrity: Mapping[str, str] | None = None,
        memory_limit: int = 512 << 20,
        cancel: threading.Event | None = None,
    ) -> None:
        check_options({name: value for name, value in locals().items() if name != "self"})
        environ = os.environ
        self._max_workers = max_workers
        self._cache = cache_scope(cache_dir, scope, environ)
        self._policy = retries if isinstance(retries, RetryPolicy) else RetryPolicy(retries)
        self._limits = Limits(self._policy.backoff / 4, self._policy.budget)
        self._verify = verify
        self._offline = offline or any(_is_set(environ.get(name)) for name in ("NDCACHE_OFFLINE", "HF_HUB_OFFLINE"))
        self._mirrors = [mirrors] if isinstance(mirrors, str) else list(mirrors)
        self._integrity = {name: parse_sri(text) for name, text in (integrity or {}).items()}
        self._memory_limit = memory_limit
        self._cancel = cancel
        self._transport = Transport(
            session=session,
            timeout=timeout if isinstance(timeout, tuple) else (timeout, timeout),
            max_connections=max_workers,
            login=Login(environ),
        )

    # --- the verbs

    def load(
        self,
        source: Source,
        device: str | wgpu.GPUDevice = "cpu",
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> Weights:
        """Load a model's weights, downloading what is not cached: see `ndcache.load`."""
        with _tracing(trace) as events, unwrap_stop_iteration():
            return self._load(source, device, names, decode, copy, progress, events)

    def _load(
        self,
        source: Source,
        device: str | wgpu.GPUDevice,
        names: NameFilter,
        decode: bool,
        copy: bool,
        progress: Progress,
        trace: Trace | None,
    ) -> Weights:
        target = self._device(device)
        tensors: dict[str, Any] = {}
        try:
            with self._budget() as count, self._workers(count, has_serial=target.needs_serial_thread) as workers:
                model, context = self._open(source, workers, trace=trace)
                shards = self._select(model, target, names, decode)
                tensors_to_come = self._tensors(
                    model, context, target, shards, progress, decode=decode, copy=copy, keeps_all=True
                )
                with closing(tensors_to_come) as arriving:
                    for name, tensor in arriving:
                        tensors[name] = tensor
        except BaseException:
            target.discard(tensors)
            raise
        return Weights(tensors, manifest=model.manifest, device=target, stats=context.stats)

    def stream(
        self,
        source: Source,
        device: str | wgpu.GPUDevice = "cpu",
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """Like `load`, but give each tensor as soon as it is there: see `ndcache.stream`."""
        arriving = self._stream(source, device, names, decode, copy, progress, trace)
        with unwrap_stop_iteration():
            next(arriving)  # so that what is wrong with the model, or the options, is said here
        return arriving

    def _stream(
        self,
        source: Source,
        device: str | wgpu.GPUDevice,
        names: NameFilter,
        decode: bool,
        copy: bool,
        progress: Progress,
        trace: str | os.PathLike[str] | None,
    ) -> Generator[tuple[str, Any], None, None]:
        """Yield once to say that it runs, and so will be closed; then yield the tensors."""
        with _tracing(trace) as events:
            target = self._device(device)
            is_open = False
            try:
                with self._budget() as count, self._workers(count, has_serial=target.needs_serial_thread) as workers:
                    model, context = self._open(source, workers, trace=events)
                    shards = self._select(model, target, names, decode)
                    is_open = True
                    yield "", None
                    yield from self._tensors(model, context, target, shards, progress, decode=decode, copy=copy)
            except BaseException as error:
                if not is_open:
                    target.discard({})
                elif isinstance(error, WrappedStopIteration):
                    # Which makes it a RuntimeError, as from any generator. It must not end the caller's loop silently.
                    raise error.error from None
                raise

    def fetch(
        self,
        source: Source,
        *,
        names: NameFilter = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> Path:
        """Bring a model into the cache without decoding it: see `ndcache.fetch`."""
        with _tracing(trace) as events, unwrap_stop_iteration():
            return self._fetch(source, names, progress, events)

    def _fetch(self, source: Source, names: NameFilter, progress: Progress, trace: Trace | None) -> Path:
        with self._budget() as count, self._workers(count) as workers:
            model, context = self._open(source, workers, trace=trace, must_keep=True)
            shards = model.manifest.shards_with(names)

            def work(shard: Shard) -> tuple[ShardFile, None]:
                obtained = model.obtain(shard)
                obtained.file.close()
                return obtained, None

            # Nothing waits for a device: only the disk is the limit.
            with closing(self._in_order(model, context, shards, work, progress, memory_limit=sys.maxsize)) as arriving:
                for _ in arriving:
                    pass
            return model.directory

    def read_manifest(self, source: Source) -> Manifest:
        """The model's manifest, parsed and checked: see `ndcache.read_manifest`."""
        with self._workers(1) as workers:
            return self._open(source, workers)[0].manifest

    def is_cached(self, source: Source) -> bool:
        """Whether the manifest and every shard of the right size are on disk: see `ndcache.is_cached`."""
        try:
            with self._workers(1) as workers:
                model, _ = self._open(source, workers, offline=True)
                return all(model.has(shard) for shard in model.manifest.shards)
        except (OfflineError, NotFoundError, ManifestError, CacheUnavailableError):
            return False

    def verify(self, source: Source) -> VerifyReport:
        """Compute the digests of what is cached, and set aside what is bad: see `ndcache.verify`."""
        try:
            manifest, found = self._check(source)
        except OfflineError as error:
            raise NotFoundError(f"{locate(source)} is not in the cache") from error
        for _ in range(_LOOKS):
            if Flaw.OF_ANOTHER_VERSION in found.values():
                with suppress(OfflineError):  # it was deleted
                    manifest, found = self._check(source, (manifest, found))
        return VerifyReport(
            checked={name: kind for name, kind in found.items() if isinstance(kind, str)},
            bad=tuple(name for name, kind in found.items() if kind in (Flaw.BAD, Flaw.BAD_AND_KEPT)),
            missing=tuple(name for name, kind in found.items() if kind in (Flaw.MISSING, Flaw.OF_ANOTHER_VERSION)),
            nbytes=sum(shard.nbytes for shard in manifest.shards if isinstance(found[shard.data_path], str)),
            kept=tuple(name for name, kind in found.items() if kind is Flaw.BAD_AND_KEPT),
        )

    def _check(self, source: Source, known: _Checked | None = None) -> _Checked:
        """Check the shards of the cached manifest, unless it is the one of which it is `known` how they are."""
        with unwrap_stop_iteration(), self._budget() as count, self._workers(count) as workers:
            model, context = self._open(source, workers, offline=True)
            shards = model.manifest.shards
            if known is not None and model.manifest == known[0]:
                return known
            workers.start(len(shards))
            sizes = [shard.nbytes for shard in shards]
            results = map_ordered(
                shards, model.check, pool=workers, sizes=sizes, memory_limit=sys.maxsize, stats=context.stats
            )
            with closing(results):
                found = {shard.data_path: found for shard, found in zip(shards, results, strict=True)}
        return model.manifest, found

    def delete(self, source: Source) -> int:
        """Remove a model from the cache; the bytes freed: see `ndcache.delete`."""
        location, root = locate(source), self._cache.root
        if location.directory is None:
            return sum(
                delete_model(ModelDirectory(directory, root=root)) for directory in self._cache.directories(location)
            )
        directory = Path(os.path.abspath(location.directory))
        # A model lies two folders down. How one gets to the root is the user's business, and not what is below it.
        if os.path.realpath(directory.parent.parent) != os.path.realpath(root):
            raise UnsafeCacheError(
                f"{directory} does not lie in the cache {root}, as a model does",
                hint="ndcache deletes only what it fetched; remove the directory yourself.",
            )
        return delete_model(ModelDirectory(root.joinpath(*directory.parts[-2:]), root=root))

    def find_file(self, url: str) -> Path | None:
        """Return the path of a single file in the cache, or None if it is not there. Makes no request.

        Raises
        ------
        CacheUnavailableError
        UnsafePathError, ValueError
            `url` does not name a file on a server.
        """
        for location, name in possible_models(url):
            cache = self._cache.open(location)
            if cache.size(name) is not None:
                return cache.path(name)
        return None

    def fetch_file(self, url: str) -> Path:
        """Download a single file, such as a tokenizer, into the cache unless it is there.

        It is stored with the nearest model above it that has a cache directory, else under its own directory's URL.

        Returns
        -------
        pathlib.Path
            The file in the cache.

        Raises
        ------
        TransferError, OfflineError, CacheError
        UnsafePathError, ValueError
            `url` does not name a file on a server.
        """
        if (found := self.find_file(url)) is not None:
            return found
        places = list(possible_models(url))
        location, name = next((place for place in places if self._cache.open(place[0]).exists()), places[0])
        if self._offline:
            error = OfflineError(f"offline, and not in the cache: {redact(url)}")
            error.missing = (name,)
            raise error
        with self._workers(1) as workers:
            downloader = Downloader(Client(self._context(workers, location)), self._cache.open(location))
            return workers.run(lambda: downloader.download_file(name, file_url(url), _MAX_FILE_BYTES), tasks_to_come=0)

    def delete_file(self, url: str) -> None:
        """Remove a single file from the cache, wherever it lies there; do nothing if it is not cached.

        Raises
        ------
        CacheError
        UnsafePathError, ValueError
            `url` does not name a file on a server.
        """
        for location, name in possible_models(url):
            cache = self._cache.open(location)
            if cache.size(name) is not None:
                cache.remove(name)

    def close(self) -> None:
        """Close the kept connections. The loader can still be used; it makes new ones."""
        self._transport.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the pipeline

    def _budget(self) -> AbstractContextManager[int]:
        """Give how many workers there may be, while file descriptors are kept for them."""
        return budget(self._max_workers, _FILES_PER_WORKER)

    def _workers(self, max_workers: int, *, has_serial: bool = False) -> WorkerPool:
        return WorkerPool(max_workers, Cancellation(self._cancel), has_serial_thread=has_serial)

    def _open(
        self,
        source: Source,
        workers: WorkerPool,
        *,
        offline: bool = False,
        must_keep: bool = False,
        trace: Trace | None = None,
    ) -> tuple[Model, LoadContext]:
        """Find the model and read its manifest. What cannot be kept goes to memory, unless it must be kept."""
        location = locate(source)
        context = self._context(workers, location, offline=offline, must_keep=must_keep)
        context.stats.record_to(trace)
        with context.stats.timed("manifest"):
            return open_model(location, context), context

    def _context(
        self, workers: WorkerPool, location: Location, *, offline: bool = False, must_keep: bool = False
    ) -> LoadContext:
        return LoadContext(
            transport=self._transport,
            policy=self._policy,
            limits=self._limits,
            workers=workers,
            cache=self._cache,
            verify=self._verify,
            offline=self._offline or offline,
            integrity=self._integrity,
            mirrors=tuple(locate_mirror(mirror) for mirror in self._mirrors) if location.is_remote else (),
            must_keep=must_keep,
        )

    def _device(self, device: str | wgpu.GPUDevice) -> Device[Any]:
        return open_device(device, None if self._cancel is None else Cancellation(self._cancel).poll)

    def _select(self, model: Model, device: Device[Any], names: NameFilter, decode: bool) -> tuple[Shard, ...]:
        """The shards wanted, every one of which can be decoded and fits the device."""
        shards = model.manifest.select(names)
        device.check_limits(shards, decode=decode)
        return shards

    def _tensors(
        self,
        model: Model,
        context: LoadContext,
        device: Device[Any],
        shards: Sequence[Shard],
        progress: Progress,
        *,
        decode: bool,
        copy: bool,
        keeps_all: bool = False,
    ) -> Generator[tuple[str, Any], None, None]:
        """Yield the tensors in manifest order: workers obtain and stage the shards, this thread places them."""
        with wrap_stop_iteration():
            context.cancellation.resume()
            context.workers.start(1)
            upload: Upload[Any, Any] = device.open_upload(
                shards,
                workers=context.workers,
                stats=context.stats,
                decode=decode,
                copy=copy,
                memory_limit=self._memory_limit,
                keeps_all=keeps_all,
            )

            def work(shard: Shard) -> tuple[ShardFile, Any]:
                obtained = model.obtain(shard)
                with obtained.file:
                    return obtained, upload.stage(obtained.file, shard)

            arriving = self._in_order(model, context, shards, work, progress, self._memory_limit, upload.finish)
            with upload, closing(arriving):  # `arriving` first: no worker may be in `stage` when the upload is closed
                for shard, staged in arriving:
                    placed = upload.place(staged, shard)
                    for record, tensor in context.stats.timed_iterator("place", placed, file=shard.data_path):
                        context.stats.tensors += 1
                        yield record.name, tensor
                        context.cancellation.resume()  # before the next one is made, which would be nobody's

    def _in_order(
        self,
        model: Model,
        context: LoadContext,
        shards: Sequence[Shard],
        work: Callable[[Shard], tuple[ShardFile, T]],
        progress: Progress,
        memory_limit: int,
        finish: Callable[[], None] = lambda: None,
    ) -> Generator[tuple[Shard, T], None, None]:
        """Each shard with what `work` made of it; it is done, and reported, when the next one is asked for."""
        with wrap_stop_iteration(), closing(model):
            model.prepare(shards)
            sizes = [model.nbytes(shard) for shard in shards]
            cache_only = all(model.is_ready(shard) for shard in shards)
            context.workers.start(len(shards) if cache_only else None)
            reporter = Reporter(
                progress,
                sizes,
                cache_only=cache_only,
                received=lambda: context.stats.network_bytes + context.stats.resumed_bytes,
            )
            results = map_ordered(
                shards,
                work,
                pool=context.workers,
                sizes=sizes,
                memory_limit=memory_limit,
                stats=context.stats,
                tick=reporter.tick,
            )
            with closing(reporter), closing(results):
                reporter.start()
                arriving = zip(shards, sizes, results, strict=True)
                for done, (shard, nbytes, (obtained, result)) in enumerate(arriving, 1):
                    yield shard, result
                    if done == len(shards):
                        with context.stats.timed("finish"):
                            finish()
                    context.stats.shard_done(nbytes, from_cache=obtained.from_cache, checked=obtained.checked)
                    reporter.shard_done(nbytes)
            model.finish()
        context.stats.seconds["total"] = time.perf_counter() - context.started
        logger.info("%s: %s", model.directory, context.stats)


@contextmanager
def _tracing(path: str | os.PathLike[str] | None) -> Iterator[Trace | None]:
    """A trace that is written at the end, however the block ends; None if none is wanted."""
    if path is None:
        yield None
        return
    trace = open_trace(path)
    try:
        yield trace
    finally:
        try:
            trace.write()
        except OSError as error:
            logger.warning("the trace was not written: %s", error)  # what was loaded, or failed first, matters more


def _is_set(value: str | None) -> bool:
    return value is not None and value.strip().lower() not in ("", "0", "false", "no", "off")
