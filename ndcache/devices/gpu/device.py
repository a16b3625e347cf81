"""A GPU, used through wgpu. Every tensor gets a storage buffer of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ...format.manifest import Record, Shard
from ...stats import LoadStats
from ...workers.pool import WorkerPool
from ..base import Device
from ..into import Destination
from ..segments import Segment
from .adapters import adapter_lock, adapter_name, explained_fork, find_adapter
from .buffers import tensor_nbytes
from .lent import check_alive, find_destination, read_bytes_beside
from .limits import check_limits
from .shield import open_call_thread, shielded
from .submission import Fence
from .tensor import GPUTensor
from .translate import translated_errors
from .upload import GpuUpload

if TYPE_CHECKING:
    import wgpu

__all__ = ["GpuDevice", "open_gpu"]


class GpuDevice(Device[GPUTensor]):
    """A `wgpu.GPUDevice`.

    Parameters
    ----------
    handle : wgpu.GPUDevice
    is_ours : bool
        Whether ndcache opened the device, with its adapter's limits. If so, `discard` destroys it.
    """

    needs_serial_thread = True
    segment_bytes = 32 << 20
    cuts_records = True

    def __init__(self, handle: wgpu.GPUDevice, *, is_ours: bool) -> None:
        self.handle = handle
        self.name = f"gpu ({adapter_name(handle.adapter)})"
        self._is_ours = is_ours
        self._fence = Fence(handle)
        self._upload: GpuUpload | None = None

    def check_limits(self, shards: Sequence[Shard], *, decode: bool) -> None:
        sizes = ((shard, record, tensor_nbytes(record, decode=decode)) for shard in shards for record in shard.records)
        check_limits(self.handle, sizes, is_ours=self._is_ours)

    def check_into(
        self, into: Mapping[str, object], shards: Sequence[Shard], *, decode: bool
    ) -> dict[str, Destination]:
        destinations = super().check_into(into, shards, decode=decode)
        if destinations:
            with translated_errors():
                shielded(lambda: check_alive(self.handle, destinations))
        return destinations

    def find_destination(self, record: Record, memory: object, decode: bool) -> Destination:
        return find_destination(self.handle, record, memory, decode=decode)

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
    ) -> GpuUpload:
        with translated_errors():
            kept = shielded(lambda: read_bytes_beside(self.handle, into)) if into else {}
        calls, serial = open_call_thread(), pool.open_serial_queue()
        upload = GpuUpload(
            self.handle,
            self._fence,
            calls,
            serial,
            stats,
            decode=decode,
            memory_limit=memory_limit,
            into=into,
            kept=kept,
        )
        self._upload = upload  # for `discard`, if an interrupt keeps the caller from closing it
        if keeps_all:
            upload.request_buffers(segments)
        return upload

    def discard(self, tensors: dict[str, GPUTensor]) -> None:
        with translated_errors():
            shielded(lambda: self._discard(tensors))

    def warm_up(self) -> None:
        """Make the first submission and wait for it.

        The first submission of a process takes long, and slows down everything else meanwhile: cffi parses the names of
        C types, and the driver initialises. On an H100, 0.13 s here save 0.2 s of the first load. (The shader is not
        made here: not every load needs it, and making it early would save no more time than it takes.)
        """
        with translated_errors():
            self._fence.wait()

    def _discard(self, tensors: dict[str, GPUTensor]) -> None:
        if self._upload is not None:
            self._upload.close()  # does nothing unless an interrupt kept the load from closing it
            self._upload = None
        self._fence.destroy()
        # Not left to the destructors of wgpu's objects, in which Ctrl-C would be lost.
        while tensors:
            tensors.popitem()[1]._release()
        if self._is_ours:
            self.handle.destroy()
            getattr(self.handle, "_release", bool)()
        self.handle = None


def open_gpu(spec: str, poll: Callable[[], None] | None = None) -> GpuDevice | None:
    """Open ``"gpu"`` or ``"gpu:N"``; for ``"auto"`` the first hardware adapter, or return None if there is none.

    Parameters
    ----------
    spec : str
    poll : callable, optional
        Called about every 0.1 s while the driver is busy; an exception that it raises ends the wait.

    Raises
    ------
    NoAdapterError
        There is no such adapter.
    DeviceError
        The adapter's device cannot be opened.
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
    with explained_fork(adapter), translated_errors(), adapter_lock():
        # Without required_limits, the device would have the smallest limits that WebGPU guarantees.
        device = adapter.request_device_sync(
            label="ndcache", required_features=features, required_limits=dict(adapter.limits)
        )
    opened = GpuDevice(device, is_ours=True)
    try:
        opened.warm_up()
    except BaseException:
        opened.discard({})
        raise
    return opened
