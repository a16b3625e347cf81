"""CUDA's interface on the CPU, to test what is around it without a GPU."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from ndcache.devices.torch import opening
from ndcache.devices.torch.api import CudaApi
from ndcache.devices.torch.cuda import CudaDevice
from ndcache.devices.torch.framework import as_bytes
from ndcache.devices.torch.memory import Allocator
from ndcache.devices.torch.pinned import Slots


class FakeApi(CudaApi):
    """Streams that make their copies only when something waits for them.

    Attributes
    ----------
    registered : dict of int to int
        The pinned memory: bytes by address.
    can_register : bool
    streams : dict of int to list
        The copies that each stream has still to make.
    reserved : list of int
        The sizes that were reserved.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self.registered: dict[int, int] = {}
        self.can_register = True
        self.streams: dict[int, list[tuple[Any, Any]]] = {0: []}
        self.events: dict[int, int] = {}
        self.reserved: list[int] = []
        self.copied = 0
        self._lock = threading.Lock()
        self._made = 0
        self._active = threading.local()

    @contextmanager
    def active(self) -> Iterator[None]:
        self._active.depth = getattr(self._active, "depth", 0) + 1
        try:
            yield
        finally:
            self._active.depth -= 1

    def new_stream(self) -> int:
        stream = self._number()
        self.streams[stream] = []
        return stream

    def new_event(self) -> int:
        return self._number()

    def record(self, event: int, stream: int) -> None:
        self._check()
        self.events[event] = stream

    def has_happened(self, event: int) -> bool:
        self._check()
        return False

    def wait(self, event: int) -> None:
        if event in self.events:
            self.synchronize(self.events[event])

    def follow(self, stream: int, other: int) -> None:
        self.synchronize(other)

    def synchronize(self, stream: int) -> None:
        self._check()
        with self._lock:
            for target, source in self.streams[stream]:  # as bytes; PyTorch knows nothing of copies of the driver
                stored = source.numpy()
                if target.numel() > source.numel():
                    stored = (stored.copy().view("<u2").astype("<u4") << 16).view("u1")
                target.numpy()[:] = stored
            self.streams[stream].clear()

    def register(self, address: int, nbytes: int) -> None:
        self._check()
        if not self.can_register:
            raise RuntimeError("cuMemHostRegister: not supported")
        self.registered[address] = nbytes

    def unregister(self, address: int) -> None:
        self._check()
        del self.registered[address]

    def copy(self, tensor: Any, start: int, slots: Slots, offset: int, nbytes: int, stream: int) -> None:
        self._add(tensor, start, nbytes, slots.tensor[offset : offset + nbytes], stream)

    def expand(self, tensor: Any, start: int, slots: Slots, offset: int, nbytes: int, stream: int) -> None:
        assert (start % 4, nbytes % 2) == (0, 0)
        self._add(tensor, start, nbytes * 2, slots.tensor[offset : offset + nbytes], stream)

    def free_stream(self, stream: int) -> None:
        assert not self.streams.pop(stream)

    def free_event(self, event: int) -> None:
        self.events.pop(event, None)

    def caller_stream(self) -> int:
        stream: int = getattr(self._active, "stream", 0)
        return stream

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        with self.active():
            self.synchronize(stream)  # what comes in the context comes after what the stream was given
        before, self._active.stream = self.caller_stream(), stream
        try:
            yield
        finally:
            self._active.stream = before

    def reserve(self, sizes: Sequence[int]) -> None:
        self.reserved.extend(sizes)

    def _add(self, tensor: Any, start: int, nbytes: int, source: Any, stream: int) -> None:
        self._check()
        target = as_bytes(tensor)[start : start + nbytes]
        assert target.numel() == nbytes > 0
        with self._lock:
            self.streams[stream].append((target, source))
        self.copied += source.numel()

    def _check(self) -> None:
        assert getattr(self._active, "depth", 0) > 0, "the API is not active in this thread"

    def _number(self) -> int:
        self._check()
        with self._lock:
            self._made += 1
            return self._made


def use_fake_cuda(monkeypatch: pytest.MonkeyPatch, api: FakeApi) -> None:
    """Let a `torch.device` of the CPU be a GPU of CUDA."""
    monkeypatch.setattr(opening, "TorchCpuDevice", lambda handle: CudaDevice(handle, api, "a fake", 1 << 40))


def watch_allocations(monkeypatch: pytest.MonkeyPatch, note: Callable[[], object] = lambda: None) -> Callable[[], int]:
    """Return a function that counts the live ones of all tensors that uploads to CUDA have allocated.

    `note` is called after each allocation, in the thread that makes it.
    """
    found: list[weakref.ref[Any]] = []
    for method in ("_empty", "bytes"):
        original = getattr(Allocator, method)

        def watched(allocator: Allocator, argument: Any, original: Any = original) -> Any:
            tensor = original(allocator, argument)
            found.append(weakref.ref(tensor))
            note()
            return tensor

        monkeypatch.setattr(Allocator, method, watched)

    def count() -> int:
        gc.collect()
        return sum(tensor() is not None for tensor in found)

    return count
