"""Files that are being written: private to their writers, and useful to later ones.

A partial file is opened with ``O_EXCL`` under a random name, so that nobody else ever writes to it, and all its bytes
come from one version of one file on one server. A note beside it says which. An interrupted writer leaves both behind.
The next one copies the bytes into a partial file of its own, and continues from there if the server still has that
version. A small file gets its note only if it is left behind: most are published a moment later.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import threading
from pathlib import Path
from time import monotonic
from typing import BinaryIO

from ...files.folder import Folder, sync
from .growing import GrowingFile
from .hasher import InOrderHasher
from .note import PartialNote, PartialSource, note_name
from .ranges import ByteRanges

__all__ = ["PartialFile", "read_at", "remove_partial"]

#: The most bytes that are written before the note is brought up to date, and so the most that a killed process loses.
_NOTE_BYTES = 4 << 20
#: Seconds between two signs of life of a writer that waits for a server. Others wait for such a sign for much longer.
_TOUCH_SECONDS = 5.0
#: The most bytes that may be there without a note, and so be lost if the process is killed. For a shard of 4 KiB, the
#: note would take a seventh of all system calls.
_MAX_WITHOUT_NOTE = 16 << 10
#: The least bytes that `PartialFile.write_back` writes to the disk.
_WRITE_BACK_BYTES = 32 << 20
#: For systems that cannot read and write at an offset without moving the file's own position.
_position_lock = threading.Lock()


class PartialFile:
    """A file that is being written, private to its writers until it is published.

    Its bytes may come in any order, from several threads.

    Parameters
    ----------
    folder : Folder
        Where it lies.
    name : str
        The flat name of the file that it will become; see `flatten`.
    file_name : str
        Its own name in the folder.
    file : binary file
        Open for reading and writing.

    Attributes
    ----------
    folder, name, file_name, file
    ranges : ByteRanges
        The bytes that have been written.
    furthest : int
        The most bytes that were ever there, before a restart or after it.
    source : PartialSource or None
        Where the bytes come from; None if nobody can continue from them.
    hasher : InOrderHasher
        Computes digests of what has been written.
    growing : GrowingFile or None
        Lets tasks read what has been written; see `let_read`.
    """

    source: PartialSource | None
    _is_noted: bool  # whether there is a note that names the source
    _has_holes: bool  # then the note must say which bytes there are: the size alone does not
    _not_noted: int  # bytes that have been written since the last note
    _not_on_disk: int  # bytes that have been written since the last `write_back`

    def __init__(self, folder: Folder, name: str, file_name: str, file: BinaryIO) -> None:
        self.folder = folder
        self.name = name
        self.furthest = 0
        self.growing: GrowingFile | None = None
        self._lock = threading.Lock()
        self._writing_back = threading.Lock()
        self._touched = 0.0
        self._begin(file_name, file)

    @classmethod
    def open_new(cls, folder: Folder, name: str) -> PartialFile:
        """Create an empty partial file of the file `name`; the caller must close it."""
        return cls(folder, name, *cls._create(folder, name))

    @classmethod
    def open_existing(cls, folder: Folder, name: str, file_name: str) -> PartialFile:
        """Open a partial file without holes again, whose last writer has closed it; the caller must close it.

        Raises
        ------
        FileNotFoundError
            It is gone.
        """
        partial = cls(folder, name, file_name, os.fdopen(folder.open_to_write(file_name), "r+b", buffering=0))
        note, size = PartialNote.read(folder, file_name), os.fstat(partial.file.fileno()).st_size
        if note is not None and note.ranges is None:
            partial.source = note.source
            partial.ranges.add(0, size)
            partial.furthest = size
        return partial

    @property
    def path(self) -> Path:
        """Return its path."""
        return self.folder.path / self.file_name

    @property
    def nbytes(self) -> int:
        """Return how many bytes have been written without a gap, from the beginning."""
        return self.ranges.prefix

    def write(self, data: bytes | memoryview) -> None:
        """Append `data` to the bytes before the first gap, and hash it."""
        start = self.nbytes
        self.write_at(data, start)
        self.hasher.feed(data, start)

    def write_at(self, data: bytes | memoryview, start: int) -> None:
        """Write `data` at an offset, to which no other thread may write."""
        if start != self.nbytes and not self._has_holes:
            with self._lock:
                self._has_holes = True
                self._write_note()  # before the file's size promises more than is there
        elif not self._is_noted and start + len(data) > _MAX_WITHOUT_NOTE:
            with self._lock:
                self._write_note()
        rest, at = memoryview(data), start
        while rest:
            count = _write_at(self.file, rest, at)  # a disk that fills up takes a part first
            rest, at = rest[count:], at + count
        with self._lock:
            self.ranges.add(start, at)
            self.furthest = max(self.furthest, self.ranges.nbytes)
            self._not_noted += len(data)
            self._not_on_disk += len(data)
            if self._has_holes and self._not_noted >= _NOTE_BYTES:
                self._write_note()
        if self.growing is not None:
            self.growing.note_written(start, at)

    def let_read(self, growing: GrowingFile) -> None:
        """Let tasks read what has been written, and what will be, unless they have read from another file."""
        if growing.begin(self.ranges, self.open_reader):
            self.growing = growing

    @property
    def was_read(self) -> bool:
        """Return whether a task has read some of it."""
        return self.growing is not None and self.growing.was_read

    def open_reader(self) -> BinaryIO:
        """Open it for reading."""
        file = self.folder.open(self.file_name)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "a file that is being written is gone", str(self.path))
        return file

    def write_back(self) -> None:
        """Write much of what is only in memory to the disk, if nobody else does, so that publishing takes less time."""
        if self._not_on_disk < _WRITE_BACK_BYTES or not self._writing_back.acquire(blocking=False):
            return
        try:
            self._not_on_disk = 0
            # Through a file object of its own, and without an error: the system reports an error of the disk once to
            # each, and the sync before publishing must see it.
            with contextlib.suppress(OSError), self.folder.open(self.file_name) or contextlib.nullcontext() as file:
                if file is not None and hasattr(os, "fdatasync"):
                    os.fdatasync(file.fileno())
        finally:
            self._writing_back.release()

    def set_source(self, url: str, etag: str, content_id: str, sha256: str | None) -> None:
        """Note where the bytes that are written from now on come from; see `PartialSource`."""
        self.source = PartialSource.of_this_boot(url, etag, content_id, sha256)
        self._is_noted = False

    def ensure_note(self) -> None:
        """Write the note, unless it has been written: from now on, others may rely on the bytes that are there."""
        with self._lock:
            if not self._is_noted:
                self._write_note()

    def keep_with_holes(self, nbytes: int) -> BinaryIO:
        """Keep what was written of a file of `nbytes` bytes, and return it open for reading, with its holes."""
        assert self.source is not None
        with self._lock:
            self._has_holes = True
            self._write_note()  # before the file's size promises more than is there
            self.file.truncate(nbytes)
            sync(self.file.fileno())
            self.source = self.source.synced()
            self._write_note()
        return self.open_reader()

    def keep_prefix(self, nbytes: int) -> None:
        """Throw away all but the first `nbytes` bytes, which must be there; nothing may have been hashed."""
        self.file.truncate(nbytes)
        self.ranges = ByteRanges([(0, nbytes)])
        self.hasher = InOrderHasher(self.ranges, functools.partial(_read_back, self.file, self.path))
        with self._lock:
            self._has_holes = False
            self._write_note()

    def restart(self) -> None:
        """Throw away what was written, and begin a new file, so that no note ever covers bytes of two versions."""
        if self.growing is not None:
            self.growing.stop()
            self.growing = None
        self.delete()
        self.source = None
        self._begin(*self._create(self.folder, self.name))

    def touch(self) -> None:
        """Show others, now and then, that this file is still being written, although nothing comes: see `progress`."""
        if (now := monotonic()) - self._touched > _TOUCH_SECONDS:
            self._touched = now
            with contextlib.suppress(OSError):
                os.utime(self.file.fileno())

    def close(self) -> None:
        """Stop writing, and leave the file to others."""
        is_to_be_noted = self._has_holes or not (self._is_noted or self.file.closed)  # it is closed once published
        with contextlib.suppress(OSError), self._lock:
            if is_to_be_noted and self.ranges and self.folder.status(self.file_name) is not None:
                self._write_note()
        self.file.close()

    def delete(self) -> None:
        """Close and remove the file and its note."""
        self.file.close()
        remove_partial(self.folder, self.file_name)

    def _begin(self, file_name: str, file: BinaryIO) -> None:
        self.file_name = file_name
        self.file = file
        self.ranges = ByteRanges()
        self.source = None
        self.hasher = InOrderHasher(self.ranges, functools.partial(_read_back, file, self.path))
        self._is_noted = self._has_holes = False
        self._not_noted = self._not_on_disk = 0

    @staticmethod
    def _create(folder: Folder, name: str) -> tuple[str, BinaryIO]:
        file_name = f"{name}.{secrets.token_hex(8)}"
        return file_name, os.fdopen(folder.create(file_name), "r+b", buffering=0)

    def _write_note(self) -> None:
        if self.source is not None:
            PartialNote(self.source, self.ranges if self._has_holes else None).write(self.folder, self.file_name)
            self._is_noted, self._not_noted = True, 0


def remove_partial(folder: Folder, file_name: str) -> None:
    """Remove a partial file and its note. A writer that is still at work notices when it publishes."""
    for leftover in (file_name, note_name(file_name)):
        with contextlib.suppress(OSError):
            folder.unlink(leftover)


def read_at(file: BinaryIO, nbytes: int, start: int) -> bytes:
    """Return up to `nbytes` bytes from the offset `start` on; several threads may do so at once."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), nbytes, start)
    with _position_lock:
        file.seek(start)
        return file.read(nbytes)


def _read_back(file: BinaryIO, path: Path, nbytes: int, start: int) -> bytes:
    data = read_at(file, nbytes, start)
    if not data:
        raise OSError(errno.EIO, "a file that is being written was truncated", str(path))
    return data


def _write_at(file: BinaryIO, data: memoryview, start: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file.fileno(), data, start)
    with _position_lock:
        file.seek(start)
        return file.write(data)
