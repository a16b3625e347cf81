"""A model on a server: its files are in the cache, or are brought there when they are asked for."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from ..caller import warn_caller
from ..errors import (
    CacheError,
    CacheUnavailableError,
    DiskFullError,
    ManifestError,
    NdcacheError,
    UnsafeCacheError,
)
from ..files.descriptors import affordable
from ..files.folder import is_gone
from ..format.integrity import Integrity, find_mismatch
from ..format.manifest import Manifest, Shard
from ..format.parse import parse_manifest
from ..format.strict_json import MAX_MANIFEST_BYTES
from ..location.locate import Location
from ..store.cleanup import check_free_space, evict_partials, prune
from ..store.metadata import FileMetadata, Match
from ..store.ranges import ByteRanges
from .download import Downloader
from .manifest import ManifestSource, offline_error
from .model import Flaw, Model, ShardFile, is_shortage

__all__ = ["RemoteModel"]

#: How often a shard is obtained before other processes that take it away count as an error.
_TRIES = 5
#: The cached shards that are held open from the start of a load, so that deleting the model does not take them away,
#: of all loads of this process together, and the most that may be: descriptors are scarce.
_all_held: set[BinaryIO] = set()
_MAX_HELD = 128
#: Of the descriptors that are left, a quarter may go to these.
_FILES_PER_HELD = 4
#: Of a shard that holds few of the tensors asked for: bytes between two of them that are rather fetched than asked
#: around, and so the least that asking for some of it saves.
_GAP = 1 << 20
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_all_held.clear)  # the parent's are not the child's
#: What a shard can have been checked by, the strongest first.
_KINDS = ("sha512", "sha384", "sha256", "md5")

logger = logging.getLogger("ndcache")


@dataclass(frozen=True)
class _CachedFile:
    """A shard's file in the cache, open, and what was remembered of it when it was opened.

    If it is not whole, it has what is wanted, and holes.
    """

    file: BinaryIO
    metadata: FileMetadata | None = None
    is_whole: bool = True

    def compare(self, shard: Shard, content_id: str) -> Match:
        """See `FileMetadata.compare`."""
        if self.metadata is None:
            return Match.UNKNOWN
        return self.metadata.compare(os.fstat(self.file.fileno()), shard, content_id)

    def found_right(self, digests: Mapping[str, str], content_id: str) -> FileMetadata:
        """What is to be remembered after it was read."""
        status, old = os.fstat(self.file.fileno()), self.metadata
        etag = old.etag if old is not None and old.is_unchanged(status) else None
        return FileMetadata.of(status, digests, etag=etag, content_id=content_id)


class RemoteModel(Model):
    """A model on a server, its files in the cache.

    Parameters
    ----------
    location, mirrors : Location
        Where it is, and where else its shards may be had.
    downloader : Downloader
        Brings what is missing into its cache.
    verify : str
        The ``verify`` option.
    offline : bool
        Use what is cached and nothing else.
    integrity : mapping
        The digests that the caller demands.
    """

    def __init__(
        self,
        location: Location,
        downloader: Downloader,
        *,
        mirrors: Iterable[Location] = (),
        verify: str,
        offline: bool,
        integrity: Integrity,
    ) -> None:
        self._bases = (location, *mirrors)
        self._downloader = downloader
        self._cache = downloader.cache
        self._verify = verify
        self._offline = offline
        self._integrity = integrity
        self._held: dict[str, _CachedFile] = {}
        self._is_told = threading.Lock()  # taken once: that nothing can be remembered
        manifest, self._manifest_digest = ManifestSource(self._bases, downloader, integrity, offline=offline).open()
        super().__init__(manifest, self._cache.directory)
        self._is_warned = False
        self._warn_if_not_kept()
        self._counts = {shard.data_path: len(shard.records) for shard in manifest.shards}

    def has(self, shard: Shard) -> bool:
        return self._cache.has(shard)

    def is_ready(self, shard: Shard) -> bool:
        if self.has(shard) and self._cache.compare(shard, self._content_id(shard)) is not Match.DIFFERENT:
            return True
        if shard.data_path in self._held:
            return True
        some = self._open_some(shard)
        if some is not None:
            some.file.close()
        return some is not None

    def nbytes(self, shard: Shard) -> int:
        wanted = None if self.has(shard) else self._wanted(shard)
        return shard.nbytes if wanted is None else wanted.nbytes

    def prepare(self, shards: Sequence[Shard]) -> None:
        missing = []
        may_hold = min(_MAX_HELD - len(_all_held), affordable(_MAX_HELD, _FILES_PER_HELD))
        for shard in shards:
            if not self.is_ready(shard):
                missing.append(shard)
            elif len(self._held) < may_hold and (cached := self._open(shard) or self._open_some(shard)) is not None:
                self._held[shard.data_path] = cached  # so that it is still there when its turn comes
                _all_held.add(cached.file)
        if missing and self._offline:
            raise offline_error(self._bases[0], [shard.data_path for shard in missing])
        if missing:
            self._check_free_space(missing)
            self._warn_if_not_kept()

    def obtain(self, shard: Shard) -> ShardFile:
        tries = 0
        while True:
            try:
                return self._obtain_once(shard, is_first_try=tries == 0)
            except (CacheUnavailableError, OSError) as error:
                if isinstance(error, NdcacheError) and not isinstance(error, CacheUnavailableError):
                    raise
                cause = error.__cause__ if isinstance(error, CacheUnavailableError) else error
                tries += 1
                # Somebody else deleted the model, or published the shard of another version, just then.
                if tries < _TRIES and is_gone(cause):
                    continue
                unreadable = _unreadable(shard, error)
                if tries > _TRIES or not self._cache.fall_back(unreadable):
                    raise unreadable from cause

    def check(self, shard: Shard) -> str | Flaw:
        try:
            for _ in range(_TRIES):
                if (found := self._check_once(shard)) is not None:
                    return found
        except (CacheUnavailableError, OSError) as error:
            if isinstance(error, NdcacheError) and not isinstance(error, CacheUnavailableError):
                raise
            cause = error.__cause__ if isinstance(error, CacheUnavailableError) else error
            if not isinstance(cause, OSError) or is_shortage(cause):
                raise _unreadable(shard, error) from cause
            logger.warning("%s in the cache cannot be read: %s", shard.data_path, cause.strerror or cause)
            return Flaw.BAD_AND_KEPT
        return Flaw.OF_ANOTHER_VERSION  # somebody publishes others all the time

    def _check_once(self, shard: Shard) -> str | Flaw | None:
        """Return what `check` finds; None if the file was replaced or removed while it was looked at."""
        cached = self._open(shard)
        if cached is not None:
            with cached.file:
                if self._is_of_another_version(shard):
                    return Flaw.OF_ANOTHER_VERSION
                if self._has_right_bytes(shard, cached):
                    return self._checked(shard, cached.metadata)
                return self._reject(shard, cached)
        size = self._cache.size(shard.data_path)
        if size in (None, shard.nbytes):
            return Flaw.MISSING if size is None else None
        return self._quarantine_if_cut(shard) or Flaw.OF_ANOTHER_VERSION

    def finish(self) -> None:
        self._warn_if_not_kept()
        if self._offline:
            return
        try:
            if not self._is_current():
                return  # an update has come meanwhile, which knows better what is of use
            prune(self._cache, self.manifest, self._other_manifests)
        except (OSError, ManifestError) as error:
            logger.debug("not tidied: %s", error)  # the next load will do it

    def close(self) -> None:
        for name in list(self._held):
            if (cached := self._take_held(name)) is not None:
                cached.file.close()

    def _warn_if_not_kept(self) -> None:
        """Warn once, on the caller's thread, if what is fetched goes to memory."""
        why = self._cache.why_not_kept
        if why is not None and not self._is_warned:
            self._is_warned = True
            warn_caller(f"what is fetched of {self._bases[0]} stays in memory and is not kept: {why}")

    def _open(self, shard: Shard) -> _CachedFile | None:
        file = self._cache.open_shard(shard)
        if file is None:
            return None
        try:
            return _CachedFile(file, self._cache.metadata(shard.data_path))
        except BaseException:
            file.close()
            raise

    def _open_some(self, shard: Shard) -> _CachedFile | None:
        wanted = self._wanted(shard)
        file = None if wanted is None else self._cache.partials.open_covering(shard, self._content_id(shard), wanted)
        return None if file is None else _CachedFile(file, is_whole=False)

    def _wanted(self, shard: Shard) -> ByteRanges | None:
        """The bytes that are enough of a shard of which a few tensors are asked for; None is all of it."""
        is_vouched_for = shard.required_digest is not None or (
            self.manifest.name in self._integrity and bool(shard.digests)
        )
        if len(shard.records) == self._counts[shard.data_path] or is_vouched_for or self._verify == "always":
            return None
        stretches = ((record.byte_offset, record.byte_offset + record.nbytes) for record in shard.records)
        wanted = ByteRanges(stretches, gap=_GAP) or ByteRanges(
            [(0, 1)]
        )  # a tensor may be empty, what is asked for may not
        saved = shard.nbytes - wanted.nbytes
        return None if saved < max(_GAP, wanted.nbytes) else wanted

    def _take_held(self, name: str) -> _CachedFile | None:
        cached = self._held.pop(name, None)
        if cached is not None:
            _all_held.discard(cached.file)
        return cached

    def _obtain_once(self, shard: Shard, *, is_first_try: bool) -> ShardFile:
        name = shard.data_path
        for last_look in (*(False,) * _TRIES, True):
            version = self._cache.version(name)
            if (obtained := self._from_cache(shard)) is not None:
                return obtained
            if self._offline:
                raise offline_error(self._bases[0], [name])

            def is_there(version: object = version, last_look: bool = last_look) -> bool:
                # A file system may tell another time of the same file at each look.
                return not last_look and self._cache.version(name) not in (None, version)

            def sleep(seconds: float) -> None:
                with self._downloader.stats.timed("lock", file=name):
                    self._downloader.cancellation.sleep(seconds)

            with self._cache.acquire_or_wait(name, is_there, sleep) as acquire_or_wait:
                if acquire_or_wait is not None:
                    if (obtained := self._from_cache(shard)) is not None:
                        return obtained  # somebody else was faster, or its validator came a moment after the file
                    # What others write is left alone by whoever was disturbed himself.
                    return self._from_server(shard, is_exclusive=acquire_or_wait.is_exclusive and is_first_try)
            # Somebody else has published a file: what is wanted, or another version.
        raise AssertionError("the last look waits for its turn, and for nothing else")

    def _from_cache(self, shard: Shard) -> ShardFile | None:
        cached = self._take_held(shard.data_path) or self._open(shard)
        if cached is None:
            if not self._offline:
                self._quarantine_if_cut(shard)
        elif cached.is_whole:
            try:
                if self._is_good(shard, cached):
                    return ShardFile(cached.file, from_cache=True, checked=self._checked(shard, cached.metadata))
            except BaseException:
                cached.file.close()
                raise
            cached.file.close()
            cached = None
        cached = cached or self._open_some(shard)
        return None if cached is None else ShardFile(cached.file, from_cache=True, checked="size")

    def _quarantine_if_cut(self, shard: Shard) -> Flaw | None:
        """Set aside a file of the wrong size; None if there is none, or it is of another version."""

        def is_cut() -> bool:
            return self._cache.size(shard.data_path) not in (None, shard.nbytes)

        # The last look is for one of the right size that was published by somebody else meanwhile.
        if is_cut() and self._is_current() and not self._is_of_another_version(shard) and is_cut():
            return self._try_to_quarantine(shard.data_path)
        return None

    def _try_to_quarantine(self, name: str, file: BinaryIO | None = None) -> Flaw:
        try:
            self._cache.quarantine(name, file)
        except UnsafeCacheError:
            raise
        except CacheError as error:  # a cache that cannot be written
            logger.warning("%s in the cache is not what the manifest says, and cannot be set aside: %s", name, error)
            return Flaw.BAD_AND_KEPT
        return Flaw.BAD

    def _is_current(self) -> bool:
        """Whether the cache still has the manifest that this load uses, and no update has come."""
        return self._cache.has_sha256(self.manifest.name, self._manifest_digest, MAX_MANIFEST_BYTES)

    def _from_server(self, shard: Shard, *, is_exclusive: bool) -> ShardFile:
        name, content_id = shard.data_path, self._content_id(shard)
        # Without a digest, only the server can tell whether a file of another version of the manifest is still right.
        is_candidate = not shard.digests and self.has(shard) and self._cache.is_intact(name)
        old = self._cache.metadata(name) if is_candidate else None
        urls = [base.url(name) for base in self._bases]
        wanted = self._wanted(shard)
        brought = self._downloader.shard(shard, urls, content_id, cached=old, is_exclusive=is_exclusive, wanted=wanted)
        if brought.file is not None:
            return ShardFile(brought.file, from_cache=False, checked=self._strongest(brought.checked))
        assert old is not None
        file = self._cache.open_shard(shard)
        if file is None or not old.is_unchanged(os.fstat(file.fileno())):
            if file is not None:
                file.close()
            raise CacheUnavailableError(f"{name} was deleted or replaced just now") from FileNotFoundError(name)
        self._cache.try_to_remember(name, old.with_content_id(content_id))
        return ShardFile(file, from_cache=True, checked=self._checked(shard, old))

    def _is_good(self, shard: Shard, cached: _CachedFile) -> bool:
        known = cached.compare(shard, self._content_id(shard))
        if known is Match.UNKNOWN and not shard.digests and cached.metadata is None and not self._offline:
            return False  # nothing tells what it is
        if known is Match.DIFFERENT:
            return False  # of another version; the new one takes its name
        if self._verify == "never" or (self._verify == "download" and known is Match.SAME):
            return True
        if self._has_right_bytes(shard, cached):
            return True
        self._reject(shard, cached)
        if not self._cache.is_published(shard.data_path, cached.file):
            logger.warning("%s in the cache is not what the manifest says: set aside", shard.data_path)
        return False

    def _has_right_bytes(self, shard: Shard, cached: _CachedFile) -> bool:
        name, content_id, file = shard.data_path, self._content_id(shard), cached.file
        # Of a shard without a digest, what the server said of it when it came may be known.
        remembered = {} if cached.metadata is None else dict(cached.metadata.digests)
        expected = {**shard.digests, **{kind: text for kind, text in remembered.items() if kind not in shard.digests}}
        with self._downloader.stats.timed("hash", file=name):
            wrong = find_mismatch(file, expected, self._downloader.cancellation.check)
        if wrong is not None and shard.digests and wrong[0] not in shard.digests:
            expected, wrong = dict(shard.digests), None  # what is remembered is wrong, not the file
        if wrong is not None:
            return False
        if cached.compare(shard, content_id) is not Match.SAME and self._cache.is_published(name, file):
            is_remembered = self._cache.try_to_remember(name, cached.found_right(expected, content_id))
            if not is_remembered and self._is_told.acquire(blocking=False):
                logger.warning(
                    "files in %s are not as old as when they were fetched, and that they are right cannot be noted, as"
                    " it cannot be written: each load computes their digests. Run `ndcache verify` where it can be.",
                    self.directory,
                )
        return True

    def _reject(self, shard: Shard, cached: _CachedFile) -> Flaw | None:
        """Set a file with wrong bytes aside, and say what is wrong; None if its name is not its own any more."""
        name, file = shard.data_path, cached.file
        if not self._cache.is_published(name, file):
            return None
        known = self._cache.metadata(name)
        # It may have been published just now by somebody who has another version of the manifest.
        is_others = (
            known is not None
            and known.compare(os.fstat(file.fileno()), shard, self._content_id(shard)) is Match.DIFFERENT
        )
        if is_others or not self._is_current():
            return Flaw.OF_ANOTHER_VERSION
        return self._try_to_quarantine(name, file)

    def _is_of_another_version(self, shard: Shard) -> bool:
        """Whether a file was published as it is now, and not as what the manifest now says."""
        name = shard.data_path
        if not self._cache.is_intact(name):
            return False
        return (
            self._cache.size(name) != shard.nbytes
            or self._cache.compare(shard, self._content_id(shard)) is Match.DIFFERENT
        )

    def _check_free_space(self, shards: Sequence[Shard]) -> None:
        needed = sum(self.nbytes(shard) for shard in shards)
        try:
            check_free_space(self._cache, needed)
        except DiskFullError:
            evict_partials(self._cache, shards)
            check_free_space(self._cache, needed)

    def _checked(self, shard: Shard, known: FileMetadata | None) -> str:
        """What a file of the cache has been checked by, now or when it came."""
        return self._strongest({**shard.digests, **({} if known is None else known.digests)})

    def _strongest(self, digests: Iterable[str]) -> str:
        return "size" if self._verify == "never" else next((kind for kind in _KINDS if kind in digests), "size")

    def _content_id(self, shard: Shard) -> str:
        """What the manifest says of the shard's content; without a digest, that it is of this manifest."""
        return next(iter(shard.digests.values()), f"{self.manifest.name} {self._manifest_digest}")

    def _other_manifests(self) -> Iterator[Manifest]:
        for name in self._cache.manifest_names():
            if name != self.manifest.name and (data := self._cache.read(name, MAX_MANIFEST_BYTES)):
                with contextlib.suppress(ManifestError):  # some other JSON
                    yield parse_manifest(data, name=name, check=self._downloader.cancellation.poll)


def _unreadable(shard: Shard, error: OSError) -> CacheUnavailableError:
    if isinstance(error, CacheUnavailableError):
        return error
    return CacheUnavailableError(
        f"a file of the cache cannot be read: {error.strerror or error}", shard=shard.data_path
    )
