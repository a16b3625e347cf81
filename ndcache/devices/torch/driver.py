"""CUDA through the driver's own library, which every user of CUDA has.

A copy costs 3 µs, where PyTorch's own takes 9 and gives up the interpreter lock several times: with 16 readers, loads
are twice as fast (H100). cuda-bindings takes 2 µs, but comes only with recent versions of PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .api import PORTABLE, CudaApi, TorchApi, expand_through_torch
from .expansion import Expansion, load_expansion

if TYPE_CHECKING:
    import torch

    from .pinned import Slots

__all__ = ["DriverApi", "open_api"]

logger = logging.getLogger("ndcache")

_LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_OUT_OF_MEMORY, _NOT_READY = 2, 600
#: Flags: events that only order work; streams that do not wait for the default stream.
_DISABLE_TIMING, _NON_BLOCKING = 2, 1
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
    "cuLaunchKernel": [_POINTER, *[ctypes.c_uint] * 7, _POINTER, _POINTER, _POINTER],
    "cuMemHostGetDevicePointer_v2": [_POINTER, _POINTER, ctypes.c_uint],
    "cuMemcpyHtoDAsync_v2": [ctypes.c_uint64, ctypes.c_uint64, _SIZE, _POINTER],
    "cuStreamWaitEvent": [_POINTER, _POINTER, ctypes.c_uint],
}
#: Those that may take long, and release the interpreter lock meanwhile.
_LONG: dict[str, list[Any]] = {
    "cuDevicePrimaryCtxRetain": [_POINTER, ctypes.c_int],
    "cuEventSynchronize": [_POINTER],
    "cuMemHostRegister_v2": [_POINTER, _SIZE, ctypes.c_uint],
    "cuMemHostUnregister": [_POINTER],
    "cuModuleGetFunction": [_POINTER, _POINTER, ctypes.c_char_p],
    "cuModuleLoadData": [_POINTER, ctypes.c_char_p],
    "cuStreamCreate": [_POINTER, ctypes.c_uint],
    "cuStreamDestroy_v2": [_POINTER],
    "cuStreamSynchronize": [_POINTER],
}


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
        self._expansion: Expansion | None = None
        self._has_tried = False
        self._loading = threading.Lock()  # taken by workers only

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
        self._call("cuMemHostRegister_v2", address, nbytes, PORTABLE)

    def unregister(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)

    def copy(self, tensor: torch.Tensor, start: int, slots: Slots, offset: int, nbytes: int, stream: int) -> None:
        code = self._copy(tensor.data_ptr() + start, slots.address + offset, nbytes, stream)
        if code:
            raise self._error("cuMemcpyHtoDAsync", code)

    def expand(self, tensor: torch.Tensor, start: int, slots: Slots, offset: int, nbytes: int, stream: int) -> None:
        if slots.device_address and (expansion := self._load_expansion()) is not None:
            expansion.launch(slots.device_address + offset, tensor.data_ptr() + start, nbytes // 2, stream)
        else:
            with self.on(stream):
                expand_through_torch(tensor, start, slots, offset, nbytes)

    def device_address(self, address: int) -> int:
        found = ctypes.c_void_p()
        code = self._functions["cuMemHostGetDevicePointer_v2"](ctypes.byref(found), address, 0)
        return 0 if code else found.value or 0

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

    def _load_expansion(self) -> Expansion | None:
        """Return the kernels that expand bfloat16; None if this driver cannot load them."""
        if not self._has_tried:
            with self._loading:
                if not self._has_tried:
                    try:
                        self._expansion = load_expansion(self._call)
                    except RuntimeError as error:
                        logger.debug("PyTorch expands bfloat16, as the driver loads no kernel for it: %s", error)
                    self._has_tried = True
        return self._expansion

    def _error(self, name: str, code: int) -> RuntimeError:
        return RuntimeError(f"{name}: {_error_text(self._functions, code)}")


def open_api(device: torch.device) -> CudaApi:
    """Return the driver's API for a device, or PyTorch's if that cannot be used: for AMD's GPUs, say."""
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
