"""Decide whether cached shards are the ones that the manifest describes."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import BinaryIO

from ..context import LoadContext
from ..errors import CacheError, RemoteChangedError, UnsafeCacheError
from ..format.integrity import find_mismatch, has_right_header
from ..format.manifest import Shard
from ..format.safetensors.headers import is_kept_header
from ..format.strict_json import MAX_KEPT_BYTES
from ..store.directory import ModelDirectory
from ..store.metadata import FileMetadata, Match
from .cached_files import CachedFile, open_cached, unreadable
from .manifests.opened import OpenedManifest
from .model import Flaw, is_shortage

__all__ = ["ShardVerifier"]

#: How often to look at a shard that other processes keep replacing.
_LOOKS = 5
#: The algorithms that a shard can have been checked by, the strongest first.
_ALGORITHMS = ("sha512", "sha384", "sha256", "md5")

logger = logging.getLogger("ndcache")


class ShardVerifier:
    """Compare cached shards with the manifest, and quarantine files with wrong bytes.

    A file that other processes published for another version of the manifest is left alone.

    Parameters
    ----------
    context : LoadContext
    cache : ModelDirectory
    opened : OpenedManifest
        The manifest that the load uses.
    """

    def __init__(self, context: LoadContext, cache: ModelDirectory, opened: OpenedManifest) -> None:
        self._context = context
        self._cache = cache
        self._opened = opened
        self._has_warned = threading.Lock()  # acquired by the thread that warns, once, that no note can be written

    def content_id(self, shard: Shard) -> str:
        """Return what identifies the shard's content: its digest, else the manifest's name and digest."""
        return next(iter(shard.digests.values()), f"{self._opened.manifest.name} {self._opened.digest}")

    def checked_by(self, shard: Shard, metadata: FileMetadata | None) -> str:
        """Return the strongest check that a cached file has passed, now or when it was fetched."""
        return self.strongest({**shard.digests, **({} if metadata is None else metadata.digests)})

    def strongest(self, digests: Iterable[str]) -> str:
        """Return the strongest of some algorithms, or ``"size"``."""
        if not self._context.compares_digests:
            return "size"
        return next((algorithm for algorithm in _ALGORITHMS if algorithm in digests), "size")

    def is_current(self) -> bool:
        """Return whether the cache still has the load's manifest, and not that of an update."""
        return self._cache.has_sha256(self._opened.file, self._opened.digest, MAX_KEPT_BYTES)

    def accepts(self, shard: Shard, cached: CachedFile) -> bool:
        """Return whether a cached file can be used; quarantine one with wrong bytes.

        Digests are computed only if the metadata does not decide it, or if the ``verify`` option demands it.
        """
        match, verify = cached.compare(shard, self.content_id(shard)), self._context.verify
        if match is Match.UNKNOWN and not shard.digests and cached.metadata is None and not self._context.offline:
            return False  # its version is unknown
        if match is Match.DIFFERENT:
            return False  # another version, whose name the new file will take
        if verify == "never" or (verify == "download" and match is Match.SAME):
            return True
        if self._has_right_bytes(shard, cached):
            return True
        self._reject(shard, cached)
        if not self._cache.is_published(shard.data_path, cached.file):
            logger.warning("%s in the cache is not what the manifest says: set aside", shard.data_path)
        return False

    def may_be_right(self, shard: Shard) -> bool:
        """Return whether a cached file of another manifest can be used if the server says that it has not changed.

        For a safetensors file, that alone proves little: the header may come from a server that has the new file, and
        the answer from one that has the old.
        """
        if not self._cache.is_intact(shard.data_path) or (file := self._cache.open_shard(shard)) is None:
            return False
        with file:
            return has_right_header(file, shard)

    @contextlib.contextmanager
    def doubting_headers(self) -> Iterator[None]:
        """If a file has another header than the kept one, let the next load ask for that without a condition.

        Otherwise a server whose ETags do not change with its files would confirm it forever.
        """
        try:
            yield
        except RemoteChangedError:
            file, digest = self._opened.file, self._opened.digest
            metadata = self._cache.metadata(file)
            if is_kept_header(file) and metadata is not None and metadata.digests.get("sha256") == digest:
                self._cache.try_to_remember(file, replace(metadata, digests={}))
            raise

    def check(self, shard: Shard) -> str | Flaw:
        """Read a shard's file and compare it with the manifest; see `Model.check`."""
        try:
            for _ in range(_LOOKS):
                if (found := self._look(shard)) is not None:
                    return found
        except OSError as error:
            failure = unreadable(shard, error)
            if failure is None:
                raise
            if is_shortage(error) or (failure is error and error.errno is None):
                raise failure from failure.__cause__  # it says nothing about the file
            logger.warning("%s in the cache cannot be read: %s", shard.data_path, error.strerror or error)
            return Flaw.BAD_AND_KEPT
        return Flaw.OF_ANOTHER_VERSION  # other processes keep publishing

    def quarantine_if_truncated(self, shard: Shard) -> Flaw | None:
        """Quarantine a file of the wrong size; return None if there is none, or it is of another version."""

        def has_wrong_size() -> bool:
            return self._cache.size(shard.data_path) not in (None, shard.nbytes)

        # The second look is for a file of the right size that another process has published meanwhile.
        is_bad = has_wrong_size() and self.is_current() and not self._is_of_another_version(shard)
        return self._quarantine(shard.data_path) if is_bad and has_wrong_size() else None

    def _look(self, shard: Shard) -> str | Flaw | None:
        """Return what `check` finds; None if the file was replaced or removed while it was read."""
        cached = open_cached(self._cache, shard)
        if cached is not None:
            with cached.file:
                if self._is_of_another_version(shard):
                    return Flaw.OF_ANOTHER_VERSION
                if self._has_right_bytes(shard, cached, self._context.arrivals.reading(shard.data_path)):
                    return self.checked_by(shard, cached.metadata)
                return self._reject(shard, cached)
        size = self._cache.size(shard.data_path)
        if size in (None, shard.nbytes):
            return Flaw.MISSING if size is None else None
        return self.quarantine_if_truncated(shard) or Flaw.OF_ANOTHER_VERSION

    def _has_right_bytes(self, shard: Shard, cached: CachedFile, count: Callable[[int], None] = lambda _: None) -> bool:
        """Compute and compare the digests of a file; note in the cache that they are right, if that was not known."""
        name, content_id = shard.data_path, self.content_id(shard)
        # For a shard without a digest, the server's digest may have been noted when it was fetched.
        expected = dict(shard.digests)
        for algorithm, digest in ({} if cached.metadata is None else cached.metadata.digests).items():
            expected.setdefault(algorithm, digest)
        with self._context.stats.timed("hash", file=name):
            wrong = find_mismatch(cached.file, expected, self._context.cancellation.check, count)
        if wrong is not None and shard.digests and wrong[0] not in shard.digests:
            expected, wrong = dict(shard.digests), None  # the note is wrong, and not the file
        if wrong is not None or not has_right_header(cached.file, shard):
            return False
        if cached.compare(shard, content_id) is not Match.SAME and self._cache.is_published(name, cached.file):
            metadata = cached.metadata_after_check(expected, content_id)
            if not self._cache.try_to_remember(name, metadata) and self._has_warned.acquire(blocking=False):
                logger.warning(
                    "files in %s no longer have the times at which they were fetched, and the cache cannot be written"
                    " to note that they are right: each load computes their digests."
                    " Run `ndcache verify` where it can be written.",
                    self._cache.directory,
                )
        return True

    def _reject(self, shard: Shard, cached: CachedFile) -> Flaw | None:
        """Quarantine a file with wrong bytes, and return its flaw; None if another file has its name by now."""
        name, file = shard.data_path, cached.file
        if not self._cache.is_published(name, file):
            return None
        metadata, status = self._cache.metadata(name), os.fstat(file.fileno())
        # Another process may have published it just now, for another version of the manifest. A file that came with a
        # manifest without digests may be right for that, and only for another version be wrong.
        is_others = metadata is not None and (
            metadata.compare(status, shard, self.content_id(shard)) is Match.DIFFERENT
            or (metadata.is_unchanged(status) and metadata.is_compared_first(shard))
        )
        if is_others or not self.is_current():
            return Flaw.OF_ANOTHER_VERSION
        return self._quarantine(name, file)

    def _quarantine(self, name: str, file: BinaryIO | None = None) -> Flaw:
        try:
            self._cache.quarantine(name, file)
        except UnsafeCacheError:
            raise
        except CacheError as error:  # a cache that cannot be written
            logger.warning("%s in the cache is not what the manifest says, and cannot be set aside: %s", name, error)
            return Flaw.BAD_AND_KEPT
        return Flaw.BAD

    def _is_of_another_version(self, shard: Shard) -> bool:
        """Return whether the file is unchanged since it was published, and yet not the one in the manifest."""
        name = shard.data_path
        if not self._cache.is_intact(name):
            return False
        if self._cache.size(name) != shard.nbytes:
            return True
        return self._cache.compare(shard, self.content_id(shard)) is Match.DIFFERENT
