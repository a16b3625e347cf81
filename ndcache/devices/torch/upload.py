"""The upload of one load to CUDA: from files through pinned memory to tensors."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from ...format.manifest import Record, Shard
from ...stats import LoadStats
from ..base import Upload
from ..reading import check_size, read_into
from ..segments import Segment
from .driver import CudaApi
from .library import translated_errors
from .memory import Allocator, SegmentTensors, plan_reads
from .pinned import PIECE_BYTES, Lane, return_lane, take_lane

if TYPE_CHECKING:
    import torch

__all__ = ["CudaUpload"]

#: Bytes of bfloat16 that are expanded in one go. A load that keeps all its tensors has as much more memory in use.
_EXPANDED_AT_ONCE = 256 << 20


@dataclass(eq=False)
class StagedSegment:
    """A segment whose bytes are on their way to the device.

    Attributes
    ----------
    tensors : SegmentTensors
    temp : torch.Tensor or None
        The bytes of tensors that are to be expanded.
    lane : Lane
        Its stream makes the copies.
    """

    tensors: SegmentTensors
    temp: torch.Tensor | None
    lane: Lane


class CudaUpload(Upload[StagedSegment, "torch.Tensor"]):
    """Upload the segments of one load.

    Each worker has a lane: it reads pieces of files into two slots of pinned memory of its own, in turn, and a stream
    of its own copies them from there to the tensors. The tensors belong to the caller's stream, the one that is
    PyTorch's current one when the load begins, as if the caller had made them. It also expands bfloat16.

    PyTorch gives out memory again that is still in use by work that the caller's stream has to do. So workers' streams
    wait for that after each allocation.

    Parameters
    ----------
    api : CudaApi
    allocator : Allocator
    stats : LoadStats
    keeps_all : bool
        See `Device.open_upload`. If so, tensors are complete only after `finish`.
    """

    def __init__(self, api: CudaApi, allocator: Allocator, stats: LoadStats, *, keeps_all: bool) -> None:
        self._api = api
        self._allocator = allocator
        self._stats = stats
        self._keeps_all = keeps_all
        self._caller = api.caller_stream()
        self._this_thread = threading.local()
        self._lanes: list[Lane] = []
        self._allocated: dict[Hashable, SegmentTensors] = {}
        self._in_use: set[StagedSegment] = set()  # those that a stream may still write to
        self._unexpanded: list[StagedSegment] = []

    def allocate(self, segments: Sequence[Segment]) -> None:
        """Allocate the tensors of all segments now. If that fails, nothing is kept."""
        with translated_errors(self._api.device), self._stats.timed("buffers"):
            try:
                self._api.reserve(self._allocator.sizes(segments))
                for segment in segments:
                    self._allocated[_key(segment)] = self._allocator.allocate(segment)
            except BaseException:
                self._drop_tensors()
                raise

    def stage(self, file: BinaryIO, segment: Segment) -> StagedSegment:
        check_size(file, segment.shard)
        with translated_errors(self._api.device):
            tensors = self._allocated.pop(_key(segment), None) or self._allocator.allocate(segment)
            temp = self._allocator.bytes(tensors.temp_bytes) if tensors.temp_bytes else None
            with self._api.active():
                staged = StagedSegment(tensors, temp, self._lane())
                self._in_use.add(staged)
                if temp is not None or not self._keeps_all:
                    self._api.follow(staged.lane.stream, self._api.handle(self._caller))
                with self._stats.timed("read", file=segment.shard.data_path, nbytes=segment.nbytes):
                    self._read(file, segment.shard, staged)
        return staged

    def place(self, staged: StagedSegment, segment: Segment) -> Iterator[tuple[Record, torch.Tensor]]:
        with translated_errors(self._api.device):
            if staged.temp is not None:
                self._unexpanded.append(staged)
            if not self._keeps_all:
                self._complete(staged)
            elif sum(each.tensors.temp_bytes for each in self._unexpanded) >= _EXPANDED_AT_ONCE:
                self._expand()
        if segment.part is not None and segment.ends_record:
            self._allocator.forget(segment.records[0])
        if segment.ends_record:
            yield from zip(segment.records, staged.tensors.tensors, strict=True)

    def finish(self) -> None:
        with translated_errors(self._api.device):
            self._expand()
            with self._api.active():
                for stream in [*(lane.stream for lane in self._lanes), self._api.handle(self._caller)]:
                    self._api.synchronize(stream)

    def close(self) -> None:
        try:
            self._close()
        finally:
            self._close()  # once more, in case Ctrl-C interrupted it

    def _close(self) -> None:
        with suppress(RuntimeError), self._api.active():  # of a device that has failed
            for lane in self._lanes:
                self._api.synchronize(lane.stream)
            while self._lanes:
                return_lane(self._lanes.pop())
        self._lanes.clear()
        self._drop_tensors()

    def _drop_tensors(self) -> None:
        self._allocated.clear()
        self._in_use.clear()
        self._unexpanded.clear()
        self._allocator.clear()

    def _complete(self, staged: StagedSegment) -> None:
        """Wait until a segment's tensors are complete."""
        self._expand()
        with self._api.active():
            self._api.synchronize(staged.lane.stream)
            if staged.temp is not None:
                self._api.synchronize(self._api.handle(self._caller))
        self._in_use.discard(staged)

    def _lane(self) -> Lane:
        """Return this thread's lane."""
        lane: Lane | None = getattr(self._this_thread, "lane", None)
        if lane is None:
            with self._stats.timed("staging"):
                lane = self._this_thread.lane = take_lane(self._api)
            self._lanes.append(lane)
            self._api.follow(lane.stream, self._api.handle(self._caller))
        return lane

    def _read(self, file: BinaryIO, shard: Shard, staged: StagedSegment) -> None:
        api, lane = self._api, staged.lane
        for read in plan_reads(staged.tensors.all_copies(staged.temp), PIECE_BYTES):
            slot = lane.next_slot()
            read_into(file, read.offset, lane.slots.views[slot][: read.nbytes], shard)
            first = slot * PIECE_BYTES - read.offset
            for copy in read.copies:
                api.copy(copy.tensor, copy.start, lane.slots, first + copy.offset, copy.nbytes, lane.stream)
            lane.end_slot(slot)

    def _expand(self) -> None:
        """Expand what has been placed, in few large operations, and free the memory that it came from."""
        import torch

        if not self._unexpanded:
            return
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for staged in self._unexpanded:
            assert staged.temp is not None
            targets += staged.tensors.targets
            sources += staged.tensors.sources(staged.temp)
            staged.temp = None
        with self._api.active():
            for lane in list(self._lanes):
                self._api.follow(self._api.handle(self._caller), lane.stream)
        with self._api.on(self._caller), torch.no_grad():
            torch._foreach_copy_(targets, sources)
        self._in_use.difference_update(self._unexpanded)
        self._unexpanded.clear()


def _key(segment: Segment) -> Hashable:
    """Return what tells a segment from others of the load, and takes less time to hash."""
    return segment.shard.data_path, segment.records[:1], segment.part
