"""The device of a conversion: it yields the bytes of tensors as they are stored, large ones in several pieces."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..devices.base import Device, Upload
from ..devices.into import Destination, foreign_memory
from ..devices.reading import check_size, read_into, read_records
from ..devices.segments import Segment
from ..format.manifest import Record, Shard
from ..stats import LoadStats
from ..workers.pool import WorkerPool

__all__ = ["Bytes", "PieceDevice"]

Bytes = npt.NDArray[np.uint8]

_LARGE_BYTES = 64 << 10


class PieceDevice(Device[Bytes]):
    """Yield one or more pieces of bytes for each record, in order, as a load yields tensors.

    Files are read, not mapped: what is read counts towards ``memory_limit`` until it is written, and then is freed.
    """

    handle = "cpu"
    name = "cpu"
    segment_bytes = 32 << 20
    cuts_records = True

    def check_limits(self, shards: Sequence[Shard], *, decode: bool) -> None:
        """Do nothing: a target's limits are known to its writer."""

    def find_destination(self, record: Record, memory: object, decode: bool) -> Destination:
        raise foreign_memory(record, memory, "files")

    def open_upload(
        self,
        segments: Sequence[Segment],
        *,
        pool: WorkerPool,
        stats: LoadStats,
        decode: bool,
        copy: bool,
        memory_limit: int,
        keeps_all: bool,
        into: Mapping[str, Destination],
    ) -> PieceUpload:
        return PieceUpload(stats)

    def discard(self, tensors: dict[str, Bytes]) -> None:
        tensors.clear()


class PieceUpload(Upload[list[Bytes], Bytes]):
    """Read segments in the workers."""

    def __init__(self, stats: LoadStats) -> None:
        self._stats = stats

    def stage(self, file: BinaryIO, segment: Segment) -> list[Bytes]:
        shard, records = segment.shard, segment.records
        check_size(file, segment)
        with self._stats.timed("read", file=shard.data_path, nbytes=segment.nbytes):
            if segment.part is not None:
                start, end = segment.part
                piece = _allocate(end - start)
                read_into(file, records[0].byte_offset + start, piece.data, shard)
                return [piece]
            found = read_records(file, records, shard, writable=False, allocate=_allocate)
        return [
            data[record.byte_offset - start : record.byte_offset - start + record.nbytes]
            for record, (data, start) in zip(records, found, strict=True)
        ]

    def place(self, staged: list[Bytes], segment: Segment) -> Iterator[tuple[Record, Any]]:
        """Yield the pieces of a segment; unlike tensors, also those of a record that goes on in the next one."""
        return zip(segment.records, staged, strict=True)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def _allocate(nbytes: int) -> Bytes:
    """Return new memory. If it is large, the system has it back as soon as the array is gone.

    The C library would keep what threads have freed, each thread as much as it once needed.
    """
    if nbytes < _LARGE_BYTES:
        return np.empty(nbytes, np.uint8)
    try:
        return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    except OSError as error:
        raise MemoryError(f"no memory for {nbytes:,} bytes") from error
