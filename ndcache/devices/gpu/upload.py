"""The upload of one load to a GPU: from files through staging memory to the tensors' buffers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, BinaryIO

from ...format.manifest import Record
from ...stats import LoadStats
from ...workers.serial import SerialQueue
from ..base import Upload
from ..into import Destination
from ..reading import check_size, read_into
from ..segments import Segment
from .buffers import BufferMaker, tensor_dtype
from .expand import Expander
from .layout import WORD, Batch, plan_batches
from .shield import CallThread, nothing_to_undo, shielded
from .staging import StagingBuffer, StagingRing
from .submission import Fence, StagedSegment, Submitter
from .tensor import GPUTensor
from .translate import translated_errors

if TYPE_CHECKING:
    import wgpu

__all__ = ["GpuUpload"]

#: The most bytes of a batch: a segment, and the space that aligns its tensors.
_BATCH_BYTES = 33 << 20


class GpuUpload(Upload[StagedSegment, GPUTensor]):
    """Upload the segments of one load.

    Workers read files straight into staging memory, while one thread makes the tensors' buffers ahead of them. The
    caller's thread submits the copies from there; each submission takes everything that is ready.

    Parameters
    ----------
    device : wgpu.GPUDevice
    fence : Fence
        The device's fence, whose buffer is freed with this upload.
    calls : CallThread or None
        Makes shielded calls; ends with this upload.
    serial : SerialQueue
        Its thread makes the tensors' buffers.
    stats, decode, memory_limit, into
        See `Device.open_upload`.
    kept : mapping of str to bytes
        The result of `lent.read_bytes_beside`.
    """

    def __init__(
        self,
        device: wgpu.GPUDevice,
        fence: Fence,
        calls: CallThread | None,
        serial: SerialQueue,
        stats: LoadStats,
        *,
        decode: bool,
        memory_limit: int,
        into: Mapping[str, Destination],
        kept: Mapping[str, bytes],
    ) -> None:
        self._device = device
        self._fence = fence
        self._stats = stats
        self._decode = decode
        self._into = into
        self._kept = kept
        self._batch_bytes = min(_BATCH_BYTES, device.limits["max-buffer-size"] & -WORD, Expander.max_bytes(device))
        self._calls = calls
        self._ring = StagingRing(device, memory_limit)
        self._maker = BufferMaker(device, serial, stats, decode=decode, into=into)
        self._submitter = Submitter(device, self._ring, stats, self._calls, self._batch_bytes)
        self._ready: deque[StagedSegment] = deque()  # those that are not submitted yet

    def request_buffers(self, segments: Iterable[Segment]) -> None:
        """Begin to make the buffers of these segments' tensors."""
        for segment in segments:
            self._maker.request(segment)

    def stage(self, file: BinaryIO, segment: Segment) -> StagedSegment:
        check_size(file, segment)
        with translated_errors():
            lent = [self._into.get(record.name) for record in segment.records]
            staged = StagedSegment(self._maker.request(segment), [0 if each is None else each.start for each in lent])
            for batch in plan_batches(segment.records, self._batch_bytes, decode=self._decode, part=segment.part):
                staged.filled.append((self._fill(batch, file, segment), batch))
            self._ready.append(staged)
        return staged

    def place(self, staged: StagedSegment, segment: Segment) -> Iterator[tuple[Record, GPUTensor]]:
        with translated_errors():
            with self._stats.timed("wait_buffers", file=segment.shard.data_path):
                buffers = staged.buffers.result()
            if self._maker.failure is not None:
                raise self._maker.failure  # at once, not only when the segment that failed is placed
            if staged.filled:
                self._submitter.submit([staged, *self._others_ready(staged)])
        if segment.ends_record:
            for record in segment.records:
                buffer, lent = buffers.pop(0), self._into.get(record.name)
                if lent is not None:
                    yield record, lent.owner
                    continue
                dtype = tensor_dtype(record, decode=self._decode)
                yield record, GPUTensor(buffer, record.shape, dtype, self._device)

    def finish(self) -> None:
        with translated_errors():
            shielded(self._fence.wait, undo=nothing_to_undo)

    def close(self) -> None:
        shielded(self._close)

    def _close(self) -> None:
        self._ready.clear()
        self._submitter.close()
        self._maker.close()
        self._ring.destroy()
        if self._calls is not None:
            self._calls.end()
            self._calls = None
        self._fence.destroy()

    def _fill(self, batch: Batch, file: BinaryIO, segment: Segment) -> StagingBuffer:
        """Read a batch into staging memory."""
        ring, shard = self._ring, segment.shard
        with self._stats.timed("staging", nbytes=batch.nbytes):
            staging = shielded(lambda: ring.acquire(max(batch.nbytes, WORD)), thread=self._calls)
        with self._stats.timed("read", file=shard.data_path, nbytes=batch.nbytes):
            for read in batch.reads:
                start, end = read.staging_offset, read.staging_offset + read.nbytes
                read_into(file, read.file_offset, staging.view[start:end], shard)
                if read.is_tail:
                    staging.view[end : start + WORD] = bytes(WORD - read.nbytes)
        if self._kept:
            self._restore_kept(staging, batch, segment)
        return staging

    def _restore_kept(self, staging: StagingBuffer, batch: Batch, segment: Segment) -> None:
        """After the tails of tensors, put the bytes that lie there in the caller's buffers, instead of zeros."""
        for copy in batch.copies:
            record = segment.records[copy.record_index]
            if record.name in self._kept and copy.tensor_offset + copy.nbytes > record.nbytes:
                kept, end = self._kept[record.name], copy.staging_offset + copy.nbytes
                staging.view[end - len(kept) : end] = kept

    def _others_ready(self, staged: StagedSegment) -> list[StagedSegment]:
        """Remove and return the later segments that are ready to be submitted together with this one.

        A submission costs more than a copy.
        """
        candidates = [self._ready.popleft() for _ in range(len(self._ready))]
        ready = [other for other in candidates if other.buffers.is_done and other.buffers.error is None]
        self._ready.extend(other for other in candidates if other not in ready)
        return [other for other in ready if other is not staged]
