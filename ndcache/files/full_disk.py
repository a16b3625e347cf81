"""Say which file or folder a disk has no room for."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DiskFullError, NdcacheError

__all__ = ["disk_full", "names_full_disk"]


@contextmanager
def names_full_disk(path: Path) -> Iterator[None]:
    """Raise `DiskFullError` if the disk is full in the block, which writes `path`; name it in errors without a name."""
    try:
        yield
    except OSError as error:
        if isinstance(error, NdcacheError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path) from error
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def disk_full(path: Path, needed: int | None = None, free: int | None = None) -> DiskFullError:
    """Return the error for a disk that has no room for `path`, with the bytes where they are known."""
    detail = "" if needed is None else f": {needed:,} bytes needed, {free:,} free"
    error = DiskFullError(
        f"no room for {path}{detail}",
        expected=needed,
        received=free,
        hint="Nothing of it was kept. Free some space, or choose another disk.",
    )
    error.errno = errno.ENOSPC
    return error
