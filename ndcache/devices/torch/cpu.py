"""The CPU, with torch tensors: views of private maps of the shard files, which can be written to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ...format.manifest import Record, Shard
from ...format.numpy_dtypes import DTYPES
from ...stats import LoadStats
from ...workers.pool import WorkerPool
from ..base import Device, Upload
from ..cpu import Array, CpuDevice, CpuUpload, may_map
from ..into import Destination
from ..segments import Segment
from .library import as_bytes, check_dtypes, find_destination, tensor_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["TorchCpuDevice", "TorchCpuUpload"]


class TorchCpuDevice(Device["torch.Tensor"]):
    """The CPU's memory, with tensors that are `torch.Tensor`.

    PyTorch has no read-only tensors: an operation in place on a read-only map would end the process. So files are
    mapped privately. Whatever is written to a tensor stays in this process, page by page.

    Parameters
    ----------
    handle : torch.device
    """

    segment_bytes = CpuDevice.segment_bytes
    cuts_records = CpuDevice.cuts_records

    def __init__(self, handle: torch.device) -> None:
        self.handle = handle
        self.name = str(handle)

    def check_limits(self, shards: Sequence[Shard], *, decode: bool) -> None:
        check_dtypes(self.handle, shards, decode=decode)

    def find_destination(self, record: Record, memory: object, decode: bool) -> Destination:
        import torch

        found = find_destination(record, memory, torch.device("cpu"), decode=decode)  # the handle may have a number
        dtype = DTYPES[record.dtype if decode else record.stored_dtype]
        return replace(found, memory=as_bytes(found.owner).numpy().view(dtype), takes_parts=True)

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
    ) -> TorchCpuUpload:
        return TorchCpuUpload(stats, decode=decode, copy=copy, may_map=may_map(segments), into=into)

    def discard(self, tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()


class TorchCpuUpload(Upload["list[torch.Tensor]", "torch.Tensor"]):
    """Make tensors of the arrays that a `CpuUpload` makes, in the workers.

    Parameters
    ----------
    stats, decode, copy, may_map, into
        See `CpuUpload`.
    """

    def __init__(
        self, stats: LoadStats, *, decode: bool, copy: bool, may_map: bool, into: Mapping[str, Destination]
    ) -> None:
        self._arrays = CpuUpload(stats, decode=decode, copy=False, may_map=may_map, into=into, writable=True)
        self._into = into
        self._decode = decode
        self._copy = copy

    def stage(self, file: BinaryIO, segment: Segment) -> list[torch.Tensor]:
        arrays = self._arrays.stage(file, segment)
        return [self._tensor(record, array) for record, array in zip(segment.records, arrays, strict=True)]

    def place(self, staged: list[torch.Tensor], segment: Segment) -> Iterator[tuple[Record, torch.Tensor]]:
        return zip(segment.records, staged, strict=True) if segment.ends_record else iter(())

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _tensor(self, record: Record, array: Array) -> torch.Tensor:
        import torch

        if record.name in self._into:
            owner: torch.Tensor = self._into[record.name].owner
            return owner
        is_view = not (self._decode and record.is_bf16_encoded)
        # Records are packed without padding, and an operation of PyTorch on an unaligned tensor may crash.
        if is_view and (self._copy or not array.flags.aligned):
            array = array.copy()
        # By way of bytes, as PyTorch knows nothing of the dtypes of ml_dtypes. Each tensor has a storage of its own, of
        # exactly its bytes.
        values = torch.from_numpy(array.reshape(-1).view(np.uint8))
        return values.view(tensor_dtype(record, decode=self._decode)).view(record.shape)
