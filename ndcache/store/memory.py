"""Hold files in memory that the cache cannot keep, for as long as their load uses them.

A cache may have no place (no home directory), may not be written (a read-only mount, another user's), or may become so
in the middle of a load. Such files go through the same steps as all others (any order of their bytes, digests, one
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
from pathlib import Path
from typing import BinaryIO, cast

from ..errors import CacheUnavailableError, NdcacheError
from ..files.descriptors import check_exhausted, check_shortage
from ..files.folder import Folder
from ..format.manifest import Shard
from .directory import ModelDirectory
from .lock import DownloadLock
from .partial import PartialFile
from .ranges import ByteRanges

__all__ = ["CacheOrMemory"]


class CacheOrMemory(ModelDirectory):
    """A cache directory that gives what it has, and keeps new files as long as it can; after that they go to memory.

    Parameters
    ----------
    directory : pathlib.Path or None
        The model's directory; None if the cache has no place.
    source : str
        Where the files come from, without secrets.
    why_not_kept : str, optional
        Why the cache has no place.
    root, is_private
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
    ) -> None:
        # Nothing lies below a device, and nothing can be made there.
        nowhere = Path(os.devnull, "scope", "model")
        super().__init__(directory or nowhere, source, root=root, is_private=is_private)
        self.why_not_kept = why_not_kept

    def fall_back(self, error: CacheUnavailableError) -> bool:
        self.why_not_kept = self.why_not_kept or str(error)
        # They hold each other, and so the connection of this thread, until the next garbage collection.
        traceback.clear_frames(error.__traceback__)
        return True

    # --- looking up: what may not be read is not there

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

    def open_some(self, shard: Shard, content_id: str, wanted: ByteRanges) -> BinaryIO | None:
        try:
            return super().open_some(shard, content_id, wanted)
        except CacheUnavailableError:
            return None

    # --- writing

    def check_free_space(self, nbytes: int) -> None:
        if self.why_not_kept is None:
            try:
                super().check_free_space(nbytes)
            except CacheUnavailableError as error:
                self.fall_back(error)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[PartialFile]:
        if self.why_not_kept is None:
            with super().part(name) as part:
                yield part
        else:
            with _new_part(name) as part:
                yield part

    def copy_longest_partial(
        self,
        part: PartialFile,
        shard: Shard,
        content_id: str,
        check: Callable[[], None],
        *,
        is_checked: bool,
        is_exclusive: bool,
    ) -> None:
        try:
            super().copy_longest_partial(
                part, shard, content_id, check, is_checked=is_checked, is_exclusive=is_exclusive
            )
        except CacheUnavailableError:
            if not isinstance(part, _PartialInMemory):
                raise  # what others left may not be read, and is not needed

    def acquire_or_wait(
        self, name: str, is_there: Callable[[], bool], sleep: Callable[[float], None]
    ) -> AbstractContextManager[DownloadLock | None]:
        # What is in memory is of no use to anybody else, so nobody waits for it.
        return (
            super().acquire_or_wait(name, is_there, sleep)
            if self.why_not_kept is None
            else contextlib.nullcontext(DownloadLock(False))
        )

    def keep_with_holes(self, part: PartialFile, shard: Shard) -> BinaryIO:
        return (
            part.keep_with_holes(shard.nbytes)
            if isinstance(part, _PartialInMemory)
            else super().keep_with_holes(part, shard)
        )

    def publish(
        self,
        part: PartialFile,
        name: str,
        *,
        etag: str | None = None,
        last_modified: str | None = None,
        content_id: str | None = None,
    ) -> BinaryIO:
        if isinstance(part, _PartialInMemory):
            return part.opened_again()
        return super().publish(part, name, etag=etag, last_modified=last_modified, content_id=content_id)

    def quarantine(self, name: str, file: BinaryIO | None = None) -> None:
        try:
            super().quarantine(name, file)
        except CacheUnavailableError as error:
            self.fall_back(error)  # a good one is used instead, and this one found bad again by the next load


class _PartialInMemory(PartialFile):
    """A partial file without a name. Nobody else can go on from it, so there is no note of what it has."""

    def keep_with_holes(self, nbytes: int) -> BinaryIO:
        self.file.truncate(nbytes)
        return self.opened_again()

    def opened_again(self) -> BinaryIO:
        """Return the file once more, for reading; closing the part leaves it open."""
        return os.fdopen(os.dup(self.file.fileno()), "rb", buffering=0)

    def discard(self) -> None:
        self.file.close()

    def close(self) -> None:
        self.file.close()

    def _create(self) -> BinaryIO:
        return _anonymous_file()

    def _write_note(self) -> None:
        pass


@contextlib.contextmanager
def _new_part(name: str) -> Iterator[PartialFile]:
    part = None
    try:
        part = _PartialInMemory(Folder(Path(os.devnull)), name)
        yield part
    except NdcacheError:
        raise
    except OSError as error:
        check_shortage(error)
        if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG):
            raise MemoryError(f"no memory for {name}, which the cache cannot keep") from error
        raise CacheUnavailableError(f"{name} can neither be kept nor held in memory: {error.strerror}") from error
    finally:
        if part is not None:
            part.close()


def _anonymous_file() -> BinaryIO:
    """Return a new file without a name: in memory, where the system has such, else in the temporary directory."""
    if hasattr(os, "memfd_create"):
        try:
            return os.fdopen(os.memfd_create("ndcache"), "r+b", buffering=0)
        except OSError as error:  # an old kernel, or a container that forbids it
            check_shortage(error)
    try:
        return cast(BinaryIO, tempfile.TemporaryFile(buffering=0))
    except FileNotFoundError:
        check_exhausted()  # "no usable temporary directory", it says then as well
        raise
