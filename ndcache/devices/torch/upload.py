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
from .api import CudaApi
from .framework import translated_errors
from .memory import Allocator, SegmentTensors
from .pinned import Lane, return_lane, take_lane

if TYPE_CHECKING:
    import torch

__all__ = ["CudaUpload"]


@dataclass(eq=False)
class StagedSegment:
    """A segment whose bytes are on their way to the device.

    Attributes
    ----------
    tensors : SegmentTensors
    lane : Lane
        Its stream completes them.
    """

    tensors: SegmentTensors
    lane: Lane


class CudaUpload(Upload[StagedSegment, "torch.Tensor"]):
    """Upload the segments of one load.

    Each worker has a lane: it reads pieces of files into two slots of pinned memory of its own, in turn, and a stream
    of its own copies them from there to the tensors, or expands bfloat16 on its way. So no thread waits for another
    one's work.

    The tensors belong to the caller's stream, the one that is PyTorch's current one when the load begins, as if the
    caller had made them. PyTorch gives out memory again that is still in use by work that this stream has to do, so
    lanes wait for that after each allocation.

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
        self._in_use: set[StagedSegment] = set()  # what a stream may still write to

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
        check_size(file, segment)
        with translated_errors(self._api.device):
            lane = self._lane()
            self._in_use.add(staged := StagedSegment(self._tensors(segment), lane))
            with self._api.active():
                if not (self._keeps_all and lane.follows_caller):
                    self._api.follow(lane.stream, self._caller)
                    lane.follows_caller = True
                with self._stats.timed("read", file=segment.shard.data_path, nbytes=segment.nbytes):
                    self._read(file, segment.shard, staged)
        return staged

    def place(self, staged: StagedSegment, segment: Segment) -> Iterator[tuple[Record, torch.Tensor]]:
        if not self._keeps_all:
            with translated_errors(self._api.device), self._api.active():
                self._api.synchronize(staged.lane.stream)
            self._in_use.discard(staged)
        if segment.ends_record:
            self._allocator.forget(segment)
            yield from zip(segment.records, staged.tensors.tensors, strict=True)

    def finish(self) -> None:
        with translated_errors(self._api.device), self._api.active():
            for lane in self._lanes:
                self._api.synchronize(lane.stream)

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
        # The tensors one by one, as the traceback of an error may refer to what has them.
        for tensors in [*self._allocated.values(), *(staged.tensors for staged in self._in_use)]:
            tensors.clear()
        self._allocated.clear()
        self._in_use.clear()
        self._allocator.clear()

    def _lane(self) -> Lane:
        """Return this thread's lane."""
        lane: Lane | None = getattr(self._this_thread, "lane", None)
        if lane is None:
            with self._stats.timed("staging"), self._api.active():
                lane = self._this_thread.lane = take_lane(self._api)
            self._lanes.append(lane)
        return lane

    def _tensors(self, segment: Segment) -> SegmentTensors:
        """Return a segment's tensors with their plan."""
        tensors = self._allocated.pop(_key(segment), None)
        if tensors is None:
            with self._api.on(self._caller):  # each thread has a current stream of its own
                tensors = self._allocator.allocate(segment)
        try:
            self._allocator.plan(tensors, segment)
        except BaseException:
            tensors.clear()
            raise
        return tensors

    def _read(self, file: BinaryIO, shard: Shard, staged: StagedSegment) -> None:
        """Read a segment's pieces into the slots of its lane, and let the stream copy them."""
        api, lane = self._api, staged.lane
        slots, stream = lane.slots, lane.stream
        for read in staged.tensors.reads:
            slot, event = lane.next_slot()
            if not api.has_happened(event):
                api.wait(event)
            read_into(file, read.offset, slots.views[slot][: read.nbytes], shard)
            first = slots.starts[slot]
            for offset, nbytes, tensor, start, expands in read.copies:
                if expands:
                    api.expand(tensor, start * 2, slots, first + offset, nbytes, stream)
                else:
                    api.copy(tensor, start, slots, first + offset, nbytes, stream)
            api.record(event, stream)


def _key(segment: Segment) -> Hashable:
    """Return what tells a segment from others of the load, and takes less time to hash."""
    return segment.shard.data_path, segment.records[:1], segment.part
