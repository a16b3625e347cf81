"""Staging memory: buffers that the CPU writes while they are mapped, and the GPU copies from while they are not.

On a discrete GPU this memory often lies in the GPU itself, so that writing to it is the transfer. Reading it is slow,
and it takes many threads that write at once to saturate the bus.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import wgpu

__all__ = ["StagingBuffer", "StagingRing"]

#: Seconds after which a wait for the GPU checks whether the device was destroyed.
_DEVICE_CHECK = 1.0


class StagingBuffer:
    """One staging buffer, mapped from the start.

    Attributes
    ----------
    buffer : wgpu.GPUBuffer
    view : memoryview
        Its bytes while it is mapped. Only write to it, and never after `unmap`.
    """

    def __init__(self, device: wgpu.GPUDevice, nbytes: int) -> None:
        import wgpu

        usage = wgpu.BufferUsage
        self._device = device
        self.buffer = device.create_buffer(size=nbytes, usage=usage.MAP_WRITE | usage.COPY_SRC, mapped_at_creation=True)
        self._is_copied = False  # whether `view` is separate memory that `unmap` copies into the buffer
        self._open_view()

    def map(self) -> None:
        """Wait until the GPU has made the copies that were submitted, and map the buffer again."""
        promise = self.buffer.map_async("WRITE")
        if not hasattr(promise, "sync_wait"):  # wgpu 0.26: a coroutine
            promise.close()
            self.buffer.map_sync("WRITE")
            self._open_view()
            return
        # If the device's owner destroys it now, `sync_wait` would never return: the thread that polls the device ends
        # with it. So wait for the promise's event first, and watch for the end of that thread.
        arrived = getattr(promise, "_thread_event", None)
        while arrived is not None and not arrived.wait(_DEVICE_CHECK):
            if getattr(self._device, "_poller", arrived) is None:
                raise RuntimeError("it was destroyed")
        promise.sync_wait()
        self._open_view()

    def unmap(self) -> None:
        """Hand the written bytes to the GPU."""
        if self._is_copied:
            self.buffer.write_mapped(self.view)
        else:
            del self.view  # it would dangle
        self.buffer.unmap()

    def _open_view(self) -> None:
        # wgpu's only way to write mapped memory in place is experimental. Without it, the bytes are copied once more.
        mapped = getattr(self.buffer, "_experimental_get_mapped_range", None)
        if mapped is not None:
            self.view = memoryview(mapped()).cast("B")
        elif not self._is_copied:
            self._is_copied = True
            self.view = memoryview(bytearray(self.buffer.size))


class StagingRing:
    """Staging buffers in circulation: workers fill them, the caller's thread submits copies, workers fill them again.

    Parameters
    ----------
    device : wgpu.GPUDevice
    limit : int
        The most bytes of all buffers together. The next segment in manifest order may exceed it.
    """

    def __init__(self, device: wgpu.GPUDevice, limit: int) -> None:
        self._device = device
        self._limit = limit
        self._lock = threading.Lock()
        self._submitted: deque[StagingBuffer] = deque()  # the oldest first
        self._all: set[StagingBuffer] = set()
        self._nbytes = 0

    def acquire(self, nbytes: int) -> StagingBuffer:
        """Return a mapped buffer of at least `nbytes`. This may wait for the GPU, but never for another thread."""
        size = _size_class(nbytes)
        with self._lock:
            # A used buffer is ready at once, as copies on the GPU are fast; a new one must first be cleared, across the
            # bus. So a used one may be larger than needed. Otherwise segments of different sizes could not share
            # buffers (benchmarks/gpu.py).
            used = next((each for each in self._submitted if size <= each.buffer.size <= 2 * size), None)
            if used is not None:
                self._submitted.remove(used)
            else:
                self._nbytes += size
                while self._nbytes > self._limit and self._submitted:
                    self._destroy(self._submitted.popleft())
                # If that is still over the limit, later segments hold the rest, and this one must not wait for them.
        if used is not None:
            used.map()
            return used
        new = StagingBuffer(self._device, size)
        self._all.add(new)
        return new

    def release(self, staging: StagingBuffer) -> None:
        """Take back a buffer whose copies have been submitted."""
        with self._lock:
            self._submitted.append(staging)

    def destroy(self) -> None:
        """Free all buffers. No thread may use them any more."""
        self._submitted.clear()
        for staging in list(self._all):
            self._destroy(staging)

    def _destroy(self, staging: StagingBuffer) -> None:
        self._all.remove(staging)
        self._nbytes -= staging.buffer.size
        staging.buffer.destroy()  # takes effect once the GPU is done with it


def _size_class(nbytes: int) -> int:
    """Round up, by at most an eighth, so that segments of about the same size can share buffers."""
    step = 1 << max((nbytes - 1).bit_length() - 4, 12)
    return -(-nbytes // step) * step
