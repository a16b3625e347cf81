"""Kernels that expand bfloat16 to float32 on the device, straight from pinned memory.

They read that memory across the bus, about as fast as a copy does (48 and 49 GB/s with 16 readers, H100). So bfloat16
takes no memory on the device, and no calls of PyTorch, each of which gives up the interpreter lock and then waits for
it among all readers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

__all__ = ["Expansion", "load_expansion"]

_THREADS = 256
#: Values that one thread of the fast kernel expands: 16 bytes of bfloat16.
_VALUES = 8
_ALIGNMENT = 16

_BEGIN = """
.visible .entry {name}(.param .u64 source, .param .u64 target, .param .u64 count)
{{
  .reg .pred %end;
  .reg .b32 %block, %size, %thread, %a<4>, %b<8>;
  .reg .b64 %index, %within, %count, %source, %target, %offset;
  ld.param.u64 %source, [source];
  ld.param.u64 %target, [target];
  ld.param.u64 %count, [count];
  mov.u32 %block, %ctaid.x;
  mov.u32 %size, %ntid.x;
  mov.u32 %thread, %tid.x;
  mul.wide.u32 %index, %block, %size;
  cvt.u64.u32 %within, %thread;
  add.u64 %index, %index, %within;
  setp.ge.u64 %end, %index, %count;
  @%end ret;
"""
#: In PTX, the language that each driver compiles for its device; the first time takes 70 ms (H100), then it is cached.
#: A float32 is the bits of the bfloat16, and 16 zeros. ``expand8`` takes 8 values a thread, at addresses that are
#: multiples of 16. ``expand1`` takes one, at any address.
_PTX = (
    ".version 6.4\n.target sm_52\n.address_size 64\n"
    + _BEGIN.format(name="expand8")
    + """
  shl.b64 %offset, %index, 4;
  add.u64 %source, %source, %offset;
  shl.b64 %offset, %index, 5;
  add.u64 %target, %target, %offset;
  ld.global.v4.u32 {%a0, %a1, %a2, %a3}, [%source];
  shl.b32 %b0, %a0, 16;
  and.b32 %b1, %a0, 0xffff0000;
  shl.b32 %b2, %a1, 16;
  and.b32 %b3, %a1, 0xffff0000;
  shl.b32 %b4, %a2, 16;
  and.b32 %b5, %a2, 0xffff0000;
  shl.b32 %b6, %a3, 16;
  and.b32 %b7, %a3, 0xffff0000;
  st.global.v4.u32 [%target], {%b0, %b1, %b2, %b3};
  st.global.v4.u32 [%target+16], {%b4, %b5, %b6, %b7};
  ret;
}
"""
    + _BEGIN.format(name="expand1")
    + """
  shl.b64 %offset, %index, 1;
  add.u64 %source, %source, %offset;
  shl.b64 %offset, %index, 2;
  add.u64 %target, %target, %offset;
  ld.global.u8 %a0, [%source];
  ld.global.u8 %a1, [%source+1];
  shl.b32 %a0, %a0, 16;
  shl.b32 %a1, %a1, 24;
  or.b32 %a0, %a0, %a1;
  st.global.u32 [%target], %a0;
  ret;
}
"""
)


class Expansion:
    """The kernels, loaded into one context.

    Parameters
    ----------
    call : callable
        Calls a function of the driver by its name, and raises RuntimeError if that fails.
    fast, any_address : int
        Handles of the kernels.
    """

    def __init__(self, call: Callable[..., None], fast: int, any_address: int) -> None:
        self._call = call
        self._fast = fast
        self._any_address = any_address

    def launch(self, source: int, target: int, count: int, stream: int) -> None:
        """Let a stream expand `count` values.

        Parameters
        ----------
        source : int
            The address of the bfloat16 for the device, at any alignment.
        target : int
            The address of the float32.
        count : int
        stream : int
        """
        groups = 0 if (source | target) % _ALIGNMENT else count // _VALUES
        if groups:
            self._launch(self._fast, source, target, groups, stream)
        if rest := count - groups * _VALUES:
            done = groups * _VALUES
            self._launch(self._any_address, source + 2 * done, target + 4 * done, rest, stream)

    def _launch(self, kernel: int, source: int, target: int, threads: int, stream: int) -> None:
        values = (ctypes.c_uint64 * 3)(source, target, threads)
        first = ctypes.addressof(values)
        arguments = (ctypes.c_void_p * 3)(first, first + 8, first + 16)  # the driver copies the values at once
        blocks = -(-threads // _THREADS)
        self._call("cuLaunchKernel", kernel, blocks, 1, 1, _THREADS, 1, 1, 0, stream, arguments, None)


def load_expansion(call: Callable[..., None]) -> Expansion:
    """Load the kernels into the current context, where they stay until the process ends.

    Raises
    ------
    RuntimeError
        The driver cannot compile them.
    """
    module = ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(module), _PTX.encode())
    kernels: list[Any] = []
    for name in (b"expand8", b"expand1"):
        call("cuModuleGetFunction", ctypes.byref(kernel := ctypes.c_void_p()), module, name)
        kernels.append(kernel.value)
    return Expansion(call, *kernels)
