"""List the GPU adapters, and find the one that the ``device`` option names."""

from __future__ import annotations

import glob
import inspect
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...errors import DeviceError, NoAdapterError, OutOfDeviceMemoryError

if TYPE_CHECKING:
    import wgpu

__all__ = ["adapter_lock", "adapter_name", "explained_fork", "find_adapter", "is_software", "list_adapters"]

#: The backends in order of preference, as several may offer the same adapter.
_BACKENDS = ("Vulkan", "Metal", "D3D12", "OpenGL")
#: The types of adapters in order of preference.
_ADAPTER_TYPES = ("DiscreteGPU", "IntegratedGPU", "VirtualGPU", "Unknown", "CPU")
#: The device files of GPUs on Linux, which exist even without a Vulkan driver.
_GPU_FILES = ("/dev/dri/renderD*", "/dev/nvidia[0-9]*", "/dev/dxg")

#: In a list, so that a forked process can replace it.
_lock = [threading.Lock()]
#: The adapters of this process, kept once some were found. Listing them again would take milliseconds and make some
#: drivers print lines. Neither listing nor dropping them is safe while other threads use wgpu: see
#: `_enumerate_adapters`.
_known: list[wgpu.GPUAdapter] = []
#: The adapters that the parent process had listed when this process was forked.
_from_parent: list[wgpu.GPUAdapter] = []


@contextmanager
def adapter_lock() -> Iterator[None]:
    """Let one thread of ndcache at a time list or open adapters."""
    with _lock[0]:
        yield


def _begin_child() -> None:
    _lock[0] = threading.Lock()  # The thread that held the old one does not exist here.
    _from_parent.extend(_known)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)


def list_adapters() -> list[wgpu.GPUAdapter]:
    """Return the adapters of this machine: hardware before software, each with its best backend only.

    Once a process has found some, it does not search again.

    Raises
    ------
    NoAdapterError
        wgpu itself cannot be loaded.
    """
    try:
        import wgpu  # noqa: F401
    except (ImportError, OSError) as error:
        raise NoAdapterError(
            f"wgpu cannot be loaded: {error}", hint="Reinstall it: pip install --force-reinstall wgpu."
        ) from error
    with adapter_lock():
        if not _known:
            _known.extend(_best(_enumerate_adapters()))
        return list(_known)


def _best(candidates: Sequence[wgpu.GPUAdapter]) -> list[wgpu.GPUAdapter]:
    found: list[wgpu.GPUAdapter] = []
    for backend in _BACKENDS:
        known = [adapter_name(adapter) for adapter in found]
        found += [
            adapter
            for adapter in candidates
            if adapter.info["backend_type"] == backend
            and not any(_same_name(adapter_name(adapter), name) for name in known)
        ]
    return sorted(found, key=lambda adapter: _ADAPTER_TYPES.index(_type(adapter)))


def is_software(adapter: wgpu.GPUAdapter) -> bool:
    """Return whether the adapter is a software renderer on the CPU (lavapipe, SwiftShader, WARP)."""
    return _type(adapter) == "CPU"


def find_adapter(spec: str) -> wgpu.GPUAdapter | None:
    """Return the adapter for ``"gpu"`` or ``"gpu:N"``; for ``"auto"`` the first hardware adapter, or None.

    Raises
    ------
    NoAdapterError
        There is no such adapter.
    DeviceError
        The adapter cannot be used in this process, which was forked.
    """
    if spec == "auto":
        try:
            return next((adapter for adapter in list_adapters() if not is_software(adapter)), None)
        except NoAdapterError:
            return None
    found, index = list_adapters(), int(spec.partition(":")[2] or 0)
    if not found:
        raise NoAdapterError("there is no GPU adapter", hint=_installation_hint())
    if index >= len(found):
        raise NoAdapterError(
            f"there is no GPU adapter {index}, only {len(found)} (counted from 0)", hint="ndcache doctor lists them."
        )
    adapter = found[index]
    if adapter in _from_parent and adapter.info["backend_type"] == "OpenGL":
        # OpenGL drivers have threads and locks that a whole process shares. In a fork, where the threads are missing,
        # some drivers crash.
        raise _forked("OpenGL cannot be used in a process that was forked after its parent had used OpenGL")
    return adapter


