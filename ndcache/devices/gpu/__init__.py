"""GPUs, used through wgpu."""

from .device import GpuDevice, open_gpu

__all__ = ["GpuDevice", "open_gpu"]
