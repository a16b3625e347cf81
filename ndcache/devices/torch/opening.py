"""Open the device that a `torch.device` names."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...errors import NoAdapterError
from ..base import Device
from .cpu import TorchCpuDevice
from .cuda import CudaDevice
from .driver import open_api
from .framework import first_line, import_torch, is_torch_device
from .other import OtherDevice

if TYPE_CHECKING:
    import torch

__all__ = ["describe_device", "list_cuda", "open_torch_device", "parse_device"]


def open_torch_device(device: str | torch.device) -> Device[Any]:
    """Open the device of this name, for tensors that are `torch.Tensor`.

    Raises
    ------
    ValueError
        The name means nothing to PyTorch, or a device without memory.
    DeviceError
        PyTorch cannot be imported.
    NoAdapterError
        There is no such device, or this PyTorch was built without it.
    """
    torch = import_torch()
    handle = parse_device(device)
    if handle.type == "meta":
        raise ValueError("tensors on the device 'meta' have no memory to load weights into")
    if handle.type == "cpu":
        return TorchCpuDevice(handle)
    try:
        found = torch.empty(0, device=handle).device  # with the number of the current one
    except Exception as error:  # backends raise anything for devices that they do not have
        raise _missing(torch, handle, error) from error
    if handle.type == "cuda":
        return _open_cuda(torch, found)
    return OtherDevice(found)


def _open_cuda(torch: ModuleType, handle: torch.device) -> CudaDevice:
    properties = torch.cuda.get_device_properties(handle)
    return CudaDevice(handle, open_api(handle), properties.name, properties.total_memory)


def list_cuda() -> list[str]:
    """Return the name and the memory of each device of CUDA, in PyTorch's order.

    Raises
    ------
    DeviceError
        PyTorch cannot be imported.
    NoAdapterError
        It was built without CUDA, or finds no device.
    """
    torch = import_torch()
    try:
        torch.empty(0, device="cuda")
    except Exception as error:
        raise _missing(torch, torch.device("cuda"), error) from error
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{each.name}, {each.total_memory / 2**30:.1f} GiB" for each in found]


def describe_device(handle: torch.device) -> str:
    """Return a device in words: ``"cuda:0, NVIDIA H100 80GB HBM3, 79.2 GiB"``."""
    return f"{handle}, {list_cuda()[handle.index]}" if handle.type == "cuda" else f"{handle}, through PyTorch"


def parse_device(device: str | torch.device) -> torch.device:
    """Return the `torch.device` of this name; one is returned as it is.

    Raises
    ------
    ValueError
        The name means nothing to PyTorch.
    TypeError
        It is neither.
    DeviceError
        PyTorch cannot be imported.
    """
    if is_torch_device(device):
        return device
    if not isinstance(device, str):
        raise TypeError(f"device must be a string or a torch.device, not {device!r}")
    torch = import_torch()
    try:
        return torch.device(device)
    except RuntimeError as error:
        examples = "'cpu', 'cuda', 'cuda:1' or 'mps'"
        raise ValueError(f"{device!r} is no device of PyTorch, as {examples} is: {first_line(error)}") from error


def _missing(torch: ModuleType, handle: torch.device, error: Exception) -> NoAdapterError:
    if handle.type != "cuda":
        reason = f"cannot use the device {str(handle)!r}: {first_line(error).partition('. ')[0]}"
        hint = "Load onto 'cpu', or install a PyTorch that was built for this device: see https://pytorch.org."
    elif torch.version.cuda is None and torch.version.hip is None:
        reason = f"was built without CUDA, and {str(handle)!r} needs it"
        hint = "Install a PyTorch with CUDA: see https://pytorch.org. 'gpu' loads through wgpu, 'cpu' needs neither."
    elif (count := torch.cuda.device_count()) > (handle.index or 0):
        reason = f"cannot use the device {str(handle)!r}: {first_line(error)}"
        hint = (
            "Look at nvidia-smi: its memory may be full. After a fork, a process cannot use CUDA that its parent used."
        )
    elif count:
        reason = f"finds {count} device{'s'[: count != 1]} of CUDA, and so no {str(handle)!r}"
        hint = "`ndcache doctor` lists them; CUDA_VISIBLE_DEVICES may hide some."
    else:
        reason = f"finds no device of CUDA: {first_line(error)}"
        hint = "Install NVIDIA's driver, and look at CUDA_VISIBLE_DEVICES and nvidia-smi. 'cpu' needs no GPU."
    return NoAdapterError(f"PyTorch {torch.__version__} {reason}", hint=hint)
