"""The CPU: views of mapped shard files, and expanded copies where the format stores bfloat16 for float32."""

from __future__ import annotations

import errno
import mmap
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..decode import decode as decode_record
from ..decode import stored
from ..manifest import Record, Shard
from ..stats import LoadStats
from ..workers import Workers
from .base import Device
from .reading import check_size

__all__ = ["CpuDevice", "map_shard"]

#: Shards of one load that may stay mapped before Python 3.13, where each map holds a file descriptor of the 1,024 that
#: a process usually has. A model with more shards is read into memory.
_MAX_MAPS = 256

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
        self._map = sys.version_info >= (3, 13) or len(shards) <= _MAX_MAPS

    def begin(self, workers: Workers, *, keeps_all: bool) -> None:
        pass

    def stage(self, file: BinaryIO, shard: Shard) -> list[Array]:
        with self._stats.timed("read", file=shard.data_path):
            data = map_shard(file, shard) if self._map else read_shard(file, shard)
        with self._stats.timed("decode", file=shard.data_path):
            arrays = [self._decode(record, data) for record in shard.records]
            return [array if array.flags.writeable else array.copy() for array in arrays] if self._copy else arrays

    def place(self, staged: list[Array], shard: Shard) -> Iterator[tuple[Record, Array]]:
        return zip(shard.records, staged, strict=True)

    def finish(self) -> None:
        pass

    def release(self) -> None:
        pass

    def discard(self, tensors: dict[str, Array]) -> None:
        tensors.clear()  # memory goes with its last reference


def map_shard(file: BinaryIO, shard: Shard) -> Bytes:
    """The shard's file as a read-only array over its mapped pages.

    Raises
    ------
    SizeMismatchError
        Its size is not the manifest's. Reading past the end of a map would kill the process.
    """
    check_size(file, shard)
    if shard.nbytes == 0:
        return np.empty(0, np.uint8)  # there is no empty map
    if sys.version_info >= (3, 13):
        pages = mmap.mmap(file.fileno(), shard.nbytes, access=mmap.ACCESS_READ, trackfd=False)
    else:
        try:
            pages = mmap.mmap(file.fileno(), shard.nbytes, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            return read_shard(file, shard)  # no descriptor is left to map with, but this one to read from
    return np.frombuffer(pages, np.uint8)


def read_shard(file: BinaryIO, shard: Shard) -> Bytes:
    """The shard's file as a read-only array in memory of its own."""
    check_size(file, shard)
    file.seek(0)
    data = np.fromfile(file, np.uint8, shard.nbytes)
    data.flags.writeable = False
    return data
