"""GPUs of CUDA, with torch tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...errors import OutOfDeviceMemoryError
from ...format.manifest import Record, Shard
from ...stats import LoadStats
from ...workers.pool import WorkerPool
from ..base import Device
from ..into import Destination
from ..segments import Segment
from .api import CudaApi
from .framework import check_dtypes, find_destination, note_writes
from .memory import Allocator
from .pinned import PIECE_BYTES
from .upload import CudaUpload

if TYPE_CHECKING:
    import torch

__all__ = ["CudaDevice"]

#: The most workers that read, unless the caller wants more: 12 are 1.02 to 1.17 times as fast as 8 (four machines), and
#: more of them wait longer for the interpreter lock.
_MOST_READERS = 12


class CudaDevice(Device["torch.Tensor"]):
    """A GPU, with tensors that are `torch.Tensor` in memory of PyTorch's own allocator.

    Parameters
    ----------
    handle : torch.device
        With its index.
    api : CudaApi
    name : str
        The GPU's name.
    total_bytes : int
        The GPU's memory.
    """

    segment_bytes = 32 << 20
    cuts_records = True
    completes_late = True

    def __init__(self, handle: torch.device, api: CudaApi, name: str, total_bytes: int) -> None:
        self.handle = handle
        self.name = f"{handle} ({name})"
        self._api = api
        self._total_bytes = total_bytes
        self._upload: CudaUpload | None = None

    def readers(self, workers: int) -> int:
        return max(workers, min(workers * 3 // 2, _MOST_READERS, os.cpu_count() or 1))

    def check_limits(self, shards: Sequence[Shard], *, decode: bool) -> None:
        check_dtypes(self.handle, shards, decode=decode)
        for shard in shards:
            for record in shard.records:
                nbytes = record.nbytes * 2 if decode and record.is_bf16_encoded else record.nbytes
                if nbytes > self._total_bytes:
                    raise OutOfDeviceMemoryError(
                        f"tensor {record.name!r} takes {nbytes:,} bytes, and {self.name} has {self._total_bytes:,}",
                        shard=shard.data_path,
                    )

    def find_destination(self, record: Record, memory: object, decode: bool) -> Destination:
        return find_destination(record, memory, self.handle, decode=decode)

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
    ) -> CudaUpload:
        note_writes(into)
        given = {name: destination.owner for name, destination in into.items()}
        allocator = Allocator(self.handle, segments, given, PIECE_BYTES, decode=decode, copy=copy)
        upload = CudaUpload(self._api, allocator, stats, keeps_all=keeps_all)
        self._upload = upload  # for `discard`, if an interrupt keeps the caller from closing it
        if keeps_all:
            upload.allocate(segments)
        return upload

    def discard(self, tensors: dict[str, torch.Tensor]) -> None:
        if self._upload is not None:
            self._upload.close()  # does nothing unless an interrupt kept the load from closing it
            self._upload = None
        tensors.clear()
