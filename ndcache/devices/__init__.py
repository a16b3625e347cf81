"""Where tensors end up: NumPy arrays, or buffers of a GPU."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from ..errors import DeviceError
from ..files.descriptors import check_exhausted
from .base import Device
from .cpu import CpuDevice
from .gpu.device import GpuDevice, open_gpu

__all__ = ["is_device_name", "open_device"]

logger = logging.getLogger("ndcache")


def is_device_name(text: str) -> bool:
    """Whether it is one of the strings that `open_device` takes."""
    return re.fullmatch(r"cpu|auto|gpu(:[0-9]{1,4})?", text) is not None


def open_device(device: Any, poll: Callable[[], None] | None = None) -> Device[Any, Any]:
    """Open what the ``device`` option names: ``"cpu"``, ``"gpu"``, ``"gpu:N"``, ``"auto"`` or a `wgpu.GPUDevice`.

    While a driver is waited for, `look` is called about every 0.1 s, to raise what is to end the wait.

    Raises
    ------
    ValueError, TypeError
        None of these.
    DeviceError
        There is no such GPU, or it cannot be used.
    """
    if not isinstance(device, str):
        # Anything that can make buffers, so that wgpu need not be imported to ask.
        if not hasattr(device, "create_buffer"):
            raise TypeError(f"device takes a string or a wgpu.GPUDevice, not {device!r}")
        return GpuDevice(device, is_ours=False)
    if not is_device_name(device):
        raise ValueError(f"device is 'cpu', 'gpu', 'gpu:N' or 'auto', not {device!r}")
    if device == "cpu":
        return CpuDevice()
    try:
        opened = open_gpu(device, poll) or CpuDevice()
    except DeviceError:
        check_exhausted()  # a driver that can open nothing may say anything
        raise
    if device == "auto":
        logger.info("device 'auto' is %s", opened.name)
    return opened
