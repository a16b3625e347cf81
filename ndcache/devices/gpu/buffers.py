"""The tensors' buffers: their dtypes and sizes, and a thread that makes them before their bytes are read."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...format.manifest import Record
from ...format.numpy_dtypes import TENSOR_DTYPES
from ...stats import LoadStats
from ...workers.serial import Pending, SerialQueue
from ..into import Destination
from ..segments import Segment
from .layout import WORD, round_up

if TYPE_CHECKING:
    import wgpu

__all__ = ["BufferMaker", "tensor_dtype", "tensor_nbytes", "tensor_usage"]


def tensor_dtype(record: Record, *, decode: bool) -> np.dtype[Any]:
    """Return the dtype that a record's tensor has on the device."""
    return TENSOR_DTYPES[record.dtype if decode else record.stored_dtype]


def tensor_nbytes(record: Record, *, decode: bool) -> int:
    """Return the size in bytes that a record's tensor has on the device."""
    return math.prod(record.shape) * tensor_dtype(record, decode=decode).itemsize


def tensor_usage() -> int:
    """Return the usage flags of tensors' buffers."""
    import wgpu

    usage = wgpu.BufferUsage
    return int(usage.STORAGE | usage.COPY_SRC | usage.COPY_DST)


class BufferMaker:
    """Make the buffers of one load's tensors, segment by segment.

    Drivers make one buffer at a time, however many threads ask. So one thread makes them all, and the others can read
    files.

    Parameters
    ----------
    device : wgpu.GPUDevice
    serial : SerialQueue
        Its thread makes the buffers.
    stats : LoadStats
    decode : bool
        Whether float32 stored as bfloat16 is expanded.
    into : mapping of str to Destination
        The tensors for which the caller gave a buffer.

    Attributes
    ----------
    failure : BaseException or None
        The first error. After it, no more buffers are made.
    """

    def __init__(
        self,
        device: wgpu.GPUDevice,
        serial: SerialQueue,
        stats: LoadStats,
        *,
        decode: bool,
        into: Mapping[str, Destination],
    ) -> None:
        self.failure: BaseException | None = None
        self._device = device
        self._serial = serial
        self._stats = stats
        self._decode = decode
        self._into = into
        self._lent = {destination.memory for destination in into.values()}
        self._usage = tensor_usage()
        self._lock = threading.Lock()  # as two workers may begin with the same record
        # By the name of the segment's first record, of which a cut record's parts are the same. (A shard's only segment
        # may have none.)
        self._requested: dict[str | None, Pending[list[wgpu.GPUBuffer]]] = {}

    def request(self, segment: Segment) -> Pending[list[wgpu.GPUBuffer]]:
        """Return the pending buffers of a segment's tensors, in the order of its records.

        The parts of a record share its buffer. The caller must destroy the buffers that it removes from the list,
        unless they are in `into`.
        """
        key = segment.records[0].name if segment.records else None
        with self._lock:
            if key not in self._requested:
                self._requested[key] = self._serial.submit(self._make, segment)
            return self._requested[key]

    def close(self) -> None:
        """Stop, and destroy the buffers that are still in their lists. Call this through `shielded`."""
        self._serial.cancel()
        for pending in self._requested.values():
            pending.wait()
            if pending.error is None:
                self._destroy(pending.result())
        self._requested.clear()

    def _destroy(self, buffers: Iterable[wgpu.GPUBuffer]) -> None:
        for buffer in buffers:
            if buffer not in self._lent:
                buffer.destroy()

    def _make(self, segment: Segment) -> list[wgpu.GPUBuffer]:
        if self.failure is not None:
            raise self.failure
        sizes = {record.name: tensor_nbytes(record, decode=self._decode) for record in segment.records}
        buffers: list[wgpu.GPUBuffer] = []
        with self._stats.timed("buffers", file=segment.shard.data_path, nbytes=sum(sizes.values())):
            try:
                for name, nbytes in sizes.items():
                    if name in self._into:
                        buffers.append(self._into[name].memory)
                    else:
                        buffers.append(self._device.create_buffer(size=max(round_up(nbytes), WORD), usage=self._usage))
            except BaseException as error:
                self.failure = error
                self._destroy(buffers)
                raise
        return buffers
