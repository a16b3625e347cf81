"""Read records into memory, and refuse a file of the wrong size."""

from __future__ import annotations

import bisect
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import SizeMismatchError
from ..format.manifest import Record, Shard
from ..format.numpy_dtypes import DTYPES
from .segments import Segment

__all__ = ["check_size", "read_into", "read_record", "read_records"]

#: How many values are expanded at a time: so few that they stay in the processor's cache between the two steps.
_EXPANDED_AT_ONCE = 1 << 18
#: Bytes between two records, up to this many, are read with them.
_MAX_GAP = 1 << 16
#: Bytes before the first record of a run are read with it, so that it is aligned in memory as it is in the file.
_ALIGNMENT = 64
#: Guards the position of a file where the system cannot read at an offset (Windows).
_position_lock = threading.Lock()


def check_size(file: BinaryIO, segment: Segment) -> None:
    """Raise `SizeMismatchError` unless the file of a segment has the size in the manifest, or is still downloaded."""
    size = os.fstat(file.fileno()).st_size
    if size != segment.shard.nbytes and not segment.is_early:
        raise _wrong_size(file, segment.shard, size)


def read_records(
    file: BinaryIO,
    records: Sequence[Record],
    shard: Shard,
    *,
    writable: bool,
    allocate: Callable[[int], npt.NDArray[np.uint8]] = lambda nbytes: np.empty(nbytes, np.uint8),
) -> list[tuple[npt.NDArray[np.uint8], int]]:
    """Read records into memory, those that lie next to each other together.

    Parameters
    ----------
    file : binary file
    records : sequence of Record
    shard : Shard
    writable : bool
        Whether the arrays can be written to.
    allocate : callable
        Return an array of uint8, of a number of bytes.

    Returns
    -------
    list of tuple
        For each record, an array that has its bytes, and the offset in the file of the array's first byte.

    Raises
    ------
    SizeMismatchError
        The file is too short.
    MemoryError
    """
    runs: list[list[int]] = []  # start and end of each
    for start, end in sorted((record.byte_offset, record.byte_offset + record.nbytes) for record in records):
        if runs and start <= runs[-1][1] + _MAX_GAP:
            runs[-1][1] = max(runs[-1][1], end)
        else:
            runs.append([start // _ALIGNMENT * _ALIGNMENT, end])
    data = [_read_run(file, start, end, shard, writable, allocate) for start, end in runs]
    starts = [start for start, _ in runs]
    found = [bisect.bisect_right(starts, record.byte_offset) - 1 for record in records]
    return [(data[index], starts[index]) for index in found]


def _read_run(
    file: BinaryIO,
    start: int,
    end: int,
    shard: Shard,
    writable: bool,
    allocate: Callable[[int], npt.NDArray[np.uint8]],
) -> npt.NDArray[np.uint8]:
    try:
        data = allocate(end - start)
    except MemoryError as error:
        raise MemoryError(f"no memory for the {end - start:,} bytes of {shard.data_path}") from error
    read_into(file, start, data.data, shard)
    data.flags.writeable = writable
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


def read_record(
    file: BinaryIO,
    record: Record,
    shard: Shard,
    target: npt.NDArray[Any],
    *,
    expand: bool = False,
    part: tuple[int, int] | None = None,
) -> None:
    """Read a record's values from its shard's file into memory that is there, and allocate none for them.

    Parameters
    ----------
    file : binary file
    record : Record
    shard : Shard
    target : array, shape (values,)
        Contiguous; of the stored dtype or, if the values are expanded, float32.
    expand : bool, default False
        Expand bfloat16 to float32.
    part : tuple of int, optional
        The start and end in the record's stored bytes, if only these are read.

    Raises
    ------
    SizeMismatchError
        The file is too short.
    """
    first, end = part or (0, record.nbytes)
    if not expand:
        read_into(file, record.byte_offset + first, target.view(np.uint8).data[first:end], shard)
        return
    dtype = DTYPES["bfloat16"]
    values = target[first // dtype.itemsize : end // dtype.itemsize]
    scratch = np.empty(min(values.size, _EXPANDED_AT_ONCE), dtype)
    for start in range(0, values.size, _EXPANDED_AT_ONCE):
        stored = scratch[: values.size - start]
        read_into(file, record.byte_offset + first + start * dtype.itemsize, stored.view(np.uint8).data, shard)
        values[start : start + stored.size] = stored


def _wrong_size(file: BinaryIO, shard: Shard, size: int) -> SizeMismatchError:
    name = file.name if isinstance(file.name, str) else "the file"  # the cache's are opened by descriptors
    return SizeMismatchError(
        f"{name} has {size:,} bytes where the manifest says {shard.nbytes:,}",
        shard=shard.data_path,
        expected=shard.nbytes,
        received=size,
        hint="The file changed during the load; load again.",
    )
