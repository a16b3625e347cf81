"""The interface of a device, and of one load's upload to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, BinaryIO, Generic, TypeVar

from ..format.manifest import Record, Shard
from ..stats import LoadStats
from ..workers.pool import WorkerPool
from .into import Destination, find_destinations
from .segments import Segment

__all__ = ["Device", "Upload"]

#: The type that `Upload.stage` returns and `Upload.place` takes.
Staged = TypeVar("Staged")
Tensor = TypeVar("Tensor")


class Device(ABC, Generic[Tensor]):
    """A place for tensors.

    Attributes
    ----------
    handle
        The value of `Weights.device`.
    name : str
        A description of the device, for log messages.
    needs_serial_thread : bool
        Whether its uploads need a thread for `WorkerPool.open_serial_queue`.
    segment_bytes : int
        The most bytes of a segment, unless it is a single larger record.
    cuts_records : bool
        Whether such a record becomes several segments.
    maps_files : bool
        Whether tensors may be views of the shards' files.
    completes_late : bool
        Whether, in a load that keeps all its tensors, those that `Upload.place` has yielded may be incomplete until
        `Upload.finish` returns, also for later work on the device. If the load fails before, memory of the caller's
        then counts as undefined.
    """

    handle: Any
    name: str
    needs_serial_thread = False
    segment_bytes: int
    cuts_records: bool
    maps_files = False
    completes_late = False

    def readers(self, workers: int) -> int:
        """Return how many workers load files that are all on disk, if `workers` would fetch them."""
        return workers

    @abstractmethod
    def check_limits(self, shards: Sequence[Shard], *, decode: bool) -> None:
        """Check that the device can hold each tensor, before anything is fetched.

        Parameters
        ----------
        shards : sequence of Shard
        decode : bool
            Whether float32 stored as bfloat16 will be expanded.

        Raises
        ------
        DeviceError
            A tensor exceeds a limit of the device.
        """

    def check_into(
        self, into: Mapping[str, object], shards: Sequence[Shard], *, decode: bool
    ) -> dict[str, Destination]:
        """Find the place of each tensor in the memory that the caller gave for it, before anything is fetched.

        Parameters
        ----------
        into : mapping of str to object
            Memory for some of the tensors, by their names.
        shards : sequence of Shard
        decode : bool
            Whether float32 stored as bfloat16 will be expanded.

        Raises
        ------
        ValueError
            No tensor of a name is in `shards`, memory does not fit, or the ranges of two tensors overlap.
        TypeError
            Something is no memory.
        """
        return find_destinations(into, shards, lambda record, memory: self.find_destination(record, memory, decode))

    @abstractmethod
    def find_destination(self, record: Record, memory: object, decode: bool) -> Destination:
        """Check the memory that the caller gave for a record's tensor, and return the range that receives it.

        Nothing is written to it yet, and nothing allocated for it.

        Raises
        ------
        ValueError
            Another shape, dtype, size or device, or it cannot be written in place; see `into.misfit`.
        TypeError
            It is no memory; see `into.foreign_memory`.
        """

    @abstractmethod
    def open_upload(
        self,
        segments: Sequence[Segment],
        *,
        pool: WorkerPool,
        stats: LoadStats,
        decode: bool,
        copy: bool,
        memory_limit: int,
        keeps_all: bool,
        into: Mapping[str, Destination],
    ) -> Upload[Any, Tensor]:
        """Start the upload of one load. The caller must close it.

        Parameters
        ----------
        segments : sequence of Segment
            The segments to come, in manifest order.
        pool : WorkerPool
            The load's threads. They have started if files are fetched, or if the device `needs_serial_thread`.
        stats : LoadStats
            Receives the time that each phase takes.
        decode : bool
            Expand float32 stored as bfloat16; otherwise tensors keep the stored bits.
        copy : bool
            Give each tensor memory of its own, even where a view of the file would do.
        memory_limit : int
            Bytes of memory for segments that are not placed yet.
        keeps_all : bool
            Whether the load keeps all its tensors, so that memory for all of them may be allocated now.
        into : mapping of str to Destination
            The result of `check_into`. These tensors are written there, and `Upload.place` yields their
            `Destination.owner`. No thread writes to them any more when the upload is closed.
        """

    @abstractmethod
    def discard(self, tensors: dict[str, Tensor]) -> None:
        """Free tensors and empty `tensors`; free the device, too, unless the caller opened it.

        None of them is memory of the caller's. The device cannot be used afterwards.
        """


class Upload(ABC, Generic[Staged, Tensor]):
    """The upload of one load to a device.

    Workers stage the bytes of segments; the caller's thread places them as tensors. An upload is a context manager that
    closes itself at the end.
    """

    @abstractmethod
    def stage(self, file: BinaryIO, segment: Segment) -> Staged:
        """Read a segment from its shard's open file, and prepare it for `place`. Several workers call this at once."""

    @abstractmethod
    def place(self, staged: Staged, segment: Segment) -> Iterator[tuple[Record, Tensor]]:
        """Yield the segment's tensors in the order of its records; that of a cut record with its last part.

        Only the caller's thread calls this, once for each segment, in manifest order.

        Parameters
        ----------
        staged
            The result of `stage`.
        segment : Segment
        """

    @abstractmethod
    def finish(self) -> None:
        """Wait until the device has all the bytes that were placed."""

    @abstractmethod
    def close(self) -> None:
        """Free everything but the tensors that `place` has yielded.

        Call this only when no thread is in `stage` or `place`. It never fails, and a second call does nothing.
        """

    def __enter__(self) -> Upload[Staged, Tensor]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
