"""The CPU, with torch tensors: views of private maps of the shard files, which can be written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...format.codec import decode_record
from ...format.dtypes import TENSOR_SIZES
from ...format.manifest import Record, Shard
from ...format.numpy_dtypes import TENSOR_DTYPES
from ...stats import LoadStats
from ...workers.pool import WorkerPool
from ..base import Device
from ..cpu import CpuDevice, CpuUpload, may_map
from ..into import Destination
from ..segments import Segment
from .framework import as_bytes, check_dtypes, find_destination, note_writes

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
    maps_files = CpuDevice.maps_files

    def __init__(self, handle: torch.device) -> None:
        self.handle = handle
        self.name = str(handle)

    def check_limits(self, shards: Sequence[Shard], *, decode: bool) -> None:
        check_dtypes(self.handle, shards, decode=decode)

    def find_destination(self, record: Record, memory: object, decode: bool) -> Destination:
        import torch

        found = find_destination(record, memory, torch.device("cpu"), decode=decode)  # the handle may have a number
        dtype = TENSOR_DTYPES[record.dtype if decode else record.stored_dtype]
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
        note_writes(into)
        return TorchCpuUpload(stats, decode=decode, copy=copy, may_map=may_map(segments), into=into)

    def discard(self, tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()


class TorchCpuUpload(CpuUpload):
    """Make tensors in the workers, as `CpuUpload` makes arrays.

    Parameters
    ----------
    stats, decode, copy, may_map, into
        See `CpuUpload`.
    """

    def __init__(
        self, stats: LoadStats, *, decode: bool, copy: bool, may_map: bool, into: Mapping[str, Destination]
    ) -> None:
        super().__init__(stats, decode=decode, copy=False, may_map=may_map, into=into, writable=True)
        self._decode = self._make_tensor
        self._copies = copy
        self._dtypes: dict[str, tuple[torch.dtype, int]] = {}  # with the bytes of an element, by the manifest's names

    def close(self) -> None:
        self._decode = decode_record  # a method of this object would keep it until a garbage collection

    def _make_tensor(self, record: Record, data: npt.NDArray[np.uint8], start: int = 0) -> Any:
        """Return a record's tensor, with a storage of its own, of exactly its bytes; see `codec.decode_record`."""
        import torch

        if self._expands and record.is_bf16_encoded and record.nbytes:
            return torch.from_numpy(decode_record(record, data, start))
        name = record.dtype if self._expands else record.stored_dtype
        if name not in self._dtypes:
            self._dtypes[name] = getattr(torch, name), TENSOR_SIZES[name]
        dtype, item_size = self._dtypes[name]
        if record.nbytes == 0:
            return torch.empty(record.shape, dtype=dtype)
        offset = record.byte_offset - start
        # Records are packed without padding, and operations of PyTorch on an unaligned tensor may crash. The data
        # itself begins at a page, or where NumPy allocates memory.
        if self._copies or offset % item_size:
            data, offset = data[offset : offset + record.nbytes].copy(), 0
        flat = torch.frombuffer(data, dtype=dtype, count=record.nbytes // item_size, offset=offset)
        return flat if len(record.shape) == 1 else flat.view(record.shape)
