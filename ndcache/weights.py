"""The result of a load."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from .devices.base import Device
from .devices.into import Destination
from .format.manifest import Manifest
from .stats import LoadStats

__all__ = ["Weights", "collected"]

T = TypeVar("T")
Tensor = TypeVar("Tensor", covariant=True)


class Weights(Mapping[str, Tensor]):
    """A read-only mapping from tensor names to tensors, in manifest order. Also a context manager.

    On the CPU the tensors are `numpy.ndarray`: read-only views of the mapped shard file where the stored bytes are the
    values, and arrays with memory of their own where float32 was stored as bfloat16. On a GPU they are `GPUTensor`; on
    CUDA, and with `ndcache.torch`, they are `torch.Tensor`. Type checkers know which: ``Weights[numpy.ndarray]`` or
    ``Weights[GPUTensor]``. A tensor that was loaded into memory of the caller's (``into``) is the caller's own object.

    Attributes
    ----------
    metadata : mapping
        The manifest's ``metadata``.
    manifest : Manifest
    device : "cpu", wgpu.GPUDevice or torch.device
        Where the tensors are.
    nbytes : int
        Bytes of all tensors as they are in memory now, including the caller's.
    stats : LoadStats
        What the load cost.

    Raises
    ------
    KeyError
        There is no tensor of this name.
    ValueError
        The weights were closed.

    Examples
    --------
    >>> with ndcache.load("https://host/model/") as weights:
    ...     total = sum(array.size for array in weights.values())
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        manifest: Manifest,
        device: Device[Tensor],
        stats: LoadStats,
        into: Mapping[str, Destination],
    ) -> None:
        self._tensors: dict[str, Tensor] | None = dict(tensors)
        self._device = device
        self.manifest = manifest
        self.metadata = manifest.metadata
        self.device: Any = device.handle
        self.stats = stats
        self._lent = frozenset(into)
        sized: dict[str, Any] = {**self._tensors, **into}  # a buffer of the caller's may be larger than its tensor
        self.nbytes: int = sum(each.nbytes for each in sized.values())

    def __getitem__(self, name: str) -> Tensor:
        return self._open()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._open())

    def __len__(self) -> int:
        return len(self._open())

    def close(self) -> None:
        """Release the tensors. On a GPU, destroy their buffers, and the device unless the caller opened it.

        Arrays on the CPU stay valid as long as something refers to them. The caller's own memory, of the ``into``
        argument, is left alone. A second call does nothing.
        """
        if self._tensors is not None:
            tensors, self._tensors = self._tensors, None
            _discard(self._device, tensors, self._lent)

    def __enter__(self) -> Weights[Tensor]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._tensors is None:
            return "<Weights: closed>"
        number = f"{len(self)} tensor{'' if len(self) == 1 else 's'}"
        return f"<Weights: {number}, {self.nbytes / 2**20:.1f} MiB, on {self._device.name}>"

    # Not Mapping's, which would compare arrays and has no hash.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __reduce__(self) -> NoReturn:
        raise TypeError("weights are not pickled: load them in each process, which reads the cached files in place")

    def _open(self) -> dict[str, Tensor]:
        if self._tensors is None:
            raise ValueError("these weights are closed")
        return self._tensors


@contextmanager
def collected(device: Device[T], lent: Collection[str]) -> Iterator[dict[str, T]]:
    """Yield a dict for the device's tensors. If the block fails, free them, but not `lent` ones, and the device too."""
    tensors: dict[str, T] = {}
    try:
        yield tensors
    except BaseException:
        _discard(device, tensors, lent)
        raise


def _discard(device: Device[T], tensors: dict[str, T], lent: Collection[str]) -> None:
    for name in lent:
        tensors.pop(name, None)
    device.discard(tensors)
