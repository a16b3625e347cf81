"""Hold files in memory that the cache cannot keep, as long as their load uses them.

A cache may have no place (no home directory), may not be writable (a read-only mount, another user's), or may become
unwritable in the middle of a load. Files then go through the same steps as all others (bytes in any order, digests, one
complete file that is opened for reading), but have no name and are gone when the last user closes or unmaps them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from ..errors import CacheUnavailableError, NdcacheError
from ..files.descriptors import check_exhausted, check_shortage
from ..files.folder import Folder
from ..format.manifest import Shard
from .directory import ModelDirectory
from .lock import DownloadLock, Patience
from .metadata import FileMetadata
from .partials.file import PartialFile
from .partials.folder import PartialFiles
from .partials.ranges import ByteRanges

__all__ = ["FallbackDirectory", "UnwrittenDirectory"]


class FallbackDirectory(ModelDirectory):
    """A model's cache directory that keeps new files as long as it can, and holds them in memory after that.

    Files that are in the directory are used in any case.

    Parameters
    ----------
    directory : pathlib.Path or None
        The model's directory; None if the cache has no place.
    source : str
        Where the files come from, without secrets.
    why_not_kept : str, optional
        Why the cache has no place.
    root, is_private, is_cached
        See `ModelDirectory`.

    Attributes
    ----------
    why_not_kept : str or None
        Why new files go to memory; None as long as they are kept.
    """

    def __init__(
        self,
        directory: Path | None,
        source: str,
        why_not_kept: str | None = None,
        *,
        root: Path | None = None,
        is_private: bool = False,
        is_cached: bool = False,
    ) -> None:
        # Nothing lies below a device, and nothing can be made there.
        nowhere = Path(os.devnull, "scope", "model")
        super().__init__(directory or nowhere, source, root=root, is_private=is_private, is_cached=is_cached)
        self.why_not_kept = why_not_kept
        self.partials = _FallbackPartialFiles(self.layout, lambda: self.why_not_kept is None)

    def fall_back(self, error: CacheUnavailableError) -> bool:
        self.why_not_kept = self.why_not_kept or str(error)
        # The error and its frames refer to each other: this thread's connection would stay until garbage is collected.
        traceback.clear_frames(error.__traceback__)
        return True

    # --- looking up: files that may not be read count as missing

    def _status(self, name: str) -> os.stat_result | None:
        try:
            return super()._status(name)
        except CacheUnavailableError as error:
            self.fall_back(error)
            return None

    def open_shard(self, shard: Shard) -> BinaryIO | None:
        try:
            return super().open_shard(shard)
        except CacheUnavailableError:
            return None

    def read(self, name: str, limit: int) -> bytes | None:
        try:
            return super().read(name, limit)
        except CacheUnavailableError:
            return None

    # --- writing

    def acquire_or_wait(
        self,
        name: str,
        is_there: Callable[[], bool],
        sleep: Callable[[float], None],
        patience: Patience | None = None,
    ) -> AbstractContextManager[DownloadLock | None]:
        if self.why_not_kept is None:
            return super().acquire_or_wait(name, is_there, sleep, patience)
        # A file in memory is of no use to anybody else, so nobody waits for it.
        return contextlib.nullcontext(DownloadLock(is_exclusive=False))

    def publish(
        self,
        partial: PartialFile,
        name: str,
        *,
        etag: str | None = None,
        last_modified: str | None = None,
        content_id: str | None = None,
        syncing: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> BinaryIO:
        if isinstance(partial, MemoryPartialFile):
            return partial.open_reader()
        return super().publish(
            partial, name, etag=etag, last_modified=last_modified, content_id=content_id, syncing=syncing
        )

    def quarantine(self, name: str, file: BinaryIO | None = None) -> None:
        try:
            super().quarantine(name, file)
        except CacheUnavailableError as error:
            self.fall_back(error)  # a good file is used instead, and the next load finds this one bad again


class UnwrittenDirectory(FallbackDirectory):
    """A model's cache directory that is only looked at."""

    def remember(self, name: str, metadata: FileMetadata) -> None:
        pass

    def quarantine(self, name: str, file: BinaryIO | None = None) -> None:
        pass

    def remove(self, name: str) -> None:
        pass


@dataclass(frozen=True)
class _FallbackPartialFiles(PartialFiles):
    """Partial files, created in memory as soon as `is_kept` returns False."""

    is_kept: Callable[[], bool]

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[PartialFile]:
        with super().create(name) if self.is_kept() else _create_in_memory(name) as partial:
            yield partial

    def copy_longest(
        self,
        partial: PartialFile,
        shard: Shard,
        content_id: str,
        check: Callable[[], None],
        *,
        is_checked: bool,
        is_exclusive: bool,
    ) -> None:
        try:
            super().copy_longest(partial, shard, content_id, check, is_checked=is_checked, is_exclusive=is_exclusive)
        except CacheUnavailableError:
            if not isinstance(partial, MemoryPartialFile):
                raise  # a partial file in memory can begin empty

    def open_covering(self, shard: Shard, content_id: str, wanted: ByteRanges) -> BinaryIO | None:
        try:
            return super().open_covering(shard, content_id, wanted)
        except CacheUnavailableError:
            return None


class MemoryPartialFile(PartialFile):
    """A partial file without a name. Nobody else can continue it, so there is no note about it."""

    def write_back(self) -> None:
        pass

    def keep_with_holes(self, nbytes: int) -> BinaryIO:
        self.file.truncate(nbytes)
        return self.open_reader()

    def open_reader(self) -> BinaryIO:
        return os.fdopen(os.dup(self.file.fileno()), "rb", buffering=0)

    def delete(self) -> None:
        self.file.close()

    def close(self) -> None:
        self.file.close()

    @staticmethod
    def _create(folder: Folder, name: str) -> tuple[str, BinaryIO]:
        return name, _anonymous_file()

    def _write_note(self) -> None:
        pass


@contextlib.contextmanager
def _create_in_memory(name: str) -> Iterator[PartialFile]:
    partial = None
    try:
        partial = MemoryPartialFile.open_new(Folder(Path(os.devnull)), name)
        yield partial
    except NdcacheError:
        raise
    except OSError as error:
        check_shortage(error)
        if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG):
            raise MemoryError(f"no memory for {name}, which the cache cannot keep") from error
        raise CacheUnavailableError(f"{name} can neither be kept nor held in memory: {error.strerror}") from error
    finally:
        if partial is not None:
            partial.close()


def _anonymous_file() -> BinaryIO:
    """Create a file without a name: in memory where the system can, else in the temporary directory."""
    if hasattr(os, "memfd_create"):
        try:
            return os.fdopen(os.memfd_create("ndcache"), "r+b", buffering=0)
        except OSError as error:  # an old kernel, or a container that forbids it
            check_shortage(error)
    try:
        return cast(BinaryIO, tempfile.TemporaryFile(buffering=0))
    except FileNotFoundError:
        check_exhausted()  # without descriptors, Python also reports that no temporary directory is usable
        raise
