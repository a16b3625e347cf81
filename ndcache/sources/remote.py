"""A model on a server: its shards are read from the cache, or downloaded into it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

from ..caller import warn_caller
from ..context import LoadContext
from ..errors import CancelledError, DiskFullError, IntegrityError, ManifestError, NdcacheError, TransferError
from ..files.folder import is_gone
from ..format.manifest import Manifest, Shard
from ..format.parse import parse_manifest
from ..format.strict_json import MAX_MANIFEST_BYTES
from ..location import Location
from ..store.cleanup import check_free_space, evict_partials, prune
from ..store.directory import ModelDirectory
from ..store.lock import DownloadLock
from ..store.metadata import Match
from ..store.ranges import ByteRanges
from ..workers.prefetch_queue import Prefetch, PrefetchQueue
from .cached_files import CachedFile, HeldFiles, open_cached, unreadable
from .client import Client
from .download import Downloader, DownloadResult
from .manifest import ManifestSource, OpenedManifest, offline_error, open_manifest
from .model import Flaw, Model, ShardFile
from .shard_request import DownloadPlan, plan_ranges
from .verifier import ShardVerifier

__all__ = ["RemoteModel", "open_known_model", "open_remote_model"]

#: How many attempts to make at a shard that other processes keep deleting or replacing.
_ATTEMPTS = 5

logger = logging.getLogger("ndcache")


class RemoteModel(Model):
    """A model on a server, with its files in the cache.

    Parameters
    ----------
    opened : OpenedManifest
    locations : sequence of Location
        Where the model is; then its mirrors, which may have its shards.
    client : Client
    cache : ModelDirectory

    Attributes
    ----------
    opened : OpenedManifest
    commits : dict of str to str
        See `Client`.
    """

    def __init__(
        self, opened: OpenedManifest, locations: Sequence[Location], client: Client, cache: ModelDirectory
    ) -> None:
        super().__init__(opened.manifest, cache.directory)
        self.opened = opened
        self.commits = client.commits
        self._locations = locations
        self._context = client.context
        self._cache = cache
        self._downloader = Downloader(client, cache)
        self._verifier = ShardVerifier(client.context, cache, opened)
        self._held = HeldFiles()
        self._missing: dict[str, Shard] = {}  # when the load began
        self._queue = PrefetchQueue[str]()
        self._prefetched: set[str] = set()
        self._failures: dict[str, NdcacheError] = {}  # those of prefetches that are not worth another attempt
        self._record_counts = {shard.data_path: len(shard.records) for shard in opened.manifest.shards}
        self._has_warned = False

    def has(self, shard: Shard) -> bool:
        return self._cache.has(shard)

    def is_ready(self, shard: Shard) -> bool:
        content_id = self._verifier.content_id(shard)
        if self.has(shard) and self._cache.compare(shard, content_id) is not Match.DIFFERENT:
            return True
        if shard.data_path in self._held:
            return True
        partial = self._open_ranges(shard)
        if partial is not None:
            partial.file.close()
        return partial is not None

    def nbytes(self, shard: Shard) -> int:
        ranges = None if self.has(shard) else self._wanted_ranges(shard)
        return shard.nbytes if ranges is None else ranges.nbytes

    @property
    def is_kept(self) -> bool:
        """Return whether what is downloaded goes to the cache, and not to memory."""
        return self._cache.why_not_kept is None

    @property
    def missing(self) -> list[Shard]:
        """Return what `prepare` found missing."""
        return list(self._missing.values())

    def prepare(self, shards: Sequence[Shard]) -> None:
        missing, room = [], HeldFiles.room()
        for shard in shards:
            if not self.is_ready(shard):
                missing.append(shard)
            elif len(self._held) < room:
                cached = open_cached(self._cache, shard) or self._open_ranges(shard)
                if cached is not None:
                    self._held.hold(shard.data_path, cached)
        if missing and self._context.offline:
            raise offline_error(self._locations[0], [shard.data_path for shard in missing])
        if missing:
            self._missing = {shard.data_path: shard for shard in missing}
            self._queue = PrefetchQueue(self._missing)
            self._check_free_space(missing)
            self.warn_if_not_kept()

    def obtain(self, shard: Shard) -> ShardFile:
        self._queue.discard(shard.data_path)
        attempt = _Attempt(shard, self._cache)
        while True:
            with attempt:
                attempt.begin()
                if (found := self._find_cached(shard)) is not None:
                    return found
                if self._context.offline:
                    raise offline_error(self._locations[0], [shard.data_path])
                with self._context.pool.turns, self._lock(attempt) as lock:
                    if lock is None:
                        continue  # another process has published a file: this version, or another one
                    if (found := self._find_cached(shard)) is not None:
                        return found  # another process was faster, or its metadata came a moment after the file
                    if (failure := self._failures.pop(shard.data_path, None)) is not None:
                        raise failure
                    # After a disturbance, do not delete partial files that another process may be writing.
                    is_exclusive = lock.is_exclusive and not attempt.is_disturbed
                    plan = self._plan(shard)
                    return self._shard_file(plan, self._downloader.download_shard(plan, is_exclusive=is_exclusive))

    def download_if_free(self, shard: Shard, *, keeps_slot: bool = False) -> Prefetch:
        """Download a shard into the cache, unless it is there or somebody else has begun it.

        Parameters
        ----------
        shard : Shard
        keeps_slot : bool
            See `DownloadPlan`.

        Raises
        ------
        NdcacheError, OSError
            It cannot be downloaded, or the cache cannot be written.
        """
        name, attempt = shard.data_path, _Attempt(shard, self._cache)
        attempt.begin()
        if self.is_ready(shard):
            return Prefetch.NOT_NEEDED
        with self._context.pool.turns, self._cache.try_lock(name, attempt.is_published) as is_mine:
            if not is_mine:
                return Prefetch.BUSY
            if self.is_ready(shard):
                return Prefetch.NOT_NEEDED  # it was published between the two looks
            self._prefetched.add(name)  # before others see the file
            plan = self._plan(shard, keeps_slot=keeps_slot)
            obtained = self._shard_file(plan, self._downloader.download_shard(plan, is_exclusive=True))
            obtained.file.close()
            if obtained.from_cache:
                self._prefetched.discard(name)
        return Prefetch.TRIED

    def has_prefetched(self, shard: Shard) -> bool:
        """Return whether `download_if_free` has downloaded a shard."""
        return shard.data_path in self._prefetched

    def check(self, shard: Shard) -> str | Flaw:
        return self._verifier.check(shard)

    def finish(self) -> None:
        self.warn_if_not_kept()
        if self._context.offline:
            return
        try:
            if self._verifier.is_current():  # otherwise there was an update, whose load knows which files are needed
                prune(self._cache, self.manifest, self._other_manifests)
        except (OSError, ManifestError) as error:
            logger.debug("the cache was not pruned: %s", error)  # the next load will do it

    def close(self) -> None:
        self._held.close()

    def warn_if_not_kept(self) -> None:
        """Warn once, on the caller's thread, if fetched files go to memory."""
        why = self._cache.why_not_kept
        if why is not None and not self._has_warned:
            self._has_warned = True
            warn_caller(f"what is fetched from {self._locations[0]} stays in memory and is not kept: {why}")

    def _find_cached(self, shard: Shard) -> ShardFile | None:
        """Return a cached file that can be used: a complete one with the right bytes, or one with the wanted ranges."""
        cached = self._held.take(shard.data_path) or open_cached(self._cache, shard)
        if cached is None:
            if not self._context.offline:
                self._verifier.quarantine_if_truncated(shard)
        elif cached.is_whole:
            with contextlib.ExitStack() as unless_used:
                unless_used.callback(cached.file.close)
                if self._verifier.accepts(shard, cached):
                    checked = self._verifier.checked_by(shard, cached.metadata)
                    unless_used.pop_all()
                    return ShardFile(cached.file, from_cache=not self.has_prefetched(shard), checked=checked)
            cached = None
        cached = cached or self._open_ranges(shard)
        if cached is None:
            return None
        return ShardFile(cached.file, from_cache=not self.has_prefetched(shard), checked="size")

    def _open_ranges(self, shard: Shard) -> CachedFile | None:
        """Open a cached file that has the wanted ranges, and holes."""
        ranges = self._wanted_ranges(shard)
        if ranges is None:
            return None
        file = self._cache.partials.open_covering(shard, self._verifier.content_id(shard), ranges)
        return None if file is None else CachedFile(file, is_whole=False)

    def _wanted_ranges(self, shard: Shard) -> ByteRanges | None:
        """Return the ranges to fetch, or None for the whole shard, which is needed to compare a digest."""
        is_manifest_demanded = self.manifest.name in self._context.integrity
        is_digest_demanded = shard.required_digest is not None or (is_manifest_demanded and bool(shard.digests))
        has_all_records = len(shard.records) == self._record_counts[shard.data_path]
        if has_all_records or is_digest_demanded or self._context.verify == "always":
            return None
        return plan_ranges(shard)

    def _lock(self, attempt: _Attempt) -> contextlib.AbstractContextManager[DownloadLock | None]:
        """Wait for the lock to download a shard, or until another process has published it."""
        context, name = self._context, attempt.name

        def sleep(seconds: float) -> None:
            context.pool.turns.release()
            with context.stats.timed("lock", file=name):
                context.cancellation.sleep(seconds)

        return self._cache.acquire_or_wait(name, attempt.is_published, sleep, self._prefetch_next)

    def _prefetch_next(self) -> bool:
        """Download a shard that nobody has begun, into the cache only; return False if there is none.

        A worker calls this when somebody else downloads the shard that it wants.
        """
        # What the cache cannot keep would go to memory, beyond the limit.
        return self._cache.why_not_kept is None and self._queue.prefetch_next(self._prefetch)

    def _prefetch(self, name: str) -> Prefetch:
        shard = self._missing[name]
        try:
            return self.download_if_free(shard, keeps_slot=True)
        except CancelledError:
            raise
        except (NdcacheError, OSError) as error:
            self._note_failure(shard, error)
        return Prefetch.TRIED

    def _note_failure(self, shard: Shard, error: NdcacheError | OSError) -> None:
        """Leave the error of a prefetch to the shard's own turn, which it may never come to."""
        logger.debug("%s was not prefetched: %s", shard.data_path, error)
        self._prefetched.discard(shard.data_path)
        if isinstance(error, (TransferError, IntegrityError)):
            if not error.retryable or error.max_retries is not None:
                self._failures[shard.data_path] = error.with_traceback(None)
        elif not is_gone(error):
            self._queue.clear()  # the disk is full, say

    def _plan(self, shard: Shard, *, keeps_slot: bool = False) -> DownloadPlan:
        name = shard.data_path
        # Without a digest, only the server knows whether a file of another version of the manifest is still right.
        may_be_right = not shard.digests and self.has(shard) and self._cache.is_intact(name)
        return DownloadPlan(
            shard,
            tuple(location.url(name) for location in self._locations),
            self._verifier.content_id(shard),
            cached=self._cache.metadata(name) if may_be_right else None,
            ranges=self._wanted_ranges(shard),
            keeps_slot=keeps_slot,
        )

    def _shard_file(self, plan: DownloadPlan, result: DownloadResult) -> ShardFile:
        """Return the downloaded file, or the cached one that the server says has not changed."""
        if result.file is not None:
            return ShardFile(result.file, from_cache=False, checked=self._verifier.strongest(result.checked))
        shard, metadata = plan.shard, plan.cached
        assert metadata is not None
        file = self._cache.open_shard(shard)
        if file is not None:
            with contextlib.ExitStack() as unless_used:
                unless_used.callback(file.close)
                if metadata.is_unchanged(os.fstat(file.fileno())):
                    self._cache.try_to_remember(shard.data_path, metadata.with_content_id(plan.content_id))
                    unless_used.pop_all()
                    return ShardFile(file, from_cache=True, checked=self._verifier.checked_by(shard, metadata))
        raise FileNotFoundError(errno.ENOENT, "it was deleted or replaced just now", shard.data_path)

    def _check_free_space(self, shards: Sequence[Shard]) -> None:
        needed = sum(self.nbytes(shard) for shard in shards)
        try:
            check_free_space(self._cache, needed)
        except DiskFullError:
            evict_partials(self._cache, shards)
            check_free_space(self._cache, needed)

    def _other_manifests(self) -> Iterator[Manifest]:
        for name in self._cache.manifest_names():
            if name != self.manifest.name and (data := self._cache.read(name, MAX_MANIFEST_BYTES)):
                with contextlib.suppress(ManifestError):  # some other JSON file
                    yield parse_manifest(data, name=name, check=self._context.cancellation.poll)


