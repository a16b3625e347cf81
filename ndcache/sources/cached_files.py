"""Open shards in the cache, hold them open until their turn comes, and try again after other processes' changes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import BinaryIO

from ..errors import CacheUnavailableError, NdcacheError
from ..files.descriptors import affordable
from ..files.folder import is_gone
from ..format.manifest import Shard
from ..store.directory import ModelDirectory
from ..store.lock import Patience
from ..store.metadata import FileMetadata, Match

__all__ = ["CachedFile", "HeldFiles", "ObtainAttempt", "open_cached", "unreadable"]

#: How many attempts to make at a shard that other processes keep deleting or replacing.
_ATTEMPTS = 5
#: How often to look for a file and the note about it, while other processes keep replacing both.
_LOOKS = 3
#: The least seconds before and between looks at how much of a shard another process has. Most waits are shorter.
_LOOK_SECONDS = 0.25
#: The most files that all loads of this process hold: descriptors are scarce.
_MAX_HELD = 128
#: Free descriptors that there must be for each held file, so that these use a quarter at most.
_FILES_PER_HELD = 4
#: The files that all loads of this process hold.
_all_held: set[BinaryIO] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_all_held.clear)  # the child does not hold its parent's files


@dataclass(frozen=True)
class CachedFile:
    """A shard's file in the cache, open for reading.

    Attributes
    ----------
    file : binary file
    metadata : FileMetadata or None
        The metadata at the time it was opened.
    is_whole : bool
        Whether it is complete. If not, it has the wanted ranges, and holes.
    """

    file: BinaryIO
    metadata: FileMetadata | None = None
    is_whole: bool = True

    def compare(self, shard: Shard, content_id: str) -> Match:
        """Compare the file with the manifest, without reading it; see `FileMetadata.compare`."""
        if self.metadata is None:
            return Match.UNKNOWN
        return self.metadata.compare(os.fstat(self.file.fileno()), shard, content_id)

    def metadata_after_check(self, digests: Mapping[str, str], content_id: str) -> FileMetadata:
        """Return the metadata to note after the file was read and its digests were found right."""
        status, old = os.fstat(self.file.fileno()), self.metadata
        if old is None or not old.is_unchanged(status):
            return FileMetadata.of(status, digests, content_id=content_id)
        new = FileMetadata.of(status, digests, etag=old.etag, last_modified=old.last_modified)
        return replace(new, content_ids=old.content_ids).with_content_id(content_id)


class HeldFiles:
    """Cached files that one load holds open until their turn comes, so that deleting the model does not remove them.

    All loads of the process together hold a limited number of files.
    """

    def __init__(self) -> None:
        self._files: dict[str, CachedFile] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    @staticmethod
    def room() -> int:
        """Return how many more files may be held now."""
        return min(_MAX_HELD - len(_all_held), affordable(_MAX_HELD, _FILES_PER_HELD))

    def hold(self, name: str, cached: CachedFile) -> None:
        """Hold a file until it is taken."""
        self._files[name] = cached
        _all_held.add(cached.file)

    def take(self, name: str) -> CachedFile | None:
        """Return a file if it is held; the caller must close it."""
        cached = self._files.pop(name, None)
        if cached is not None:
            _all_held.discard(cached.file)
        return cached

    def close(self) -> None:
        """Close the files that nobody has taken."""
        for name in list(self._files):
            if (cached := self.take(name)) is not None:
                cached.file.close()


def open_cached(cache: ModelDirectory, shard: Shard) -> CachedFile | None:
    """Open the shard's file in the cache, if it is there and of the right size, and read the note about this file.

    Another process may publish a new file and a new note between the two looks. The new note says nothing about the old
    file, so both are looked at again. If they keep changing, the file counts as one without a note.
    """
    for _ in range(_LOOKS):
        file = cache.open_shard(shard)
        if file is None:
            return None
        try:
            metadata = cache.metadata(shard.data_path)
            if metadata is None or metadata.is_unchanged(os.fstat(file.fileno())):
                return CachedFile(file, metadata)
            if cache.is_published(shard.data_path, file):  # a copy, whose time is not the one that was noted
                return CachedFile(file, metadata)
        except BaseException:
            file.close()
            raise
        file.close()
    file = cache.open_shard(shard)
    return None if file is None else CachedFile(file)


def unreadable(shard: Shard, error: OSError) -> CacheUnavailableError | None:
    """Return the error to raise for a file of the cache that cannot be read; None if `error` is about something else.

    Parameters
    ----------
    shard : Shard
    error : OSError
        An error of the system or of the cache.
    """
    if isinstance(error, NdcacheError):
        return error if isinstance(error, CacheUnavailableError) else None
    failure = CacheUnavailableError(
        f"a file of the cache cannot be read: {error.strerror or error}", shard=shard.data_path
    )
    failure.__cause__ = error
    return failure


class ObtainAttempt:
    """An attempt to obtain a shard, as a context manager that suppresses errors after which there is another attempt.

    Other processes may delete the model, or publish other versions of the shard, at any time.

    Attributes
    ----------
    name : str
        The shard's path.
    is_disturbed : bool
        Whether an error has been suppressed.
    patience : Patience
        How long to wait for somebody else who downloads the shard.
    """

    is_disturbed: bool = False

    def __init__(self, shard: Shard, cache: ModelDirectory) -> None:
        self.name = shard.data_path
        self._shard = shard
        self._cache = cache
        self._version: object = None  # of the file that was there at the beginning
        self._looks = 0  # since the last error
        self._errors = 0
        self._next_count = time.monotonic() + _LOOK_SECONDS
        self._bytes_elsewhere: int | None = None
        self.patience = Patience()

    def is_published(self) -> bool:
        """Return whether another process has published a file since the attempt began."""
        # Some file systems give the same file another time at each look: after some looks, wait for the lock alone.
        return self._looks <= _ATTEMPTS and self._cache.version(self.name) not in (None, self._version)

    def postpone(self) -> None:
        """Note that time passes before the next look."""
        self._looks = 0

    def bytes_elsewhere(self, content_id: str) -> int | None:
        """Return how many bytes somebody else has of the shard, in a partial file of this content; None at first."""
        if (now := time.monotonic()) >= self._next_count:
            self._next_count = now + _LOOK_SECONDS
            self._bytes_elsewhere = self._cache.partials.longest(self._shard, content_id, is_checked=True)
        return self._bytes_elsewhere

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
