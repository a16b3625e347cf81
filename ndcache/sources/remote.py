"""A model on a server: its shards are read from the cache, or downloaded into it."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

from ..caller import warn_caller
from ..context import LoadContext
from ..errors import (
    DiskFullError,
    ManifestError,
    UnsupportedDtypeError,
)
from ..format.manifest import Manifest, Shard
from ..format.parse import parse_manifest
from ..format.paths import flatten
from ..format.safetensors.headers import Headers, is_kept_header
from ..format.strict_json import MAX_KEPT_BYTES
from ..http.retry import RetryPolicy
from ..location import Location
from ..store.cleanup import check_free_space, evict_partials, prune
from ..store.companion_note import CompanionNote
from ..store.directory import ModelDirectory
from ..store.housekeeping.usage import Use, begin_use
from ..store.lock import DownloadLock, find_holder
from ..store.metadata import Match
from ..store.partials.growing import GrowingFile
from ..store.partials.ranges import ByteRanges
from ..workers.postponed import Postponed
from .cached_files import CachedFile, HeldFiles, ObtainAttempt, open_cached
from .client import Client
from .downloads.download import Downloader, DownloadResult
from .downloads.shard_request import DownloadPlan, plan_ranges
from .equal_files import EqualFiles
from .manifests.manifest import ManifestSource
from .manifests.opened import OpenedManifest, offline_error, open_manifest
from .model import Flaw, Model, ShardFile
from .prefetches import Prefetches
from .verifier import ShardVerifier

__all__ = ["RemoteModel", "open_known_model", "open_remote_model"]

#: For shards that are downloaded ahead of their turn: if one fails, its own turn tries again.
_ONCE = RetryPolicy(retries=0)

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
    locations, cache
    """

    def __init__(
        self, opened: OpenedManifest, locations: Sequence[Location], client: Client, cache: ModelDirectory
    ) -> None:
        super().__init__(opened.manifest, cache.directory)
        self.opened = opened
        self.commits = client.commits
        self.locations = locations
        self._context = client.context
        self.cache = cache
        self._downloader = Downloader(client, cache)
        self._verifier = ShardVerifier(client.context, cache, opened)
        self._equal = EqualFiles(client.context, cache, opened.manifest, self._verifier)
        self._held = HeldFiles()
        self._postponed: dict[str, ObtainAttempt] = {}
        self._prefetches = Prefetches()
        self._prefetched: set[str] = set()
        self._all_records = {shard.data_path: shard.records for shard in opened.manifest.shards}
        self._has_warned = False
        self._learnt: list[Shard] = []  # shards of which only the server's answer has told the digest

    def has(self, shard: Shard) -> bool:
        return self.cache.has(shard)

    def is_ready(self, shard: Shard) -> bool:
        """Return whether `obtain` is likely to need no network; do not read the file."""
        content_id = self._verifier.content_id(shard)
        if self.has(shard) and self.cache.compare(shard, content_id) is not Match.DIFFERENT:
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
        return self.cache.why_not_kept is None

    @property
    def missing(self) -> list[Shard]:
        """Return what `prepare` found missing."""
        return list(self._prefetches.shards.values())

    def prepare(self, shards: Sequence[Shard]) -> bool:
        missing, room = [], HeldFiles.room()
        if self._context.force:
            evict_partials(self.cache, shards)
        for shard in shards:
            if not self.is_ready(shard):
                missing.append(shard)
                continue
            self._context.arrivals.add(shard.data_path)
            if len(self._held) < room:
                cached = open_cached(self.cache, shard) or self._open_ranges(shard)
                if cached is not None:
                    self._held.hold(shard.data_path, cached)
        if missing and self._context.offline:
            raise offline_error(self.locations[0], [shard.data_path for shard in missing])
        if missing:
            self._prefetches = Prefetches(missing, lambda shard: self.download_if_free(shard, _ONCE))
            self._context.pool.set_spare_work(self._next_prefetch, self._sleep)
            self._check_free_space(missing)
            self._equal.announce(missing)
            self.warn_if_not_kept()
        return not missing

    def obtain(self, shard: Shard, growing: GrowingFile | None = None) -> ShardFile:
        self._prefetches.begin(shard)
        attempt = self._postponed.pop(shard.data_path, None) or ObtainAttempt(shard, self.cache)
        while True:
            with attempt:
                attempt.begin()
                if (found := self._find_cached(shard)) is not None:
                    return found
                if self._context.offline:
                    raise offline_error(self.locations[0], [shard.data_path])
                with self._context.pool.turns, self._lock(attempt, shard) as lock:
                    if lock is None:
                        continue  # another process has published a file: this version, or another one
                    if (found := self._find_cached(shard)) is not None:
                        return found  # another process was faster, or its metadata came a moment after the file
                    if not self._context.pool.has_slot:
                        self._postpone(attempt, attempt.patience.pause)
                    if (linked := self._equal.take(shard)) is not None:
                        return linked
                    self._prefetches.raise_failure(shard)
                    # After a disturbance, do not delete partial files that another process may be writing.
                    is_exclusive = lock.is_exclusive and not attempt.is_disturbed
                    plan = self._plan(shard, growing=growing)
                    with self._verifier.doubting_headers():
                        result = self._downloader.download_shard(plan, is_exclusive=is_exclusive)
                    return self._shard_file(plan, result)

    def download_if_free(self, shard: Shard, policy: RetryPolicy | None = None) -> bool:
        """Download a shard into the cache, unless it is there; return False if somebody else is downloading it.

        Parameters
        ----------
        shard : Shard
        policy : RetryPolicy, optional
            How often to try; by default, as the load does.

        Raises
        ------
        NdcacheError, OSError
            It cannot be downloaded, or the cache cannot be written.
        """
        name, attempt = shard.data_path, ObtainAttempt(shard, self.cache)
        attempt.begin()
        if self.is_ready(shard):
            self._context.arrivals.add(name)
            return True
        with self._context.pool.turns, self.cache.try_lock(name, attempt.is_published) as is_mine:
            if is_mine and not self.is_ready(shard):  # it may have been published between the two looks
                if (linked := self._equal.take(shard)) is not None:
                    linked.file.close()
                    return True
                self._prefetched.add(name)  # before others see the file
                is_downloaded, plan = False, self._plan(shard, policy)
                try:
                    with self._verifier.doubting_headers():
                        result = self._downloader.download_shard(plan, is_exclusive=True)
                    obtained = self._shard_file(plan, result)
                    obtained.file.close()
                    is_downloaded = not obtained.from_cache
                finally:
                    if not is_downloaded:
                        self._prefetched.discard(name)
                self._context.arrivals.add(name)
            return is_mine

    def has_prefetched(self, shard: Shard) -> bool:
        """Return whether `download_if_free` has downloaded a shard."""
        return shard.data_path in self._prefetched

    def check(self, shard: Shard) -> str | Flaw:
        return self._verifier.check(shard)

    def finish(self) -> None:
        self.warn_if_not_kept()
        if self._context.offline:
            return
        if self.missing and self.is_kept:
            self._context.cache.make_room(0, self.cache.directory)  # others may have filled the cache meanwhile
        if self._learnt:
            self._equal.announce_learnt(self._learnt)
        try:
            if self._verifier.is_current():  # otherwise there was an update, whose load knows which files are needed
                prune(self.cache, self.manifest, self._other_manifests)
        except (OSError, ManifestError) as error:
            logger.debug("the cache was not pruned: %s", error)  # the next load will do it

    def close(self) -> None:
        self._held.close()
        self._prefetches = Prefetches()  # those of the load refer to this model

    def warn_if_not_kept(self) -> None:
        """Warn once, on the caller's thread, if fetched files go to memory."""
        why = self.cache.why_not_kept
        if why is not None and not self._has_warned and not self._context.dry_run:
            self._has_warned = True
            warn_caller(f"what is fetched from {self.locations[0]} stays in memory and is not kept: {why}")

    def _find_cached(self, shard: Shard) -> ShardFile | None:
        """Return a cached file that can be used: a complete one with the right bytes, or one with the wanted ranges."""
        cached = self._held.take(shard.data_path) or open_cached(self.cache, shard)
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
        file = self.cache.partials.open_covering(shard, self._verifier.content_id(shard), ranges)
        return None if file is None else CachedFile(file, is_whole=False)

    def _wanted_ranges(self, shard: Shard) -> ByteRanges | None:
        """Return the ranges to fetch, or None for the whole shard, which is needed to compare a digest."""
        is_manifest_demanded = self.manifest.name in self._context.integrity
        is_digest_demanded = shard.required_digest is not None or (is_manifest_demanded and bool(shard.digests))
        has_all_records = shard.records == self._all_records[shard.data_path]  # quick if the records are the same
        if has_all_records or is_digest_demanded or self._context.verify == "always":
            return None
        if self.cache.old_files.has(shard.data_path) or not self.cache.keeps_ranges:
            return None
        return plan_ranges(shard, has_slices=any(self.manifest[each.name] is not each for each in shard.records))

    def _lock(self, attempt: ObtainAttempt, shard: Shard) -> contextlib.AbstractContextManager[DownloadLock | None]:
        """Wait for the lock to download a shard, or until another process has published it."""

        def wait(seconds: float) -> None:
            lock_path = self.cache.layout.locks.path / flatten(attempt.name)
            find = functools.partial(find_holder, lock_path)
            self._context.arrivals.wait(attempt.name, find, attempt.bytes_elsewhere(self._verifier.content_id(shard)))
            if self._context.pool.can_postpone:
                self._postpone(attempt, seconds)
            if (prefetch := self._next_prefetch()) is not None:
                prefetch()
            else:
                self._sleep(seconds)

        return self.cache.acquire_or_wait(attempt.name, attempt.is_published, wait, attempt.patience)

    def _sleep(self, seconds: float) -> None:
        self._context.pool.turns.release()
        with self._context.stats.timed("lock"):
            self._context.cancellation.sleep(seconds)

    def _postpone(self, attempt: ObtainAttempt, seconds: float) -> NoReturn:
        attempt.postpone()
        self._postponed[attempt.name] = attempt
        raise Postponed(seconds)

    def _next_prefetch(self) -> Callable[[], None] | None:
        # What the cache cannot keep would go to memory, beyond the limit.
        return self._prefetches.next() if self.is_kept else None

    def _plan(
        self, shard: Shard, policy: RetryPolicy | None = None, growing: GrowingFile | None = None
    ) -> DownloadPlan:
        name = shard.data_path
        # Without a digest, only the server knows whether a file of another version of the manifest is still right.
        may_be_right = not shard.digests and self._verifier.may_be_right(shard)
        return DownloadPlan(
            shard,
            tuple(location.url(name) for location in self.locations),
            self._verifier.content_id(shard),
            cached=self.cache.metadata(name) if may_be_right else None,
            ranges=self._wanted_ranges(shard),
            policy=policy,
            growing=growing,
        )

    def _shard_file(self, plan: DownloadPlan, result: DownloadResult) -> ShardFile:
        """Return the downloaded file, or the cached one that the server says has not changed."""
        if result.file is not None:
            if "sha256" in result.checked and not plan.shard.digests:
                self._learnt.append(plan.shard)
            return ShardFile(result.file, from_cache=False, checked=self._verifier.strongest(result.checked))
        shard, metadata = plan.shard, plan.cached
        assert metadata is not None
        file = self.cache.open_shard(shard)
        if file is not None:
            with contextlib.ExitStack() as unless_used:
                unless_used.callback(file.close)
                if metadata.is_unchanged(os.fstat(file.fileno())):
                    self.cache.try_to_remember(shard.data_path, metadata.with_content_id(plan.content_id))
                    unless_used.pop_all()
                    return ShardFile(file, from_cache=True, checked=self._verifier.checked_by(shard, metadata))
        raise FileNotFoundError(errno.ENOENT, "it was deleted or replaced just now", shard.data_path)

    def _check_free_space(self, shards: Sequence[Shard]) -> None:
        needed = sum(self.nbytes(shard) for shard in shards if not self._equal.are_likely(shard))
        excess = self._context.cache.make_room(needed, self.cache.directory) if self.is_kept else 0
        if excess:
            warn_caller(
                f"the cache will have {excess:,} bytes more than NDCACHE_MAX_SIZE allows: this model, and those in use,"
                " have more together"
            )
        try:
            check_free_space(self.cache, needed)
        except DiskFullError:
            evict_partials(self.cache, shards)
            check_free_space(self.cache, needed)

    def _other_manifests(self) -> Iterator[Manifest]:
        check = self._context.cancellation.poll
        known = {self.opened.file, self.manifest.name, *CompanionNote.read(self.cache.layout).files}
        for name in self.cache.manifest_names():
            if name not in known and (data := self.cache.read(name, MAX_KEPT_BYTES)):
                with contextlib.suppress(ManifestError, UnsupportedDtypeError):  # some other JSON file
                    if is_kept_header(name):
                        yield Headers.decode(data).manifest(lambda file: file, {}, check)
                    else:
                        yield parse_manifest(data, name=name, check=check)


def open_remote_model(location: Location, context: LoadContext) -> RemoteModel:
    """Open a model on a server: fetch its manifest, or read the cached one.

    Raises
    ------
    TransferError, ManifestError, ChecksumError, CacheError
    OfflineError
    """
    cache, client, locations = context.open_directory(location), Client(context), (location, *context.mirrors)
    source = ManifestSource(locations, client, cache)
    use = _begin_use(cache, context)
    try:
        opened = source.open()
        if use is None:  # the model was not in the cache, or was removed since
            if context.is_use and cache.why_not_kept is None and not context.offline and not cache.exists():
                source.restore(opened)
            use = _begin_use(cache, context)
        model = RemoteModel(opened, locations, client, cache)
        model.warn_if_not_kept()
    except BaseException:
        if use is not None:
            use.end()
        raise
    model.use = use
    return model


def _begin_use(cache: ModelDirectory, context: LoadContext) -> Use | None:
    layout = cache.layout_in_cache if context.is_use else None
    return None if layout is None else begin_use(layout)


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