@contextmanager
def explained_fork(adapter: wgpu.GPUAdapter) -> Iterator[None]:
    """Say of a `DeviceError` in the block that a fork is the cause, if the parent process had used the adapter."""
    try:
        yield
    except OutOfDeviceMemoryError:
        raise
    except DeviceError as error:
        if adapter in _from_parent:  # those of lavapipe go on working, those of NVIDIA's Vulkan do not
            raise _forked(
                "this GPU cannot be used in a process that was forked after its parent had used it"
            ) from error
        raise


def _forked(text: str) -> DeviceError:
    return DeviceError(text, hint="Start the process with multiprocessing's 'spawn' method, or load with device='cpu'.")


def adapter_name(adapter: wgpu.GPUAdapter) -> str:
    """Return the adapter's name, as its driver reports it."""
    return str(adapter.info["device"])


def _enumerate_adapters() -> list[wgpu.GPUAdapter]:
    """Return wgpu's adapters, but skip OpenGL's if they can only be duplicates.

    wgpu has one OpenGL context for each process. If two threads use it at once (to list or drop adapters is enough),
    the second finds it taken, and wgpu ends the process. `adapter_lock` keeps ndcache's threads apart, but not the
    caller's. Vulkan, Metal and D3D12 have no such problem.
    """
    import wgpu

    found = _list_primary()
    if found is not None and (any(not is_software(adapter) for adapter in found) or not _may_have_hardware(found)):
        return found
    return list(wgpu.gpu.enumerate_adapters_sync())


def _list_primary() -> list[wgpu.GPUAdapter] | None:
    """Return the adapters of Vulkan, Metal and D3D12, or None if this version of wgpu cannot list them alone."""
    from wgpu.backends import wgpu_native
    from wgpu.backends.wgpu_native import _helpers, _mappings

    try:
        ffi, enumerate_native = wgpu_native.ffi, wgpu_native.lib.wgpuInstanceEnumerateAdapters
        create = wgpu_native.gpu._create_adapter
        if len(inspect.signature(create).parameters) != 1:
            return None
        kinds = ffi.typeof(enumerate_native).args  # looking them up by name would make cffi parse them
        instance, options = _helpers.get_wgpu_instance(), ffi.new(kinds[1])
        options.backends = _mappings.native_flags["InstanceBackend.Primary"]
        handles = ffi.new(ffi.typeof("WGPUAdapter[]"), enumerate_native(instance, options, ffi.NULL))
        enumerate_native(instance, options, handles)
    except (AttributeError, KeyError, IndexError):
        return None
    return [create(handle) for handle in handles]


def _may_have_hardware(found: Sequence[wgpu.GPUAdapter]) -> bool:
    """Return whether OpenGL may support a GPU although only software renderers, or nothing, were found."""
    return not found or sys.platform != "linux" or any(glob.glob(pattern) for pattern in _GPU_FILES)


def _installation_hint() -> str:
    if sys.platform == "linux":
        return (
            "Install your GPU's driver with Vulkan support, or a software adapter (mesa-vulkan-drivers on Debian"
            " and Fedora; vulkan-swrast on Arch; mesa-vulkan-swrast on Alpine). Or load with device='cpu'."
        )
    return "Update the GPU's driver, or load with device='cpu'."


def _type(adapter: wgpu.GPUAdapter) -> str:
    kind = adapter.info["adapter_type"]
    return kind if kind in _ADAPTER_TYPES else "Unknown"


def _same_name(one: str, other: str) -> bool:
    """Compare names loosely: OpenGL's "NVIDIA H200/PCIe/SSE2" is Vulkan's "NVIDIA H200"."""
    first, second = (re.sub(r"\W+", " ", name).strip().casefold() for name in (one, other))
    return first.startswith(second) or second.startswith(first)
