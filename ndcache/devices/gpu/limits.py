"""Tensors that a GPU device cannot hold, or cannot bind: known before anything is fetched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...caller import warn_caller
from ...errors import DeviceError, OutOfDeviceMemoryError
from ...format.manifest import Record, Shard
from .layout import padded

if TYPE_CHECKING:
    import wgpu

__all__ = ["check_limits"]

_BINDING = "max-storage-buffer-binding-size"


def check_limits(device: wgpu.GPUDevice, tensors: Iterable[tuple[Shard, Record, int]], *, is_ours: bool) -> None:
    """Compare tensors with a device's limits.

    A tensor that is too large to be bound whole can still be bound in parts. On a device that has all its adapter can
    give, that is a warning.

    Parameters
    ----------
    device : wgpu.GPUDevice
    tensors : iterable of tuple
        Shard, record, and the bytes that the tensor takes on the device.
    is_ours : bool
        Whether ndcache opened the device, with the adapter's limits.

    Raises
    ------
    OutOfDeviceMemoryError
        A tensor is larger than a buffer may be.
    DeviceError
        A tensor is larger than what the caller's own device can bind.
    """
    most, bindable = device.limits["max-buffer-size"], device.limits[_BINDING]
    unbindable = []
    for shard, record, nbytes in tensors:
        if padded(nbytes) > most:
            raise OutOfDeviceMemoryError(
                f"tensor {record.name!r} takes {nbytes:,} bytes, the device's buffers at most {most:,}",
                shard=shard.data_path,
                expected=nbytes,
                received=most,
                hint="Nothing was fetched. Load it to the CPU, or leave it out with names=.",
            )
        if padded(nbytes) > bindable:
            unbindable.append((shard, record, nbytes))
    if not unbindable:
        return
    words = f"{_words(unbindable)}: more than the {bindable:,} that this device can bind at once ({_BINDING})"
    if is_ours:
        warn_caller(f"{words}. Bind such a buffer in parts, by offset and size, or load it to the CPU.")
        return
    shard, _, nbytes = unbindable[0]
    raise DeviceError(
        words,
        shard=shard.data_path,
        expected=nbytes,
        received=bindable,
        hint=f"Nothing was fetched. {_remedy(device, max(nbytes for _, _, nbytes in unbindable))}",
    )


def _words(tensors: list[tuple[Shard, Record, int]]) -> str:
    named = [f"{record.name!r} takes {nbytes:,} bytes" for _, record, nbytes in tensors[:3]]
    more = f", and {len(tensors) - 3} more are as large" if len(tensors) > 3 else ""
    return f"tensor{'s' if len(tensors) > 1 else ''} {', '.join(named)}{more}"


def _remedy(device: wgpu.GPUDevice, nbytes: int) -> str:
    if device.adapter.limits[_BINDING] >= padded(nbytes):
        return (
            f"Its adapter can bind {device.adapter.limits[_BINDING]:,}: request the device with required_limits, or "
            f"load with device='gpu', which does."
        )
    return "Its adapter cannot bind more. With device='gpu' it is loaded all the same, to be bound in parts."
