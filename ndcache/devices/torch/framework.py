"""PyTorch itself: imported when it is asked for, and its names for the format's dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from ...errors import DeviceError, OutOfDeviceMemoryError, UnsupportedDtypeError
from ...format.dtypes import TENSOR_SIZES
from ...format.manifest import Record, Shard
from ..into import Destination, check_fit, foreign_memory, misfit

if TYPE_CHECKING:
    import torch

__all__ = [
    "as_bytes",
    "check_dtypes",
    "find_destination",
    "first_line",
    "import_torch",
    "is_torch_device",
    "note_writes",
    "tensor_dtype",
    "translated_errors",
]


def import_torch() -> ModuleType:
    """Import PyTorch and return it.

    Raises
    ------
    DeviceError
        It is not installed, or cannot be imported.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise _broken(error) from error
        raise DeviceError(
            "PyTorch is not installed", hint="Install it: pip install torch, or see https://pytorch.org for your CUDA."
        ) from error
    except (ImportError, OSError) as error:  # such as a missing library of CUDA
        raise _broken(error) from error
    module: ModuleType = torch
    return module


def _broken(error: Exception) -> DeviceError:
    return DeviceError(f"PyTorch cannot be imported: {error}", hint="Reinstall it: see https://pytorch.org.")


def is_torch_device(device: object) -> bool:
    """Return whether this is a `torch.device`, without importing PyTorch."""
    return (type(device).__module__, type(device).__name__) == ("torch", "device")


def tensor_dtype(record: Record, *, decode: bool) -> torch.dtype:
    """Return the dtype that a record's tensor has in PyTorch, which `check_dtypes` found."""
    import torch

    found: torch.dtype = getattr(torch, record.dtype if decode else record.stored_dtype)
    return found


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor's memory as a flat tensor of uint8, without its gradient."""
    import torch

    if tensor.numel() == 0:  # its strides may be anything, and then it cannot be viewed
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return tensor.detach().reshape(-1).view(torch.uint8)


def find_destination(record: Record, memory: object, device: torch.device, *, decode: bool) -> Destination:
    """Check that a tensor of the caller's can receive a record; return its range, with the flat bytes as memory.

    Raises
    ------
    ValueError, TypeError
        See `Device.find_destination`.
    """
    import torch

    if not isinstance(memory, torch.Tensor):
        raise foreign_memory(record, memory, f"tensors of PyTorch on {str(device)!r}")
    if memory.device != device:
        raise misfit(record, f"is on {str(memory.device)!r}, but this device is {str(device)!r}")
    check_fit(record, memory.shape, str(memory.dtype).removeprefix("torch."), decode=decode)
    if memory.layout != torch.strided or not memory.is_contiguous() or memory.is_neg():
        raise misfit(record, "is not contiguous")
    flat = as_bytes(memory)
    return Destination(memory, flat, "memory", flat.data_ptr(), flat.nbytes)


def note_writes(into: Mapping[str, Destination]) -> None:
    """Tell autograd that tensors of the caller's are about to be written to, as operations in place do."""
    import torch

    for destination in into.values():
        if not destination.owner.is_inference():  # those have no version, and old releases of PyTorch refuse them
            torch.autograd.graph.increment_version(destination.owner)


def check_dtypes(device: torch.device, shards: Sequence[Shard], *, decode: bool) -> None:
    """Check that PyTorch, and this device, have the dtypes of all records.

    Raises
    ------
    UnsupportedDtypeError
        They lack one of them. It names the first record that has it.
    """
    import torch

    first: dict[str, tuple[Record, Shard]] = {}
    for shard in shards:
        for record in shard.records:
            first.setdefault(record.dtype if decode else record.stored_dtype, (record, shard))
    for name, (record, shard) in first.items():
        dtype = getattr(torch, name, None) if name in TENSOR_SIZES else None
        if dtype is None:
            raise UnsupportedDtypeError(
                f"tensor {record.name!r} is {name}, which PyTorch {torch.__version__} does not have",
                shard=shard.data_path,
                hint="A newer version may have it.",
            )
        try:
            torch.empty(0, dtype=dtype, device=device)
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise UnsupportedDtypeError(
                f"tensor {record.name!r} is {name}, which {str(device)!r} does not have: {first_line(error)}",
                shard=shard.data_path,
                hint="Load it onto 'cpu', and convert it there.",
            ) from error


@contextmanager
def translated_errors(device: torch.device) -> Iterator[None]:
    """Raise errors of PyTorch as errors of ndcache."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        # Before 2.5, the exception of CUDA has another name; other devices raise RuntimeErrors.
        if type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error):
            raise OutOfDeviceMemoryError(
                f"no memory is left on {str(device)!r}: {first_line(error)}",
                hint="Free other tensors on it, load fewer (names=), or load onto another device.",
            ) from error
        raise DeviceError(f"the device {str(device)!r} failed: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's text: those of PyTorch may have many."""
    return str(error).strip().partition("\n")[0]
