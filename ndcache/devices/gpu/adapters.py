"""Which GPUs there are, and which of them a name means."""

from __future__ import annotations

import glob
import inspect
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...errors import DeviceError, NoAdapterError

if TYPE_CHECKING:
    import wgpu

__all__ = ["adapter_name", "adapters", "find_adapter", "is_software", "one_at_a_time"]

#: Of several ways to one adapter, the first of these.
_BACKENDS = ("Vulkan", "Metal", "D3D12", "OpenGL")
_ADAPTER_TYPES = ("DiscreteGPU", "IntegratedGPU", "VirtualGPU", "Unknown", "CPU")
#: What Linux has where there is a GPU, whether or not a driver for Vulkan is installed.
_GPU_FILES = ("/dev/dri/renderD*", "/dev/nvidia[0-9]*", "/dev/dxg")

#: In a list, so that a fork can have another one.
_lock = [threading.Lock()]
#: The adapters of this process, once some were found. They are kept: to list them takes milliseconds each time, makes
#: some drivers print lines, and is not safe (see `_list_adapters`), nor is dropping them.
_known: list[wgpu.GPUAdapter] = []
#: Those of them that were listed before this process was forked.
_from_parent: list[wgpu.GPUAdapter] = []


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one thread of ours at a time list adapters or open one in the block."""
    with _lock[0]:
        yield


def _begin_child() -> None:
    _lock[0] = threading.Lock()  # The thread that held the other one is not there.
    _from_parent.extend(_known)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)


def adapters() -> list[wgpu.GPUAdapter]:
    """Return the adapters there are: real ones before software ones, each by its best backend only.

    They are listed once in a process, unless there are none.

    Raises
    ------
    NoAdapterError
        wgpu itself cannot be loaded.
    """
    try:
        import wgpu  # noqa: F401
    except (ImportError, OSError) as error:
        raise NoAdapterError(
            f"wgpu cannot be loaded: {error}", hint="Install it anew: pip install --force-reinstall wgpu."
        ) from error
    with one_at_a_time():
        if not _known:
            _known.extend(_best(_list_adapters()))
        return list(_known)


def _best(every: Iterable[wgpu.GPUAdapter]) -> list[wgpu.GPUAdapter]:
    every = list(every)
    found: list[wgpu.GPUAdapter] = []
    for backend in _BACKENDS:
        better = [adapter_name(adapter) for adapter in found]
        found += [
            adapter
            for adapter in every
            if adapter.info["backend_type"] == backend
            and not any(_same_name(adapter_name(adapter), name) for name in better)
        ]
    return sorted(found, key=lambda adapter: _ADAPTER_TYPES.index(_type(adapter)))


def is_software(adapter: wgpu.GPUAdapter) -> bool:
    """Whether the adapter is a program on the CPU (lavapipe, SwiftShader, WARP)."""
    return _type(adapter) == "CPU"


def find_adapter(spec: str) -> wgpu.GPUAdapter | None:
    """The adapter that ``"gpu"`` or ``"gpu:N"`` means; for ``"auto"`` the first real one, if any.

    Raises
    ------
    NoAdapterError
        No such adapter.
    DeviceError
        It cannot be used in this process, which was forked.
    """
    if spec == "auto":
        try:
            return next((adapter for adapter in adapters() if not is_software(adapter)), None)
        except NoAdapterError:
            return None
    found, index = adapters(), int(spec.partition(":")[2] or 0)
    if index >= len(found):
        raise NoAdapterError(
            f"there is no GPU adapter {index}, only {len(found)} (counted from 0)"
            if found
            else "there is no GPU adapter",
            hint=_how_to_get_one() if not found else "ndcache doctor lists them.",
        )
    adapter = found[index]
    if adapter in _from_parent and adapter.info["backend_type"] == "OpenGL":
        # Drivers of OpenGL have threads and locks for a whole process: without them, some crash.
        raise DeviceError(
            "OpenGL, used by a process before it was forked, cannot be used in the fork",
            hint="Start the process with multiprocessing's 'spawn' method, or load with device='cpu'.",
        )
    return adapter


def adapter_name(adapter: wgpu.GPUAdapter) -> str:
    """What its driver calls it."""
    return str(adapter.info["device"])


def _list_adapters() -> list[wgpu.GPUAdapter]:
    """Give wgpu's adapters, without those of OpenGL where these could only be others' doubles.

    The OpenGL part of wgpu has one context for a process. When it is used in two threads at once (listing and dropping
    adapters is enough), one of them finds it taken, and wgpu ends the process. Our own threads take turns. The caller's
    cannot be told to; but Vulkan, Metal and D3D12 have no such fault.
    """
    import wgpu

    found = _list_primary()
    if found is not None and (any(not is_software(adapter) for adapter in found) or not _has_hardware(found)):
        return found
    return list(wgpu.gpu.enumerate_adapters_sync())


def _list_primary() -> list[wgpu.GPUAdapter] | None:
    """List the adapters of Vulkan, Metal and D3D12 alone; None where this version of wgpu does not let us."""
    from wgpu.backends import wgpu_native
    from wgpu.backends.wgpu_native import _helpers, _mappings

    try:
        ffi, list_adapters = wgpu_native.ffi, wgpu_native.lib.wgpuInstanceEnumerateAdapters
        create = wgpu_native.gpu._create_adapter
        if len(inspect.signature(create).parameters) != 1:
            return None
        kinds = ffi.typeof(list_adapters).args  # by name, cffi would have to parse them
        instance, options = _helpers.get_wgpu_instance(), ffi.new(kinds[1])
        options.backends = _mappings.native_flags["InstanceBackend.Primary"]
        handles = ffi.new(ffi.typeof("WGPUAdapter[]"), list_adapters(instance, options, ffi.NULL))
        list_adapters(instance, options, handles)
    except (AttributeError, KeyError, IndexError):
        return None
    return [create(handle) for handle in handles]


def _has_hardware(found: Sequence[wgpu.GPUAdapter]) -> bool:
    """Whether there could be a GPU that only OpenGL knows, beside software that Vulkan found."""
    return not found or sys.platform != "linux" or any(glob.glob(pattern) for pattern in _GPU_FILES)


def _how_to_get_one() -> str:
    if sys.platform == "linux":
        return (
            "Install the driver of your GPU with its Vulkan part; a software adapter comes with the package "
            "mesa-vulkan-drivers. Or load with device='cpu'."
        )
    return "Update the GPU's driver, or load with device='cpu'."


def _type(adapter: wgpu.GPUAdapter) -> str:
    kind = adapter.info["adapter_type"]
    return kind if kind in _ADAPTER_TYPES else "Unknown"


def _same_name(one: str, other: str) -> bool:
    """OpenGL says "NVIDIA H200/PCIe/SSE2" where Vulkan says "NVIDIA H200"."""
    first, second = (re.sub(r"\W+", " ", name).strip().casefold() for name in (one, other))
    return first.startswith(second) or second.startswith(first)
