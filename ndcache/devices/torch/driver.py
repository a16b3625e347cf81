"""The calls of CUDA that a load makes: pinned memory, streams, events, asynchronous copies.

`DriverApi` calls the driver's library, which every user of CUDA has. A copy costs 3 µs, where PyTorch's own takes 9 and
gives up the interpreter lock several times: with 16 readers, loads are twice as fast (H100). cuda-bindings takes 2 µs,
but comes only with recent versions of PyTorch. `TorchApi` does the same through PyTorch alone, for AMD's GPUs and where
the library cannot be used.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .framework import as_bytes

if TYPE_CHECKING:
    import torch

    from .pinned import Slots

__all__ = ["CudaApi", "DriverApi", "TorchApi", "open_api"]

logger = logging.getLogger("ndcache")

_LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_OUT_OF_MEMORY, _NOT_READY = 2, 600
#: Flags: events that only order work; streams that do not wait for the default stream; memory for all contexts.
_DISABLE_TIMING, _NON_BLOCKING, _PORTABLE = 2, 1, 1
#: Tensors up to this size come out of blocks of this size.
_RESERVED_TENSOR, _RESERVED_BLOCK = 64 << 20, 1 << 30
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
#: The functions that return at once, and so keep the interpreter lock, with their arguments.
_SHORT: dict[str, list[Any]] = {
    "cuCtxPopCurrent_v2": [_POINTER],
    "cuCtxPushCurrent_v2": [_POINTER],
    "cuDeviceGet": [_POINTER, ctypes.c_int],
    "cuEventCreate": [_POINTER, ctypes.c_uint],
    "cuEventDestroy_v2": [_POINTER],
    "cuEventQuery": [_POINTER],
    "cuEventRecord": [_POINTER, _POINTER],
    "cuGetErrorName": [ctypes.c_int, _POINTER],
    "cuGetErrorString": [ctypes.c_int, _POINTER],
    "cuMemcpyHtoDAsync_v2": [ctypes.c_uint64, ctypes.c_uint64, _SIZE, _POINTER],
    "cuStreamWaitEvent": [_POINTER, _POINTER, ctypes.c_uint],
}
#: Those that may take long, and release the interpreter lock meanwhile.
_LONG: dict[str, list[Any]] = {
    "cuDevicePrimaryCtxRetain": [_POINTER, ctypes.c_int],
    "cuEventSynchronize": [_POINTER],
    "cuMemHostRegister_v2": [_POINTER, _SIZE, ctypes.c_uint],
    "cuMemHostUnregister": [_POINTER],
    "cuStreamCreate": [_POINTER, ctypes.c_uint],
    "cuStreamDestroy_v2": [_POINTER],
    "cuStreamSynchronize": [_POINTER],
}


class CudaApi(ABC):
    """The calls of CUDA that a load makes on one device.

    Its methods are called within `active`, except for `caller_stream`, `on` and `reserve`.

    Attributes
    ----------
    device : torch.device
    """

    device: torch.device

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """Return a context in which the calling thread uses this device."""

    @abstractmethod
    def new_stream(self) -> Any: ...

    @abstractmethod
    def new_event(self) -> Any: ...

    @abstractmethod
    def record(self, event: Any, stream: Any) -> None:
        """Let an event happen when the stream has done all that it was given so far."""

    @abstractmethod
    def has_happened(self, event: Any) -> bool:
        """Return whether an event has happened, or was never recorded."""

    @abstractmethod
    def wait(self, event: Any) -> None:
        """Wait until an event has happened."""

    @abstractmethod
    def follow(self, stream: Any, other: Any) -> None:
        """Let what a stream is given from now on wait for all that another one was given so far."""

    @abstractmethod
    def synchronize(self, stream: Any) -> None:
        """Wait until a stream has done all that it was given."""

    @abstractmethod
    def register(self, address: int, nbytes: int) -> None:
        """Pin memory, so that the device can read it by itself."""

    @abstractmethod
    def unregister(self, address: int) -> None: ...

    @abstractmethod
    def copy(self, tensor: torch.Tensor, start: int, slots: Slots, offset: int, nbytes: int, stream: Any) -> None:
        """Copy bytes of pinned memory from `offset` on into the bytes of a contiguous tensor from `start` on."""

    @abstractmethod
    def free_stream(self, stream: Any) -> None: ...

    @abstractmethod
    def free_event(self, event: Any) -> None: ...

    @abstractmethod
    def caller_stream(self) -> Any:
        """Return PyTorch's current stream in this thread."""

    @abstractmethod
    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which PyTorch gives its work to a stream."""

    def reserve(self, sizes: Sequence[int]) -> None:
        """Let PyTorch hold memory for tensors of these sizes in few large blocks, if CUDA has enough.

        512 allocations of 8 MiB take CUDA 16 ms, and 4 of 1 GiB 0.7 ms.
        """
        import torch

        wanted = sum(size for size in sizes if size <= _RESERVED_TENSOR)
        # This is only about speed: some allocators tell nothing, and others may have limits of their own.
        with suppress(RuntimeError):
            held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free, _ = torch.cuda.mem_get_info(self.device)
            if held < wanted and sum(sizes) <= free * 0.9:
                blocks = []  # all at once, so that each has memory of its own
                for start in range(0, wanted, _RESERVED_BLOCK):
                    nbytes = min(_RESERVED_BLOCK, wanted - start)
                    blocks.append(torch.empty(nbytes, dtype=torch.uint8, device=self.device))


class DriverApi(CudaApi):
    """CUDA through the driver's own library.

    Parameters
    ----------
    device : torch.device
    functions : dict of str to callable
    context : int
        The device's primary context, which PyTorch uses, too.
    """

    def __init__(self, device: torch.device, functions: dict[str, Any], context: int) -> None:
        self.device = device
        self._functions = functions
        self._context = context
        self._copy = functions["cuMemcpyHtoDAsync_v2"]

    @contextmanager
    def active(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def new_stream(self) -> int:
        return self._make("cuStreamCreate", _NON_BLOCKING)

    def new_event(self) -> int:
        return self._make("cuEventCreate", _DISABLE_TIMING)

    def caller_stream(self) -> int:
        import torch

        return int(torch.cuda.current_stream(self.device).cuda_stream)

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        import torch

        # An ExternalStream of 0, which is the default stream, would be a new one.
        external = torch.cuda.ExternalStream(stream, device=self.device) if stream else None
        with torch.cuda.stream(external or torch.cuda.default_stream(self.device)):
            yield

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def has_happened(self, event: int) -> bool:
        code = self._functions["cuEventQuery"](event)
        if code not in (0, _NOT_READY):
            raise self._error("cuEventQuery", code)
        return bool(code == 0)

    def wait(self, event: int) -> None:
        self._call("cuEventSynchronize", event)

    def follow(self, stream: int, other: int) -> None:
        event = self.new_event()
        try:
            self.record(event, other)
            self._call("cuStreamWaitEvent", stream, event, 0)
        finally:
            self.free_event(event)  # CUDA frees it when it has happened

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def register(self, address: int, nbytes: int) -> None:
        self._call("cuMemHostRegister_v2", address, nbytes, _PORTABLE)

    def unregister(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)

    def copy(self, tensor: torch.Tensor, start: int, slots: Slots, offset: int, nbytes: int, stream: int) -> None:
        code = self._copy(tensor.data_ptr() + start, slots.address + offset, nbytes, stream)
        if code:
            raise self._error("cuMemcpyHtoDAsync", code)

    def free_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", stream)

    def free_event(self, event: int) -> None:
        self._call("cuEventDestroy_v2", event)

    def _make(self, name: str, flags: int) -> int:
        made = ctypes.c_void_p()
        self._call(name, ctypes.byref(made), flags)
        return made.value or 0

    def _call(self, name: str, *arguments: Any) -> None:
        code = self._functions[name](*arguments)
        if code:
            raise self._error(name, code)

    def _error(self, name: str, code: int) -> RuntimeError:
        return RuntimeError(f"{name}: {_error_text(self._functions, code)}")


class TorchApi(CudaApi):
    """CUDA, or what PyTorch calls so, through PyTorch alone.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def active(self) -> Iterator[None]:
        import torch

        with torch.cuda.device(self.device):
            yield

    def new_stream(self) -> torch.cuda.Stream:
        import torch

        return torch.cuda.Stream(self.device)

    def new_event(self) -> torch.cuda.Event:
        import torch

        return torch.cuda.Event()

    def caller_stream(self) -> torch.cuda.Stream:
        import torch

        return torch.cuda.current_stream(self.device)

    @contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        import torch

        with torch.cuda.stream(stream):
            yield

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        event.record(stream)

    def has_happened(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def follow(self, stream: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
        stream.wait_stream(other)

    def synchronize(self, stream: torch.cuda.Stream) -> None:
        stream.synchronize()

    def register(self, address: int, nbytes: int) -> None:
        import torch

        code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))
        if code:
            raise RuntimeError(f"cudaHostRegister: error {code}")

    def unregister(self, address: int) -> None:
        import torch

        torch.cuda.cudart().cudaHostUnregister(address)

    def copy(
        self, tensor: torch.Tensor, start: int, slots: Slots, offset: int, nbytes: int, stream: torch.cuda.Stream
    ) -> None:
        with self.on(stream):
            as_bytes(tensor)[start : start + nbytes].copy_(slots.tensor[offset : offset + nbytes], non_blocking=True)

    def free_stream(self, stream: torch.cuda.Stream) -> None:
        pass

    def free_event(self, event: torch.cuda.Event) -> None:
        pass


