"""Staging memory: buffers that the CPU writes while they are mapped, and the GPU copies from when they are not.

On a GPU of its own this memory often lies in the GPU, so that writing to it is the transfer. It is slow to read, and
many threads writing at once are what fills the bus.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import wgpu

__all__ = ["Chunk", "Ring"]

#: Seconds between looks whether a device that does not answer was destroyed.
_LOOK_AFTER = 1.0


class Chunk:
    """One staging buffer, mapped.

    Attributes
    ----------
    buffer : wgpu.GPUBuffer
    view : memoryview
        Its bytes while it is mapped: to be written only, and never after `unmap`.
    """

    def __init__(self, device: wgpu.GPUDevice, nbytes: int) -> None:
        import wgpu

        usage = wgpu.BufferUsage
        self._device = device
        self.buffer = device.create_buffer(size=nbytes, usage=usage.MAP_WRITE | usage.COPY_SRC, mapped_at_creation=True)
        self._is_own = False
        self._open_view()

    def map(self) -> None:
        """Wait until the GPU has copied what it was told to, and map it again."""
        promise = self.buffer.map_async("WRITE")
        if not hasattr(promise, "sync_wait"):  # wgpu 0.26: a coroutine
            promise.close()
            self.buffer.map_sync("WRITE")
            self._open_view()
            return
        # `sync_wait` would wait for ever if the device's owner destroys it now: the thread that polls ends with it.
        arrived = getattr(promise, "_thread_event", None)
        while arrived is not None and not arrived.wait(_LOOK_AFTER):
            if getattr(self._device, "_poller", arrived) is None:
                raise RuntimeError("it was destroyed")
        promise.sync_wait()
        self._open_view()

    def unmap(self) -> None:
        """Hand what was written to the GPU."""
        if self._is_own:
            self.buffer.write_mapped(self.view)
        else:
            del self.view  # it would dangle
        self.buffer.unmap()

    def _open_view(self) -> None:
        # The one place where wgpu gives memory that can be written in place; where it does not, there is a copy more.
        mapped = getattr(self.buffer, "_experimental_get_mapped_range", None)
        if mapped is not None:
            self.view = memoryview(mapped()).cast("B")
        elif not self._is_own:
            self._is_own = True
            self.view = memoryview(bytearray(self.buffer.size))


class Ring:
    """Chunks that go round: written by the workers, submitted by the consumer, mapped again when needed.

    Parameters
    ----------
    device : wgpu.GPUDevice
    limit : int
        Bytes of all together, unless the next shard in turn needs more.
    """

    def __init__(self, device: wgpu.GPUDevice, limit: int) -> None:
        self._device = device
        self._limit = limit
        self._lock = threading.Lock()
        self._submitted: deque[Chunk] = deque()  # the oldest first
        self._all: set[Chunk] = set()
        self._nbytes = 0

    def take(self, nbytes: int) -> Chunk:
        """A mapped chunk of at least `nbytes`. Waits for the GPU at most, never for another thread."""
        size = _size_class(nbytes)
        with self._lock:
            # Memory that was used is ready at once, as copies on the GPU are fast; new one must be cleared first, and
            # across the bus. So a larger one will do, or shards of unlike sizes could not share (benchmarks/gpu.py).
            used = next((chunk for chunk in self._submitted if size <= chunk.buffer.size <= 2 * size), None)
            if used is not None:
                self._submitted.remove(used)
            else:
                self._nbytes += size
                while self._nbytes > self._limit and self._submitted:
                    self._destroy(self._submitted.popleft())
                # What is over the limit now is held by shards that come later, none of which this one may wait for.
        if used is not None:
            used.map()
            return used
        chunk = Chunk(self._device, size)
        self._all.add(chunk)
        return chunk

    def submitted(self, chunk: Chunk) -> None:
        """The GPU has been told to copy from this one."""
        with self._lock:
            self._submitted.append(chunk)

    def destroy(self) -> None:
        """Free all of it; nobody may be at work with it."""
        self._submitted.clear()
        for chunk in list(self._all):
            self._destroy(chunk)

    def _destroy(self, chunk: Chunk) -> None:
        self._all.remove(chunk)
        self._nbytes -= chunk.buffer.size
        chunk.buffer.destroy()  # once the GPU is done with it


def _size_class(nbytes: int) -> int:
    """Rounded up by an eighth at most, so that shards of about the same size can share chunks."""
    step = 1 << max((nbytes - 1).bit_length() - 4, 12)
    return -(-nbytes // step) * step
