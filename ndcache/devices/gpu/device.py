"""A GPU through wgpu: every tensor in a storage buffer of its own."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ...errors import DeviceError, OutOfDeviceMemoryError
from ...format.dtypes import DTYPES
from ...format.manifest import Record, Shard
from ...stats import LoadStats
from ...workers.pool import WorkerPool
from ...workers.serial import SerialQueue
from ...workers.threads import main_thread_has_ended
from ..base import Device
from ..reading import check_size, read_into
from .adapters import adapter_name, find_adapter, one_at_a_time
from .expand import Expander
from .layout import WORD, Piece, padded, pieces
from .limits import check_limits
from .shield import CallThread, shielded
from .staging import Chunk, Ring

if TYPE_CHECKING:
    import wgpu

__all__ = ["GPUTensor", "GpuDevice", "open_gpu"]

#: What is staged at once at most. Shards have 32 MiB at most, unless a single tensor is larger.
_PIECE_BYTES = 33 << 20


class GPUTensor:
    """A tensor in a GPU buffer.

    Attributes
    ----------
    buffer : wgpu.GPUBuffer
        Usage STORAGE | COPY_SRC | COPY_DST; its size is `nbytes` rounded up to a multiple of 4, at least 4, and the
        bytes beyond `nbytes` are 0. Once you have destroyed it, do not read the tensor: wgpu would end the process.
    shape : tuple of int
    dtype : numpy.dtype
        bfloat16 and float8 are those of ml_dtypes.
    nbytes : int
        Bytes of the tensor.
    device : wgpu.GPUDevice
        Where the buffer lives.
    """

    __slots__ = ("_released", "buffer", "device", "dtype", "nbytes", "shape")

    def __init__(
        self,
        buffer: wgpu.GPUBuffer,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        device: wgpu.GPUDevice,
    ) -> None:
        self.buffer = buffer
        self.shape = shape
        self.dtype = dtype
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.device = device
        self._released = False

    def numpy(self) -> npt.NDArray[Any]:
        """A copy of the tensor in the CPU's memory; waits for the GPU.

        Raises
        ------
        ValueError
            The weights that it belongs to are closed.
        DeviceError
        """
        if self._released:
            raise ValueError("the weights of this tensor are closed")  # wgpu would end the process
        if self.nbytes == 0:
            return np.empty(self.shape, self.dtype)
        with _device_errors():
            data = shielded(lambda: self.device.queue.read_buffer(self.buffer, 0, padded(self.nbytes)), undo=_nothing)
        return np.frombuffer(data, np.uint8)[: self.nbytes].view(self.dtype).reshape(self.shape)

    def _release(self) -> None:
        self._released = True
        self.buffer.destroy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("a GPU buffer cannot become an array without a copy")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"GPUTensor(shape={self.shape}, dtype={self.dtype.name}, nbytes={self.nbytes})"


@dataclass(eq=False)
class _Staged:
    """A shard on its way: its tensors' buffers, and the chunks whose bytes go there.

    Attributes
    ----------
    made : Future of list of wgpu.GPUBuffer
        The buffers, in the order of the shard's records.
    chunks : list of tuple
        What was read already, with where it goes.
    rest : list of Piece
        What was not: of a shard that is too large to be staged as a whole.
    file : binary file or None
        Open, to read the rest from.
    """

    made: Future[list[wgpu.GPUBuffer]]
    rest: list[Piece]
    chunks: list[tuple[Chunk, Piece]] = field(default_factory=list)
    file: BinaryIO | None = None


class GpuDevice(Device[_Staged, GPUTensor]):
    """Loads onto a `wgpu.GPUDevice`.

    Workers read files straight into staging memory, while one thread makes the tensors' buffers, as far ahead as it
    may. The consumer has the GPU copy from there, with one submission all that is ready, and expand bfloat16 on the
    way.

    Parameters
    ----------
    handle : wgpu.GPUDevice
    is_ours : bool
        Whether `discard` destroys it, too.
    """

    has_serial = True

    def __init__(self, handle: wgpu.GPUDevice, *, is_ours: bool) -> None:
        import wgpu

        self.handle = handle
        self.name = f"gpu ({adapter_name(handle.adapter)})"
        self._is_ours = is_ours
        usage = wgpu.BufferUsage
        self._usage = usage.STORAGE | usage.COPY_SRC | usage.COPY_DST
        self._ring: Ring | None = None  # while something is loaded, as is `_maker`
        self._maker: SerialQueue | None = None
        self._caller: CallThread | None = None
        self._fence_buffer: wgpu.GPUBuffer | None = None
        self._expander: Expander | None = None
        self._made: dict[str, Future[list[wgpu.GPUBuffer]]] = {}  # by shard, until they are handed out
        self._failure: BaseException | None = None  # why no more of them are made
        self._under_way: set[_Staged] = set()
        self._filled: deque[_Staged] = deque()  # all of whose bytes are in chunks
        # The calls of a submission run no Python, so the caller's thread makes them itself. What they made is kept
        # until a shielded call lets go of it: in a destructor, Ctrl-C would be lost.
        self._submitted: list[Any] = []

    def prepare(
        self, shards: Sequence[Shard], *, decode: bool, copy: bool, memory_limit: int, stats: LoadStats
    ) -> None:
        sizes = (
            (shard, record, math.prod(record.shape) * _dtype(record, decode).itemsize)
            for shard in shards
            for record in shard.records
        )
        check_limits(self.handle, sizes, is_ours=self._is_ours)
        self._shards = shards
        self._stats = stats
        self._decode = decode
        self._memory_limit = memory_limit
        self._piece_bytes = min(_PIECE_BYTES, self.handle.limits["max-buffer-size"] & -WORD, Expander.most(self.handle))

    def begin(self, workers: WorkerPool, *, keeps_all: bool) -> None:
        shielded(self._start_calls)
        self._ring = Ring(self.handle, self._memory_limit)
        # Drivers make one buffer after the other, however many threads ask: one for it leaves the others to read.
        self._maker = workers.open_serial_queue()
        if keeps_all:
            for shard in self._shards:
                self._made[shard.data_path] = self._make(shard)

    def stage(self, file: BinaryIO, shard: Shard) -> _Staged:
        check_size(file, shard)
        todo = list(pieces(shard.records, self._piece_bytes, decode=self._decode))
        with _device_errors():
            if shard.data_path not in self._made:
                self._made[shard.data_path] = self._make(shard)
            staged = _Staged(self._made[shard.data_path], todo)
            self._under_way.add(staged)
            if shard.nbytes <= self._memory_limit or len(todo) == 1:
                while todo:
                    self._fill(staged, file, shard)
                self._filled.append(staged)
            else:
                staged.file = open(os.dup(file.fileno()), "rb", buffering=0)  # noqa: SIM115 - until it is placed
        return staged

    def place(self, staged: _Staged, shard: Shard) -> Iterator[tuple[Record, GPUTensor]]:
        with _device_errors():
            with self._stats.timed("wait_buffers", file=shard.data_path):
                buffers = staged.made.result()
            if self._failure is not None:
                raise self._failure  # no need to wait for the shard whose tensors it is that find no memory
            if staged.chunks:
                self._submit([staged, *self._others_ready(staged)])
            while staged.rest and staged.file is not None:
                self._fill(staged, staged.file, shard)
                self._submit([staged])
        for record in shard.records:
            yield record, GPUTensor(buffers.pop(0), record.shape, _dtype(record, self._decode), self.handle)
        self._end(staged)

    def finish(self) -> None:
        with _device_errors():
            shielded(self._wait_for_queue, undo=_nothing)

    def release(self) -> None:
        shielded(self._release)

    def discard(self, tensors: dict[str, GPUTensor]) -> None:
        with _device_errors():
            shielded(lambda: self._discard(tensors))

    def _start_calls(self) -> None:
        with suppress(RuntimeError):  # The interpreter is about to end, and starts no more threads.
            self._caller = CallThread()

    def _wait_for_queue(self) -> None:
        if self._fence_buffer is None:
            self._fence_buffer = self.handle.create_buffer(size=4, usage=self._usage)
        # The queue works in order: what can be read now was written after all that came before.
        self.handle.queue.read_buffer(self._fence_buffer, 0, 4)

    def _release(self) -> None:
        if self._maker is not None:
            self._maker.cancel()
        self._filled.clear()
        self._submitted.clear()
        for staged in list(self._under_way):
            self._end(staged)
        for made in self._made.values():
            if not made.cancelled() and made.exception() is None:
                for buffer in made.result():
                    buffer.destroy()
        self._made.clear()
        if self._ring is not None:
            self._ring.destroy()
        if self._caller is not None:
            self._caller.end()
            self._caller = None
        if self._expander is not None:
            self._expander.destroy()
            self._expander = None
        if self._fence_buffer is not None:
            self._fence_buffer.destroy()
            self._fence_buffer = None

    def _discard(self, tensors: dict[str, GPUTensor]) -> None:
        self._release()  # unless that has been done: an interrupt may have come just before it
        # Not left to the destructors of wgpu's objects, where Ctrl-C would be lost.
        while tensors:
            tensors.popitem()[1]._release()
        if self._is_ours:
            self.handle.destroy()
            getattr(self.handle, "_release", bool)()
        self.handle = None

    def _make(self, shard: Shard) -> Future[list[wgpu.GPUBuffer]]:
        assert self._maker is not None
        return self._maker.submit(self._make_buffers, shard)

    def _make_buffers(self, shard: Shard) -> list[wgpu.GPUBuffer]:
        if self._failure is not None:
            raise self._failure
        sizes = [math.prod(record.shape) * _dtype(record, self._decode).itemsize for record in shard.records]
        buffers: list[wgpu.GPUBuffer] = []
        with self._stats.timed("buffers", file=shard.data_path, nbytes=sum(sizes)):
            try:
                for nbytes in sizes:
                    buffers.append(self.handle.create_buffer(size=max(padded(nbytes), WORD), usage=self._usage))
            except BaseException as error:
                self._failure = error
                for buffer in buffers:
                    buffer.destroy()
                raise
        return buffers

    def _fill(self, staged: _Staged, file: BinaryIO, shard: Shard) -> None:
        """Read the next piece into a chunk of the ring."""
        ring = self._ring
        assert ring is not None
        piece = staged.rest[0]
        with self._stats.timed("staging", nbytes=piece.nbytes):
            chunk = shielded(lambda: ring.take(max(piece.nbytes, WORD)), thread=self._caller)
        with self._stats.timed("read", file=shard.data_path, nbytes=piece.nbytes):
            for read in piece.reads:
                end = read.at + read.nbytes
                read_into(file, read.offset, chunk.view[read.at : end], shard)
                if read.is_tail:
                    chunk.view[end : read.at + WORD] = bytes(WORD - read.nbytes)
        staged.chunks.append((chunk, piece))
        del staged.rest[0]

    def _others_ready(self, staged: _Staged) -> list[_Staged]:
        """The later shards that can be submitted together with this one: submissions cost more than copies."""
        filled = [self._filled.popleft() for _ in range(len(self._filled))]
        ready = [other for other in filled if other.made.done() and other.made.exception() is None]
        self._filled.extend(other for other in filled if other not in ready)
        return [other for other in ready if other is not staged]

    def _submit(self, shards: Sequence[_Staged]) -> None:
        """Have the GPU copy all that was filled."""
        filled = [(staged, chunk, piece) for staged in shards for chunk, piece in staged.chunks]
        if self._expander is None and any(copy.is_expanded for _, _, piece in filled for copy in piece.copies):
            # The first one of a process takes 0.12 s, in which cffi parses the names of C types: Python that would hold
            # up the threads which begin to read. They have begun by now, and this one has nothing else to do.
            with self._stats.timed("shader"):
                shielded(self._make_expander, thread=self._caller)
        with self._stats.timed("copy", nbytes=sum(piece.nbytes for _, _, piece in filled)):
            self._submit_copies(filled)
        assert self._ring is not None
        for staged in shards:
            for chunk, _ in staged.chunks:
                self._ring.submitted(chunk)
            staged.chunks.clear()

    def _make_expander(self) -> None:
        self._expander = Expander(self.handle, self._piece_bytes)

    def _submit_copies(self, filled: Sequence[tuple[_Staged, Chunk, Piece]]) -> None:
        encoder = self.handle.create_command_encoder()
        for staged, chunk, piece in filled:
            chunk.unmap()
            self._encode(encoder, chunk, piece, staged.made.result())
        commands = encoder.finish()  # raises if the device was lost; to submit something then ends the process
        self._submitted += [encoder, commands]
        self.handle.queue.submit([commands])

    def _encode(
        self,
        encoder: wgpu.GPUCommandEncoder,
        chunk: Chunk,
        piece: Piece,
        buffers: Sequence[wgpu.GPUBuffer],
    ) -> None:
        start, end = piece.expanded
        expander, copy = self._expander, encoder.copy_buffer_to_buffer
        if expander is not None and end:
            self._submitted.append(expander.encode(encoder, chunk.buffer, start, end))
        for part in piece.copies:
            if part.is_expanded:
                assert expander is not None
                copy(expander.expanded, 2 * (part.at - start), buffers[part.record], 2 * part.to, 2 * part.nbytes)
            else:
                copy(chunk.buffer, part.at, buffers[part.record], part.to, part.nbytes)

    def _end(self, staged: _Staged) -> None:
        """Forget it."""
        self._under_way.discard(staged)
        if staged.file is not None:
            staged.file.close()


def open_gpu(spec: str, poll: Callable[[], None] | None = None) -> GpuDevice | None:
    """Open ``"gpu"``, ``"gpu:N"``, or for ``"auto"`` the first real adapter, if any.

    Parameters
    ----------
    spec : str
    look : callable, optional
        Called about every 0.1 s; what it raises ends the wait for the driver.

    Raises
    ------
    NoAdapterError
        No such adapter.
    DeviceError
        The adapter gives no device.
    """
    return shielded(lambda: _open(spec), poll=poll, undo=_close)


def _close(opened: GpuDevice | None) -> None:
    if opened is not None:
        opened.discard({})


def _open(spec: str) -> GpuDevice | None:
    adapter = find_adapter(spec)
    if adapter is None:
        return None
    features = [feature for feature in ("shader-f16",) if feature in adapter.features]
    with _device_errors(), one_at_a_time():
        # Without this, buffers would be held to WebGPU's smallest guaranteed sizes.
        device = adapter.request_device_sync(
            label="ndcache", required_features=features, required_limits=dict(adapter.limits)
        )
    opened = GpuDevice(device, is_ours=True)
    try:
        # What a process does first takes long, and slows down all else meanwhile: cffi parses the names of C types, the
        # driver gets ready. On an H100, 0.13 s for a submission here save 0.2 s of the first load. (The shader is not
        # made here: not every load needs it, and it would save no more than it takes.)
        opened.finish()
    except BaseException:
        opened.discard({})
        raise
    return opened


def _nothing(_: object) -> None:
    """Undo a call that leaves nothing behind."""


def _dtype(record: Record, decode: bool) -> np.dtype[Any]:
    return DTYPES[record.dtype if decode else record.stored_dtype]


@contextmanager
def _device_errors() -> Iterator[None]:
    import wgpu

    try:
        yield
    except wgpu.GPUOutOfMemoryError as error:
        raise OutOfDeviceMemoryError(
            "the device has no memory left", hint="Free some, or load a part with names=."
        ) from error
    except (wgpu.GPUError, RuntimeError, AttributeError) as error:
        if isinstance(error, AttributeError) and error.name != "get_token":
            raise  # Not of wgpu's poller, which is None once the device's owner has destroyed it.
        if main_thread_has_ended() and "new thread" in str(error):  # wgpu has one for each device
            raise DeviceError(
                f"no GPU can be opened, as Python is shutting down: {error}",
                hint="Open it before the main thread ends, or load with device='cpu'.",
            ) from error
        raise DeviceError(f"the device failed: {error}", hint="Load again, or with device='cpu'.") from error
