"""Read a shard's file into memory, and refuse a file of the wrong size."""

from __future__ import annotations

import os
import threading
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import SizeMismatchError
from ..format.manifest import Shard

__all__ = ["check_size", "read_into", "read_shard"]

#: Guards the position of a file where the system cannot read at an offset (Windows).
_position_lock = threading.Lock()


def check_size(file: BinaryIO, shard: Shard) -> None:
    """Raise `SizeMismatchError` unless the file has the size in the manifest."""
    size = os.fstat(file.fileno()).st_size
    if size != shard.nbytes:
        raise _wrong_size(file, shard, size)


def read_shard(file: BinaryIO, shard: Shard) -> npt.NDArray[np.uint8]:
    """Return a shard's bytes as a read-only array with memory of its own.

    Raises
    ------
    SizeMismatchError
        The file is too short.
    MemoryError
    """
    try:
        data = np.empty(shard.nbytes, np.uint8)
    except MemoryError as error:
        raise MemoryError(f"no memory for the {shard.nbytes:,} bytes of {shard.data_path}") from error
    read_into(file, 0, data.data, shard)
    data.flags.writeable = False
    return data


def read_into(file: BinaryIO, offset: int, view: memoryview, shard: Shard) -> None:
    """Fill `view` with the file's bytes from `offset` on.

    Raises
    ------
    SizeMismatchError
        The file is too short.
    """
    while view:
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [view], offset)
        else:
            with _position_lock:
                file.seek(offset)
                count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise _wrong_size(file, shard, os.fstat(file.fileno()).st_size)
        offset += count
        view = view[count:]


def _wrong_size(file: BinaryIO, shard: Shard, size: int) -> SizeMismatchError:
    return SizeMismatchError(
        f"{file.name} has {size:,} bytes where the manifest says {shard.nbytes:,}",
        shard=shard.data_path,
        expected=shard.nbytes,
        received=size,
        hint="The file changed during the load; load again.",
    )
