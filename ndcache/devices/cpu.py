"""The CPU: views of mapped shard files, and expanded copies where the format stores bfloat16 for float32."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..files.mapping import map_file
from ..format.codec import decode as decode_record
from ..format.codec import stored
from ..format.manifest import Record, Shard
from ..stats import LoadStats
from ..workers.pool import WorkerPool
from .base import Device
from .reading import check_size, read_shard

__all__ = ["CpuDevice"]

logger = logging.getLogger("ndcache")

#: Shards of one load that are mapped at most: a quarter of the maps that Linux allows a process. Stacks of threads and
#: large arrays need maps, too.
_MAX_MAPS = 16_384

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


class CpuDevice(Device[list[Array], Array]):
    """Gives plain NumPy arrays, which the workers make: several cores expand bfloat16, and touch the new memory."""

    handle = "cpu"
    name = "cpu"

    def prepare(
        self, shards: Sequence[Shard], *, decode: bool, copy: bool, memory_limit: int, stats: LoadStats
    ) -> None:
        self._stats = stats
        self._decode = decode_record if decode else stored
        self._copy = copy
        self._may_map = len(shards) <= _MAX_MAPS

    def begin(self, workers: WorkerPool, *, keeps_all: bool) -> None:
        pass

    def stage(self, file: BinaryIO, shard: Shard) -> list[Array]:
        with self._stats.timed("read", file=shard.data_path):
            data = self._bytes(file, shard)
        with self._stats.timed("decode", file=shard.data_path):
            arrays = [self._decode(record, data) for record in shard.records]
            return [array if array.flags.writeable else array.copy() for array in arrays] if self._copy else arrays

    def _bytes(self, file: BinaryIO, shard: Shard) -> Bytes:
        """Return the shard's bytes as a read-only array: mapped, or else read into memory."""
        check_size(file, shard)  # reading past the end of a map would kill the process
        if self._may_map and shard.nbytes > 0:  # there is no empty map
            try:
                return map_file(file, shard.nbytes)
            except (OSError, ValueError) as error:
                # Some network and FUSE file systems map nothing; a process may have only so many maps.
                self._may_map = False
                logger.debug("shards are read into memory, %s cannot be mapped: %s", shard.data_path, error)
        return read_shard(file, shard)

    def place(self, staged: list[Array], shard: Shard) -> Iterator[tuple[Record, Array]]:
        return zip(shard.records, staged, strict=True)

    def finish(self) -> None:
        pass

    def release(self) -> None:
        pass

    def discard(self, tensors: dict[str, Array]) -> None:
        tensors.clear()  # memory goes with its last reference
