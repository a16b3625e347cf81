"""The CPU: views of mapped shard files, and expanded copies where the format stores float32 as bfloat16."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..files.mapping import map_file
from ..format.codec import decode_record, view_record
from ..format.manifest import Record, Shard
from ..stats import LoadStats
from ..workers.pool import WorkerPool
from .base import Device, Upload
from .reading import check_size, read_shard
from .segments import Segment

__all__ = ["CpuDevice", "CpuUpload"]

logger = logging.getLogger("ndcache")

#: Loads with more segments than this read files instead of mapping them. It is a quarter of the maps that Linux allows
#: a process, as thread stacks and large arrays need maps, too.
_MAX_MAPS = 16_384

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


class CpuDevice(Device[Array]):
    """The CPU's memory, with tensors that are plain NumPy arrays."""

    handle = "cpu"
    name = "cpu"
    segment_bytes = 64 << 20
    cuts_records = False  # a tensor is one array over one range of the file

    def check_limits(self, shards: Sequence[Shard], *, decode: bool) -> None:
        """Do nothing: memory has no limit for a single tensor."""

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
    ) -> CpuUpload:
        return CpuUpload(stats, decode=decode, copy=copy, may_map=len(segments) <= _MAX_MAPS)

    def discard(self, tensors: dict[str, Array]) -> None:
        tensors.clear()  # an array's memory is freed with the last reference to it


class CpuUpload(Upload[list[Array], Array]):
    """Make arrays in the workers, so that several cores share the cost of expanding bfloat16 and of new memory.

    Parameters
    ----------
    stats : LoadStats
    decode, copy : bool
        See `Device.open_upload`.
    may_map : bool
        Whether files may be mapped instead of read.
    """

    def __init__(self, stats: LoadStats, *, decode: bool, copy: bool, may_map: bool) -> None:
        self._stats = stats
        self._decode = decode_record if decode else view_record
        self._copy = copy
        self._may_map = may_map

    def stage(self, file: BinaryIO, segment: Segment) -> list[Array]:
        shard = segment.shard
        with self._stats.timed("read", file=shard.data_path):
            data = self._map_or_read(file, shard)
        with self._stats.timed("decode", file=shard.data_path):
            arrays = [self._decode(record, data) for record in segment.records]
            return [array if array.flags.writeable else array.copy() for array in arrays] if self._copy else arrays

    def place(self, staged: list[Array], segment: Segment) -> Iterator[tuple[Record, Array]]:
        return zip(segment.records, staged, strict=True)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _map_or_read(self, file: BinaryIO, shard: Shard) -> Bytes:
        """Return the shard's bytes as a read-only array."""
        check_size(file, shard)  # reading past the end of a map would kill the process
        if self._may_map and shard.nbytes > 0:  # an empty file cannot be mapped
            try:
                return map_file(file, shard.nbytes)
            except (OSError, ValueError) as error:
                # Some network and FUSE file systems cannot map files, and the number of a process's maps is limited.
                self._may_map = False
                logger.debug("shards are read into memory, as %s cannot be mapped: %s", shard.data_path, error)
        return read_shard(file, shard)
