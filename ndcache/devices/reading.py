"""A shard's file: of the right size, and read into memory that is there."""

from __future__ import annotations

import os
import threading
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import SizeMismatchError
from ..format.manifest import Shard

__all__ = ["check_size", "read_into", "read_shard"]

#: Where there is no way to read at an offset that leaves the file's own position alone.
_one_at_a_time = threading.Lock()


def check_size(file: BinaryIO, shard: Shard) -> None:
    """Raise `SizeMismatchError` unless the file is of the manifest's size."""
    size = os.fstat(file.fileno()).st_size
    if size != shard.nbytes:
        raise _wrong_size(file, shard, size)


def read_shard(file: BinaryIO, shard: Shard) -> npt.NDArray[np.uint8]:
    """Return a shard's bytes as a read-only array in memory of its own.

    Raises
    ------
    SizeMismatchError
        The file ends before.
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
    """Fill `view` with what the file has from `offset` on.

    Raises
    ------
    SizeMismatchError
        The file ends before.
    """
    while view:
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [view], offset)
        else:
            with _one_at_a_time:
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
        hint="It was changed during the load; load again.",
    )
