"""The CPU: views of mapped shard files, and expanded copies where the format stores float32 as bfloat16."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..files.mapping import map_file
from ..format.codec import decode_record, view_record
from ..format.manifest import Record, Shard
from ..format.numpy_dtypes import TENSOR_DTYPES, dtype_name
from ..stats import LoadStats
from ..workers.pool import WorkerPool
from .base import Device, Upload
from .into import Destination, check_fit, foreign_memory, misfit
from .reading import check_size, read_record, read_records
from .segments import Segment

__all__ = ["CpuDevice", "CpuUpload", "may_map"]

logger = logging.getLogger("ndcache")

#: Loads with more segments than this read files instead of mapping them. It is a quarter of the maps that Linux allows
#: a process, as thread stacks and large arrays need maps, too.
_MAX_MAPS = 16_384
_PAGE = mmap.ALLOCATIONGRANULARITY

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


def may_map(segments: Sequence[Segment]) -> bool:
    """Return whether a load of these segments may map their files: each takes a map."""
    return len(segments) <= _MAX_MAPS


class CpuDevice(Device[Array]):
    """The CPU's memory, with tensors that are plain NumPy arrays."""

    handle = "cpu"
    name = "cpu"
    segment_bytes = 64 << 20
    cuts_records = False  # a tensor is one array over one range of the file
    maps_files = True

    def check_limits(self, shards: Sequence[Shard], *, decode: bool) -> None:
        """Do nothing: memory has no limit for a single tensor."""

    def find_destination(self, record: Record, memory: object, decode: bool) -> Destination:
        if not isinstance(memory, np.ndarray):
            raise foreign_memory(record, memory, "NumPy arrays")
        name = dtype_name(memory.dtype, TENSOR_DTYPES)
        is_little_endian = name is not None and memory.dtype == TENSOR_DTYPES[name]
        check_fit(record, memory.shape, str(name if is_little_endian else memory.dtype), decode=decode)
        if not memory.flags.writeable:
            raise misfit(record, "is read-only")
        if not memory.flags.c_contiguous:
            raise misfit(record, "is not contiguous in C order")
        flat = np.asarray(memory).reshape(-1)
        return Destination(memory, flat, "memory", flat.ctypes.data, flat.nbytes, takes_parts=True)

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
    ) -> CpuUpload:
        return CpuUpload(stats, decode=decode, copy=copy, may_map=may_map(segments), into=into)

    def discard(self, tensors: dict[str, Array]) -> None:
        tensors.clear()  # an array's memory is freed with the last reference to it


class CpuUpload(Upload[list[Array], Array]):
    """Make arrays in the workers, so that several cores share the cost of expanding bfloat16 and of new memory.

    Parameters
    ----------
    stats : LoadStats
    decode, copy, into
        See `Device.open_upload`.
    may_map : bool
        Whether files may be mapped instead of read.
    writable : bool
        Whether views may be written to, which never reaches the file.
    """

    def __init__(
        self,
        stats: LoadStats,
        *,
        decode: bool,
        copy: bool,
        may_map: bool,
        into: Mapping[str, Destination],
        writable: bool = False,
    ) -> None:
        self._stats = stats
        self._expands = decode
        self._decode = decode_record if decode else view_record
        self._copy = copy
        self._may_map = may_map
        self._into = into
        self._writable = writable

    def stage(self, file: BinaryIO, segment: Segment) -> list[Array]:
        if not self._into:
            return self._make_arrays(file, segment, segment.records)
        others = [record for record in segment.records if record.name not in self._into]
        made = iter(self._make_arrays(file, segment, others) if others else ())
        self._fill(file, segment)
        return [self._into[each.name].owner if each.name in self._into else next(made) for each in segment.records]

    def _make_arrays(self, file: BinaryIO, segment: Segment, records: Sequence[Record]) -> list[Array]:
        shard = segment.shard
        with self._stats.timed("read", file=shard.data_path):
            check_size(file, segment)  # reading past the end of a map would kill the process
            pages = self._map(file, segment)
            pieces = (
                read_records(file, records, shard, writable=self._writable) if pages is None else [pages] * len(records)
            )
        with self._stats.timed("decode", file=shard.data_path):
            arrays = [self._decode(record, *piece) for record, piece in zip(records, pieces, strict=True)]
            return [array if array.flags.writeable else array.copy() for array in arrays] if self._copy else arrays

    def _fill(self, file: BinaryIO, segment: Segment) -> None:
        """Read the records that go into memory of the caller's."""
        check_size(file, segment)
        with self._stats.timed("read", file=segment.shard.data_path):
            for record in segment.records:
                if (destination := self._into.get(record.name)) is not None:
                    expand = self._expands and record.is_bf16_encoded
                    read_record(file, record, segment.shard, destination.memory, expand=expand, part=segment.part)

    def place(self, staged: list[Array], segment: Segment) -> Iterator[tuple[Record, Array]]:
        return zip(segment.records, staged, strict=True) if segment.ends_record else iter(())

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _map(self, file: BinaryIO, segment: Segment) -> tuple[Bytes, int] | None:
        """Map the file, or the segment's part of it; return the bytes and the offset of the first, or None."""
        shard, start, end = segment.shard, 0, segment.shard.nbytes
        if len(segment.records) != len(shard.records):
            start = min(record.byte_offset for record in segment.records) // _PAGE * _PAGE
            end = max(record.byte_offset + record.nbytes for record in segment.records)
        if not self._may_map or start >= end:  # no bytes cannot be mapped
            return None
        try:
            return map_file(file, end - start, start, writable=self._writable), start
        except (OSError, ValueError) as error:
            # Some network and FUSE file systems cannot map files, and the number of a process's maps is limited.
            self._may_map = False
            logger.debug("shards are read into memory, as %s cannot be mapped: %s", shard.data_path, error)
            return None
