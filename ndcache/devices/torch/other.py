"""Other devices of PyTorch, such as ``mps``: tensors are made on the CPU, and copied from there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO

from ...format.manifest import Record, Shard
from ...stats import LoadStats
from ...workers.pool import WorkerPool
from ..base import Device, Upload
from ..cpu import CpuDevice, may_map
from ..into import Destination
from ..segments import Segment
from .cpu import TorchCpuUpload
from .framework import check_dtypes, find_destination, translated_errors

if TYPE_CHECKING:
    import torch

__all__ = ["OtherDevice", "OtherUpload"]


class OtherDevice(Device["torch.Tensor"]):
    """Any device to which PyTorch can copy tensors.

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
    ) -> OtherUpload:
        staging = TorchCpuUpload(stats, decode=decode, copy=False, may_map=may_map(segments), into={})
        return OtherUpload(self.handle, staging, into)

    def discard(self, tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()


class OtherUpload(Upload["list[torch.Tensor]", "torch.Tensor"]):
    """Copy the tensors of a `TorchCpuUpload`, on the caller's thread. A copy from the CPU has ended when it returns.

    Parameters
    ----------
    device : torch.device
    staging : TorchCpuUpload
    into : mapping of str to Destination
    """

    def __init__(self, device: torch.device, staging: TorchCpuUpload, into: Mapping[str, Destination]) -> None:
        self._device = device
        self._staging = staging
        self._into = into

    def stage(self, file: BinaryIO, segment: Segment) -> list[torch.Tensor]:
        return self._staging.stage(file, segment)

    def place(self, staged: list[torch.Tensor], segment: Segment) -> Iterator[tuple[Record, torch.Tensor]]:
        import torch

        for record, tensor in zip(segment.records, staged, strict=True):
            destination = self._into.get(record.name)
            with translated_errors(self._device):
                placed = torch.empty_like(tensor, device=self._device) if destination is None else destination.owner
                placed.detach().copy_(tensor)
            yield record, placed

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self._staging.close()