def open_api(device: torch.device) -> CudaApi:
    """Return the driver's API for a device, or PyTorch's if that cannot be used."""
    try:
        return _open_driver(device)
    except (OSError, AttributeError, RuntimeError) as error:
        logger.debug("CUDA is used through PyTorch alone: %s", error)
        return TorchApi(device)


@functools.cache
def _open_driver(device: torch.device) -> DriverApi:
    import torch

    if torch.version.cuda is None:
        raise RuntimeError("this PyTorch was built for other GPUs than NVIDIA's")
    functions: dict[str, Any] = {}
    for library, table in ((ctypes.PyDLL(_LIBRARY), _SHORT), (ctypes.CDLL(_LIBRARY), _LONG)):
        for name, arguments in table.items():
            functions[name] = function = getattr(library, name)
            function.argtypes = arguments
    number, context = ctypes.c_int(), ctypes.c_void_p()
    for name, *arguments in (
        ("cuDeviceGet", ctypes.byref(number), device.index),
        ("cuDevicePrimaryCtxRetain", ctypes.byref(context), number),
    ):
        if code := functions[name](*arguments):
            raise RuntimeError(f"{name}: {_error_text(functions, code)}")
    return DriverApi(device, functions, context.value or 0)


def _error_text(functions: dict[str, Any], code: int) -> str:
    if code == _OUT_OF_MEMORY:
        return "out of memory"
    texts = []
    for name in ("cuGetErrorName", "cuGetErrorString"):
        text = ctypes.c_char_p()
        functions[name](code, ctypes.byref(text))
        texts.append((text.value or b"unknown").decode())
    return f"{texts[0]} ({code}), {texts[1]}"
