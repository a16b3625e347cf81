"""Find tensors that a GPU device cannot hold or bind, before anything is fetched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...caller import warn_caller
from ...errors import DeviceError, OutOfDeviceMemoryError
from ...format.manifest import Record, Shard
from .layout import round_up

if TYPE_CHECKING:
    import wgpu

__all__ = ["check_limits"]

_BINDING = "max-storage-buffer-binding-size"


def check_limits(device: wgpu.GPUDevice, tensors: Iterable[tuple[Shard, Record, int]], *, is_ours: bool) -> None:
    """Compare tensors with a device's limits.

    A tensor that is too large to be bound whole can still be bound in parts. So if ndcache opened the device, with the
    highest limits of its adapter, this is only a warning.

    Parameters
    ----------
    device : wgpu.GPUDevice
    tensors : iterable of tuple
        Shard, record, and the tensor's bytes on the device.
    is_ours : bool
        Whether ndcache opened the device, with the adapter's limits.

    Raises
    ------
    OutOfDeviceMemoryError
        A tensor exceeds the device's largest buffer.
    DeviceError
        A tensor exceeds what the caller's own device can bind.
    """
    max_bytes, bindable = device.limits["max-buffer-size"], device.limits[_BINDING]
    unbindable = []
    for shard, record, nbytes in tensors:
        if round_up(nbytes) > max_bytes:
            raise OutOfDeviceMemoryError(
                f"tensor {record.name!r} takes {nbytes:,} bytes, but the device's buffers hold at most {max_bytes:,}",
                shard=shard.data_path,
                expected=nbytes,
                received=max_bytes,
                hint="Nothing was fetched. Load it to the CPU, or leave it out with names=.",
            )
        if round_up(nbytes) > bindable:
            unbindable.append((shard, record, nbytes))
    if not unbindable:
        return
    text = f"{_describe(unbindable)}: more than the {bindable:,} that this device can bind at once ({_BINDING})"
    if is_ours:
        warn_caller(f"{text}. Bind such a buffer in parts, by offset and size, or load it to the CPU.")
        return
    shard, _, nbytes = unbindable[0]
    raise DeviceError(
        text,
        shard=shard.data_path,
        expected=nbytes,
        received=bindable,
        hint=f"Nothing was fetched. {_suggest(device, max(nbytes for _, _, nbytes in unbindable))}",
    )


def _describe(tensors: list[tuple[Shard, Record, int]]) -> str:
    sizes = [f"{record.name!r} takes {nbytes:,} bytes" for _, record, nbytes in tensors[:3]]
    more = f", and {len(tensors) - 3} more are as large" if len(tensors) > 3 else ""
    return f"tensor{'s' if len(tensors) > 1 else ''} {', '.join(sizes)}{more}"


def _suggest(device: wgpu.GPUDevice, nbytes: int) -> str:
    if device.adapter.limits[_BINDING] >= round_up(nbytes):
        return (
            f"Its adapter can bind {device.adapter.limits[_BINDING]:,}: request the device with required_limits, or "
            f"load with device='gpu', which does."
        )
    return "Its adapter cannot bind more. With device='gpu' the tensor is loaded nevertheless; bind it in parts."
