"""The calls of CUDA that a load makes: pinned memory, streams, events, asynchronous copies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .framework import as_bytes

if TYPE_CHECKING:
    import torch

    from .pinned import Slots

__all__ = ["PORTABLE", "CudaApi", "TorchApi", "expand_through_torch"]

#: A flag: memory is pinned for all contexts.
PORTABLE = 1
#: Tensors up to this size come out of blocks of this size.
_RESERVED_TENSOR, _RESERVED_BLOCK = 64 << 20, 1 << 30


class CudaApi(ABC):
    """The calls of CUDA that a load makes on one device.

    Its methods are called within `active`, except for `caller_stream`, `on` and `reserve`.

    Attributes
    ----------
    device : torch.device
    """

    device: torch.device

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """Return a context in which the calling thread uses this device."""

    @abstractmethod
    def new_stream(self) -> Any: ...

    @abstractmethod
    def new_event(self) -> Any: ...

    @abstractmethod
    def record(self, event: Any, stream: Any) -> None:
        """Let an event happen when the stream has done all that it was given so far."""

    @abstractmethod
    def has_happened(self, event: Any) -> bool:
        """Return whether an event has happened, or was never recorded."""

    @abstractmethod
    def wait(self, event: Any) -> None:
        """Wait until an event has happened."""

    @abstractmethod
    def follow(self, stream: Any, other: Any) -> None:
        """Let what a stream is given from now on wait for all that another one was given so far."""

    @abstractmethod
    def synchronize(self, stream: Any) -> None:
        """Wait until a stream has done all that it was given."""

    @abstractmethod
    def register(self, address: int, nbytes: int) -> None:
        """Pin memory, so that the device can read it by itself."""

    @abstractmethod
    def unregister(self, address: int) -> None: ...

    @abstractmethod
    def copy(self, tensor: torch.Tensor, start: int, slots: Slots, offset: int, nbytes: int, stream: Any) -> None:
        """Copy bytes of pinned memory from `offset` on into the bytes of a contiguous tensor from `start` on."""

    @abstractmethod
    def expand(self, tensor: torch.Tensor, start: int, slots: Slots, offset: int, nbytes: int, stream: Any) -> None:
        """Expand bfloat16 of pinned memory from `offset` on into a contiguous float32 tensor, from a byte of it on.

        Parameters
        ----------
        tensor : torch.Tensor
        start : int
            In its bytes, a multiple of 4.
        slots : Slots
        offset, nbytes : int
            Where the bfloat16 lies, at any alignment.
        stream
        """

    def device_address(self, address: int) -> int:
        """Return the address of pinned memory for programs on the device; 0 if they cannot read it."""
        return 0

    @abstractmethod
    def free_stream(self, stream: Any) -> None: ...

    @abstractmethod
    def free_event(self, event: Any) -> None: ...

    @abstractmethod
    def caller_stream(self) -> Any:
        """Return PyTorch's current stream in this thread."""

    @abstractmethod
    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which PyTorch gives its work to a stream."""

    def reserve(self, sizes: Sequence[int]) -> None:
        """Let PyTorch hold memory for tensors of these sizes in few large blocks, if CUDA has enough.

        512 allocations of 8 MiB take CUDA 16 ms, and 4 of 1 GiB 0.7 ms.
        """
        import torch

        wanted = sum(size for size in sizes if size <= _RESERVED_TENSOR)
        # This is only about speed: some allocators tell nothing, and others may have limits of their own.
        with suppress(RuntimeError):
            held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free, _ = torch.cuda.mem_get_info(self.device)
            if held < wanted and sum(sizes) <= free * 0.9:
                blocks = []  # all at once, so that each has memory of its own
                for start in range(0, wanted, _RESERVED_BLOCK):
                    nbytes = min(_RESERVED_BLOCK, wanted - start)
                    blocks.append(torch.empty(nbytes, dtype=torch.uint8, device=self.device))


class TorchApi(CudaApi):
    """CUDA, or what PyTorch calls so, through PyTorch alone.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def active(self) -> Iterator[None]:
        import torch

        with torch.cuda.device(self.device):
            yield

    def new_stream(self) -> torch.cuda.Stream:
        import torch

        return torch.cuda.Stream(self.device)

    def new_event(self) -> torch.cuda.Event:
        import torch

        return torch.cuda.Event()

    def caller_stream(self) -> torch.cuda.Stream:
        import torch

        return torch.cuda.current_stream(self.device)

    @contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        import torch

        with torch.cuda.stream(stream):
            yield

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        event.record(stream)

    def has_happened(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def follow(self, stream: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
        stream.wait_stream(other)

    def synchronize(self, stream: torch.cuda.Stream) -> None:
        stream.synchronize()

    def register(self, address: int, nbytes: int) -> None:
        import torch

        code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, PORTABLE))
        if code:
            raise RuntimeError(f"cudaHostRegister: error {code}")

    def unregister(self, address: int) -> None:
        import torch

        torch.cuda.cudart().cudaHostUnregister(address)

    def copy(
        self, tensor: torch.Tensor, start: int, slots: Slots, offset: int, nbytes: int, stream: torch.cuda.Stream
    ) -> None:
        with self.on(stream):
            as_bytes(tensor)[start : start + nbytes].copy_(slots.tensor[offset : offset + nbytes], non_blocking=True)

    def expand(
        self, tensor: torch.Tensor, start: int, slots: Slots, offset: int, nbytes: int, stream: torch.cuda.Stream
    ) -> None:
        with self.on(stream):
            expand_through_torch(tensor, start, slots, offset, nbytes)

    def free_stream(self, stream: torch.cuda.Stream) -> None:
        pass

    def free_event(self, event: torch.cuda.Event) -> None:
        pass


def expand_through_torch(tensor: torch.Tensor, start: int, slots: Slots, offset: int, nbytes: int) -> None:
    """Expand bfloat16 as `CudaApi.expand` does, on PyTorch's current stream, through memory on the device."""
    import torch

    # Inference mode, because tensors of it can be written to in no other one, and the caller's thread may be in it.
    with torch.inference_mode():
        stored = slots.tensor[offset : offset + nbytes].to(tensor.device, non_blocking=True, copy=True)
        as_bytes(tensor)[start : start + 2 * nbytes].view(torch.float32).copy_(stored.view(torch.bfloat16))
