"""Submit copies from staging memory to the tensors' buffers, and wait until the GPU has made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...stats import LoadStats
from ...workers.serial import Pending
from .buffers import tensor_usage
from .expand import Expander
from .layout import Batch
from .shield import CallThread, shielded
from .staging import StagingBuffer, StagingRing

if TYPE_CHECKING:
    import wgpu

__all__ = ["Fence", "StagedSegment", "Submitter"]


@dataclass(eq=False)
class StagedSegment:
    """A segment between `Upload.stage` and `Upload.place`: its tensors' buffers, and staging memory with their bytes.

    Attributes
    ----------
    buffers : Pending of list of wgpu.GPUBuffer
        In the order of the segment's records.
    offsets : sequence of int
        Where the tensors begin in these buffers.
    filled : list of tuple
        The staging buffers that hold bytes to be submitted, each with its batch.
    """

    buffers: Pending[list[wgpu.GPUBuffer]]
    offsets: Sequence[int]
    filled: list[tuple[StagingBuffer, Batch]] = field(default_factory=list)


class Submitter:
    """Submit copies from staging memory to the tensors' buffers, expanding bfloat16 on the way.

    Only the caller's thread uses a submitter.

    Parameters
    ----------
    device : wgpu.GPUDevice
    ring : StagingRing
        Receives the staging memory back once its copies are submitted.
    stats : LoadStats
    calls : CallThread or None
        Makes shielded calls.
    batch_bytes : int
        The most bytes of a batch.
    """

    def __init__(
        self, device: wgpu.GPUDevice, ring: StagingRing, stats: LoadStats, calls: CallThread | None, batch_bytes: int
    ) -> None:
        self._device = device
        self._ring = ring
        self._stats = stats
        self._calls = calls
        self._batch_bytes = batch_bytes
        self._expander: Expander | None = None

    def submit(self, segments: Sequence[StagedSegment]) -> None:
        """Submit the copies of all filled batches at once, and give the staging memory back."""
        filled = [(segment, staging, batch) for segment in segments for staging, batch in segment.filled]
        if self._expander is None and any(copy.is_expanded for _, _, batch in filled for copy in batch.copies):
            # The first expander of a process takes 0.12 s, in which cffi parses the names of C types. Made earlier, it
            # would hold up the workers that start to read. Now they are reading, and this thread has nothing to do.
            with self._stats.timed("shader"):
                shielded(self._make_expander, thread=self._calls)
        with self._stats.timed("copy", nbytes=sum(batch.nbytes for _, _, batch in filled)):
            # wgpu calls back from here if a worker's `map` is complete just now.
            shielded(lambda: self._submit_copies(filled), thread=self._calls)
        for segment in segments:
            for staging, _ in segment.filled:
                self._ring.release(staging)
            segment.filled.clear()

    def close(self) -> None:
        """Free the expander's memory. Call this through `shielded`."""
        if self._expander is not None:
            self._expander.destroy()
            self._expander = None

    def _make_expander(self) -> None:
        self._expander = Expander(self._device, self._batch_bytes)

    def _submit_copies(self, filled: Sequence[tuple[StagedSegment, StagingBuffer, Batch]]) -> None:
        encoder = self._device.create_command_encoder()
        for segment, staging, batch in filled:
            staging.unmap()
            self._encode(encoder, staging, batch, segment.buffers.result(), segment.offsets)
        commands = encoder.finish()  # raises if the device was lost; submitting would then end the process
        self._device.queue.submit([commands])

    def _encode(
        self,
        encoder: wgpu.GPUCommandEncoder,
        staging: StagingBuffer,
        batch: Batch,
        buffers: Sequence[wgpu.GPUBuffer],
        offsets: Sequence[int],
    ) -> None:
        start, end = batch.expanded_range
        expander, encode_copy = self._expander, encoder.copy_buffer_to_buffer
        if expander is not None and end:
            expander.encode(encoder, staging.buffer, start, end)
        for copy in batch.copies:
            target, begin = buffers[copy.record_index], offsets[copy.record_index]
            if copy.is_expanded:
                assert expander is not None
                offset = 2 * (copy.staging_offset - start)
                encode_copy(expander.expanded, offset, target, begin + 2 * copy.tensor_offset, 2 * copy.nbytes)
            else:
                encode_copy(staging.buffer, copy.staging_offset, target, begin + copy.tensor_offset, copy.nbytes)


class Fence:
    """Wait until a device has done everything that was submitted to it.

    Parameters
    ----------
    device : wgpu.GPUDevice
    """

    def __init__(self, device: wgpu.GPUDevice) -> None:
        self._device = device
        self._buffer: wgpu.GPUBuffer | None = None

    def wait(self) -> None:
        """Wait for the GPU. Call this through `shielded`."""
        if self._buffer is None:
            self._buffer = self._device.create_buffer(size=4, usage=tensor_usage())
        # The queue works in order, so this read returns after everything submitted before it is done.
        self._device.queue.read_buffer(self._buffer, 0, 4)

    def destroy(self) -> None:
        """Free the buffer that `wait` reads. Call this through `shielded`."""
        if self._buffer is not None:
            self._buffer.destroy()
            self._buffer = None
