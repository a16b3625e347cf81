"""Copy a file: share its blocks where the file system can, else copy the bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["copy_file"]

#: Linux's request to let a file share the blocks of another one until either is written.
_FICLONE = 0x40049409
#: The most bytes to copy at once.
_PIECE_BYTES = 16 << 20


def copy_file(source: BinaryIO, target: BinaryIO, check: Callable[[], None] = lambda: None) -> None:
    """Copy all bytes of `source` into the empty file `target`; call `check`, which may raise, for each piece.

    Nothing may have been written yet. What is later written to one file does not reach the other.
    """
    check()
    if not _share_blocks(source, target):
        source.seek(0)
        while data := source.read(_PIECE_BYTES):
            check()
            rest = memoryview(data)
            while rest:
                rest = rest[target.write(rest) :]


def _share_blocks(source: BinaryIO, target: BinaryIO) -> bool:
    """Return whether the file system has made `target` share the blocks of `source`."""
    if fcntl is None or os.uname().sysname != "Linux":
        return False
    try:
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
    except OSError:  # another file system, or one without shared blocks
        return False
    return True
