"""Devices for tensors: the CPU, with NumPy arrays, GPUs, with buffers of wgpu, and those of PyTorch."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from ..errors import DeviceError
from ..files.descriptors import check_exhausted
from .base import Device
from .cpu import CpuDevice
from .gpu import GpuDevice, open_gpu
from .torch.framework import is_torch_device
from .torch.opening import open_torch_device

__all__ = ["is_device_name", "open_device"]

logger = logging.getLogger("ndcache")


def is_device_name(text: str) -> bool:
    """Return whether `open_device` accepts this string."""
    return re.fullmatch(r"cpu|auto|(gpu|cuda)(:[0-9]{1,4})?", text) is not None


def open_device(device: object, poll: Callable[[], None] | None = None) -> Device[Any]:
    """Open the device that the ``device`` option names.

    Parameters
    ----------
    device : {"cpu", "gpu", "gpu:N", "cuda", "cuda:N", "auto"}, wgpu.GPUDevice or torch.device
    poll : callable, optional
        Called about every 0.1 s while a driver is busy; an exception that it raises ends the wait.

    Raises
    ------
    ValueError, TypeError
        `device` is none of these.
    DeviceError
        There is no such GPU, or it cannot be used.
    """
    if is_torch_device(device):
        return open_torch_device(device)
    if not isinstance(device, str):
        # Recognised by a method, so that wgpu need not be imported.
        if not hasattr(device, "create_buffer"):
            raise TypeError(f"device must be a string, a wgpu.GPUDevice or a torch.device, not {device!r}")
        return GpuDevice(device, is_ours=False)
    if not is_device_name(device):
        raise ValueError(
            f"device must be 'cpu', 'gpu', 'gpu:N', 'cuda', 'cuda:N' or 'auto', not {device!r}. "
            "ndcache.torch.load takes all devices of PyTorch."
        )
    if device == "cpu":
        return CpuDevice()
    if device.startswith("cuda"):
        return open_torch_device(device)
    try:
        opened = open_gpu(device, poll) or CpuDevice()
    except DeviceError:
        check_exhausted()  # a driver that cannot open files may report anything
        raise
    if device == "auto":
        logger.info("device 'auto' is %s", opened.name)
    return opened
