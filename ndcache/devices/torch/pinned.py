"""Pinned memory, in which each reading thread receives its pieces of files, and the streams that copy them.

Memory that CUDA or PyTorch pin costs 0.35 ms a MiB to make, one thread at a time. Anonymous memory in huge pages,
touched and registered by each thread for itself, costs 0.1 ms a MiB, in all threads at once. It is kept for later loads
of this process, 8 MiB for each of at most 18 threads a device.
"""

from __future__ import annotations

import atexit
import logging
import mmap
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .api import CudaApi

if TYPE_CHECKING:
    import torch

__all__ = ["PIECE_BYTES", "Lane", "Slots", "free_idle_lanes", "return_lane", "take_lane"]

logger = logging.getLogger("ndcache")

#: The bytes that are read and copied at once. Smaller pieces cost more calls; larger ones leave the processor's cache
#: before they are copied, and their slots take longer to make.
PIECE_BYTES = 4 << 20
_SLOTS = 2
_HUGE_PAGE = 2 << 20
#: Linux's advice, which `mmap` does not name, to give forked processes zeros in the place of some memory.
_MADV_WIPEONFORK = 18
#: The most lanes of a device that are kept for later loads: those of 16 workers, and of the two spare threads that a
#: pool has.
_MOST_IDLE = 18

#: The lanes that no load uses, by device and kind of API.
_idle: dict[tuple[torch.device, type[CudaApi]], list[Lane]] = {}


@dataclass(frozen=True)
class Slots:
    """Pinned memory for two pieces: one is copied while the other is filled.

    Attributes
    ----------
    tensor : torch.Tensor
        The memory, of dtype uint8.
    views : list of memoryview
        One for each slot.
    starts : list of int
        Where each slot begins in the memory.
    address : int
        Where it begins.
    is_registered : bool
        Whether `address` must be unregistered; otherwise it is PyTorch's.
    device_address : int
        Where it begins for programs that run on the device; 0 if they cannot read it.
    """

    tensor: torch.Tensor
    views: list[memoryview]
    starts: list[int]
    address: int
    is_registered: bool
    device_address: int = 0


def _pin(api: CudaApi) -> Slots:
    import torch

    nbytes = _SLOTS * PIECE_BYTES
    tensor, is_registered = torch.from_numpy(_huge_pages(nbytes)), True
    try:
        api.register(tensor.data_ptr(), nbytes)
    except RuntimeError as error:  # some sandboxes cannot register memory
        logger.debug("PyTorch pins memory, as it cannot be registered: %s", error)
        tensor, is_registered = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), False
    whole, starts = memoryview(tensor.numpy()), list(range(0, nbytes, PIECE_BYTES))
    views = [whole[start : start + PIECE_BYTES] for start in starts]
    address = tensor.data_ptr()
    return Slots(tensor, views, starts, address, is_registered, api.device_address(address))


def _huge_pages(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return anonymous memory in huge pages, if the system has them, with each page touched."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(nbytes, np.uint8)
    pages = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    # The device would go on reading the parent's pages if a fork made the parent's next write go to a copy.
    try:
        pages.madvise(_MADV_WIPEONFORK)
    except OSError:  # Linux before 4.14
        pages.madvise(mmap.MADV_DONTFORK)
    whole = np.frombuffer(pages, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE
    memory = whole[start : start + nbytes]
    memory[:: mmap.PAGESIZE] = 0
    return memory


class Lane:
    """The slots of one reading thread, and the stream that copies what is in them.

    Parameters
    ----------
    api : CudaApi
    slots : Slots
    stream
        A stream of `api`.
    events : list
        An event of `api` for each slot. It has happened if the slot was copied, or never filled.

    Attributes
    ----------
    follows_caller : bool
        Whether the stream waits for all that the caller's stream had to do when memory was allocated.
    """

    def __init__(self, api: CudaApi, slots: Slots, stream: Any, events: list[Any]) -> None:
        self.api = api
        self.slots = slots
        self.stream = stream
        self.follows_caller = False
        self._events = events
        self._next = 0

    def next_slot(self) -> tuple[int, Any]:
        """Return the next slot to fill, and its event, which must have happened before."""
        slot, self._next = self._next, (self._next + 1) % _SLOTS
        return slot, self._events[slot]

    def free(self) -> None:
        """Free everything. The stream must have nothing to do, and the API must be active."""
        self.api.free_stream(self.stream)
        for event in self._events:
            self.api.free_event(event)
        if self.slots.is_registered:
            self.api.unregister(self.slots.address)


def take_lane(api: CudaApi) -> Lane:
    """Return a lane that no load uses, or a new one. `api` must be active."""
    try:
        return _idle.setdefault((api.device, type(api)), []).pop()
    except IndexError:
        return _open_lane(api)


def _open_lane(api: CudaApi) -> Lane:
    with ExitStack() as undo:
        slots = _pin(api)
        if slots.is_registered:  # memory must not be unmapped before that is undone
            undo.callback(api.unregister, slots.address)
        stream = api.new_stream()
        undo.callback(api.free_stream, stream)
        events = []
        for _ in range(_SLOTS):
            events.append(event := api.new_event())
            undo.callback(api.free_event, event)
        undo.pop_all()
    return Lane(api, slots, stream, events)


def return_lane(lane: Lane) -> None:
    """Keep a lane for later loads, or free it. Its stream must have nothing to do, and its API must be active."""
    lane.follows_caller = False
    idle = _idle.setdefault((lane.api.device, type(lane.api)), [])
    if len(idle) < _MOST_IDLE:
        idle.append(lane)
    else:
        lane.free()


def free_idle_lanes() -> None:
    """Free the pinned memory that no load uses. Errors of a device that has failed are ignored."""
    for lanes in list(_idle.values()):
        while lanes:
            lane = lanes.pop()
            with suppress(RuntimeError), lane.api.active():
                lane.free()


atexit.register(free_idle_lanes)
if hasattr(os, "register_at_fork"):
    # CUDA cannot be used in a forked child, and the memory is not there.
    os.register_at_fork(after_in_child=_idle.clear)
