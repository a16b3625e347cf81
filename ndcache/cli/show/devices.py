"""Devices in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...devices.gpu.adapters import is_software
from ...devices.torch.framework import is_torch_device
from ...devices.torch.opening import describe_device

if TYPE_CHECKING:
    import wgpu

__all__ = ["adapter_words", "device_words"]


def device_words(device: Any) -> str:
    """Return a `Weights.device` in words: the CPU, the adapter's name, kind and backend, or a device of PyTorch."""
    if device == "cpu":
        return "cpu"
    return describe_device(device) if is_torch_device(device) else adapter_words(device.adapter)


def adapter_words(adapter: wgpu.GPUAdapter) -> str:
    """Return an adapter's name, kind and backend."""
    info = adapter.info
    kind = "software" if is_software(adapter) else info["adapter_type"]
    return f"{info['device']}, {kind}, {info['backend_type']}"
