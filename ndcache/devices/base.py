"""What a device must do to have a model loaded onto it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Generic, TypeVar

from ..format.manifest import Record, Shard
from ..stats import LoadStats
from ..workers.pool import WorkerPool

__all__ = ["Device"]

#: What `Device.stage` leaves for `Device.place`.
Staged = TypeVar("Staged")
Tensor = TypeVar("Tensor")


class Device(ABC, Generic[Staged, Tensor]):
    """Takes shards in two steps: the bytes are staged in a worker, the tensors made on the caller's thread.

    Attributes
    ----------
    handle
        What users see as `Weights.device`.
    name : str
        The device in words.
    has_serial : bool
        Whether `begin` asks for a thread of its own.
    """

    handle: Any
    name: str
    has_serial = False

    @abstractmethod
    def prepare(
        self, shards: Sequence[Shard], *, decode: bool, copy: bool, memory_limit: int, stats: LoadStats
    ) -> None:
        """Say what will be loaded, before anything is fetched.

        Parameters
        ----------
        shards : sequence of Shard
        decode : bool
            Expand float32 stored as bfloat16; else the tensor has the stored bits.
        copy : bool
            Give each tensor memory of its own, even where a view of the file would do.
        memory_limit : int
            Bytes of memory for shards on their way.
        stats : LoadStats
            Told how long what takes.

        Raises
        ------
        DeviceError
            A tensor cannot fit the device's limits.
        """

    @abstractmethod
    def begin(self, workers: WorkerPool, *, keeps_all: bool) -> None:
        """Get ready for `stage`; `release` must be called afterwards.

        Parameters
        ----------
        workers : WorkerPool
            Of the load.
        keeps_all : bool
            Whether all tensors will be there at once in the end, so that memory for all of them may be asked for now.
        """

    @abstractmethod
    def stage(self, file: BinaryIO, shard: Shard) -> Staged:
        """Make the bytes of a shard's open file ready for `place`. Called from many threads at once."""

    @abstractmethod
    def place(self, staged: Staged, shard: Shard) -> Iterator[tuple[Record, Tensor]]:
        """The shard's tensors, in its records' order. Called from one thread, in manifest order.

        Parameters
        ----------
        staged
            From `stage`.
        shard : Shard
        """

    @abstractmethod
    def finish(self) -> None:
        """Wait until everything placed is really there."""

    @abstractmethod
    def release(self) -> None:
        """Free what was needed for loading: no thread is in `stage` or `place` any more. Never raises."""

    @abstractmethod
    def discard(self, tensors: dict[str, Tensor]) -> None:
        """Free tensors of this device, which leaves none in `tensors`, and the device itself unless it is the caller's.

        The device cannot be used afterwards.
        """
