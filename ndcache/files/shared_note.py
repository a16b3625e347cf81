"""Notes that the processes of one system read and change in turn."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .folder import Folder

if sys.platform != "win32":
    import fcntl

__all__ = ["HeldNote", "SharedNote"]

_MAX_BYTES = 1 << 16
#: Seconds to wait for others who hold the lock, which they do for less than a millisecond unless they are stopped; and
#: between two attempts.
_PATIENCE, _PAUSE = 0.2, 0.002
#: By folder, whether locks in it were seen to keep others out. On some file systems everybody gets them.
_are_effective: dict[Path, bool] = {}


@dataclass(frozen=True)
class SharedNote:
    """A small JSON object in a file of a folder, which processes read and change in turn.

    It is changed in place, under a lock on the file itself. A process that is killed may leave a damaged note,
    which counts as none. So a note must not hold anything that would be missed.

    Attributes
    ----------
    folder : Folder
    name : str
    """

    folder: Folder
    name: str

    def version(self) -> tuple[int, int, int] | None:
        """Return a value that changes with the note; None if there is none, or it cannot be reached."""
        try:
            status = self.folder.status(self.name)
        except OSError:
            return None
        return None if status is None else (status.st_mtime_ns, status.st_size, status.st_ino)

    @contextlib.contextmanager
    def held(self, *, creates: bool) -> Iterator[HeldNote | None]:
        """Keep others out during the block; yield None if that is impossible.

        It is impossible if there is no file and `creates` is False, if the file is a link or cannot be written, if
        locks do not work, and if somebody does not release the lock.
        """
        handle = None
        with contextlib.suppress(OSError):
            handle = self._open_held(creates)
        if handle is None:
            yield None
            return
        try:
            yield HeldNote(handle)
        finally:
            with contextlib.suppress(OSError):
                _unlock(handle)  # closing is not enough: a process that was forked meanwhile has the file open, too
            os.close(handle)

    def _open_held(self, creates: bool) -> int | None:
        if creates:
            self.folder.make()
        handle = self.folder.open_to_write(self.name, creates=creates)
        try:
            if _lock(handle, _PATIENCE):
                # A file that was removed just now has no link. One with another link may be somebody else's.
                if os.fstat(handle).st_nlink == 1 and self._keeps_others_out():
                    return handle
                _unlock(handle)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        return None

    def _keeps_others_out(self) -> bool:
        """Return whether the lock that is held keeps others out."""
        path = self.folder.path
        if path not in _are_effective:
            other = self.folder.open_to_write(self.name)
            try:
                _are_effective[path] = not _lock(other, 0)
            finally:
                os.close(other)
        return _are_effective[path]


class HeldNote:
    """A shared note during the block in which this process holds it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def read(self) -> dict[str, Any] | None:
        """Return the note; None if it is empty or damaged."""
        try:
            # Others may have written a longer note before, of which the end is still there.
            value = json.loads(os.pread(self._handle, _MAX_BYTES, 0).partition(b"\n")[0])
        except (OSError, ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def write(self, note: Mapping[str, Any]) -> None:
        """Replace the note, unless the disk is full or fails: then it is damaged."""
        with contextlib.suppress(OSError):
            os.pwrite(self._handle, json.dumps(note).encode() + b"\n", 0)


def _lock(handle: int, patience: float) -> bool:
    """Try for some seconds to lock a file; return whether that succeeded."""
    if sys.platform == "win32":
        return False
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(_PAUSE)


def _unlock(handle: int) -> None:
    if sys.platform != "win32":
        fcntl.flock(handle, fcntl.LOCK_UN)
