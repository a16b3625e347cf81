"""Which GPUs there are, and which of them a name means."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import NoAdapterError

if TYPE_CHECKING:
    import wgpu

__all__ = ["adapter_name", "adapters", "find_adapter", "is_software"]

#: Of several ways to one adapter, the first of these.
_BACKENDS = ("Vulkan", "Metal", "D3D12", "OpenGL")
_ADAPTER_TYPES = ("DiscreteGPU", "IntegratedGPU", "VirtualGPU", "Unknown", "CPU")


def adapters() -> list[wgpu.GPUAdapter]:
    """The adapters there are: real ones before software ones, each by its best backend only.

    Raises
    ------
    NoAdapterError
        wgpu itself cannot be loaded.
    """
    try:
        import wgpu
    except (ImportError, OSError) as error:
        raise NoAdapterError(
            f"wgpu cannot be loaded: {error}", hint="Install it anew: pip install --force-reinstall wgpu."
        ) from error
    with _quiet_drivers():
        every = wgpu.gpu.enumerate_adapters_sync()
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
    return found[index]


def adapter_name(adapter: wgpu.GPUAdapter) -> str:
    """What its driver calls it."""
    return str(adapter.info["device"])


@contextmanager
def _quiet_drivers() -> Iterator[None]:
    """libwayland, asked for a display while adapters are listed, prints a line each time that it finds no
    XDG_RUNTIME_DIR. It takes any absolute path, and nobody can have put a socket in this one.
    """
    if sys.platform != "linux" or "XDG_RUNTIME_DIR" in os.environ:
        yield
        return
    os.environ["XDG_RUNTIME_DIR"] = os.devnull
    try:
        yield
    finally:
        os.environ.pop("XDG_RUNTIME_DIR", None)


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