def open_remote_model(location: Location, context: LoadContext) -> RemoteModel:
    """Open a model on a server: fetch its manifest, or read the cached one.

    Raises
    ------
    TransferError, ManifestError, ChecksumError, CacheError
    OfflineError
    """
    cache, client, locations = context.open_directory(location), Client(context), (location, *context.mirrors)
    model = RemoteModel(ManifestSource(locations, client, cache).open(), locations, client, cache)
    model.warn_if_not_kept()
    return model


def open_known_model(
    location: Location, context: LoadContext, name: str, data: bytes, commits: Mapping[str, str]
) -> RemoteModel:
    """Open a model on a server whose manifest another process has fetched.

    Parameters
    ----------
    location : Location
    context : LoadContext
    name : str
        The manifest's name.
    data : bytes
        The manifest.
    commits : mapping of str to str
        See `Client`.

    Raises
    ------
    ManifestError, ChecksumError, CacheError
    """
    client, locations = Client(context), (location, *context.mirrors)
    client.commits.update(commits)
    opened = open_manifest(data, name, location.url(name), context)
    return RemoteModel(opened, locations, client, context.open_directory(location))


class _Attempt:
    """An attempt to obtain a shard, as a context manager that suppresses errors after which there is another attempt.

    Other processes may delete the model, or publish other versions of the shard, at any time.

    Attributes
    ----------
    name : str
        The shard's path.
    is_disturbed : bool
        Whether an error has been suppressed.
    """

    is_disturbed: bool = False

    def __init__(self, shard: Shard, cache: ModelDirectory) -> None:
        self.name = shard.data_path
        self._shard = shard
        self._cache = cache
        self._version: object = None  # of the file that was there at the beginning
        self._looks = 0  # since the last error
        self._errors = 0

    def is_published(self) -> bool:
        """Return whether another process has published a file since the attempt began."""
        # Some file systems give the same file another time at each look: after some looks, wait for the lock alone.
        return self._looks <= _ATTEMPTS and self._cache.version(self.name) not in (None, self._version)

    def begin(self) -> None:
        """Note which file is there now."""
        self._looks += 1
        self._version = self._cache.version(self.name)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        failure = unreadable(self._shard, error) if isinstance(error, OSError) else None
        if failure is None:
            return False
        self._errors += 1
        self._looks, self.is_disturbed = 0, True
        if self._errors < _ATTEMPTS and is_gone(error):
            return True  # another process has taken the file away just now
        if self._errors <= _ATTEMPTS and self._cache.fall_back(failure):
            return True
        if failure is error:
            return False
        raise failure
