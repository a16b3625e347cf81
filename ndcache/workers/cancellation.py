"""Cancellation of all threads of a load."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import CancelledError
from .stall import StallWatch
from .threads import call_when_main_thread_ends, main_thread_has_ended

__all__ = ["Cancellation"]

#: The most seconds of one wait; Python refuses some years.
_LONGEST_WAIT = 3600.0


@dataclass(eq=False)
class Cancellation:
    """Cancel the threads of one load.

    The caller's thread sets it. The workers check it and sleep on it, and it shuts down the sockets that they wait for,
    so that none of them hangs on a server that does not answer.

    Once the main thread has ended, a load continues only if Python waits for the load's consumer, the thread that wants
    its result.

    Parameters
    ----------
    cancel : threading.Event, optional
        The caller's own event, which cancels as well.
    parent : Cancellation, optional
        A cancellation that includes these threads and others; see `child`.
    """

    cancel: threading.Event | None = None
    parent: Cancellation | None = None
    _pid: int = field(default_factory=os.getpid, init=False)
    _event: threading.Event = field(default_factory=threading.Event, init=False)
    _watches: set[StallWatch] = field(default_factory=set, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _callbacks: list[Callable[[], None]] = field(default_factory=list, init=False)
    _consumer: threading.Thread = field(default_factory=threading.current_thread, init=False)
    _began_late: bool = field(default_factory=main_thread_has_ended, init=False)

    def __post_init__(self) -> None:
        _live[id(self)] = self

    def child(self) -> Cancellation:
        """Return a cancellation of some of the threads, which leaves the others alone."""
        return Cancellation(parent=self)

    @property
    def is_set(self) -> bool:
        """Return whether this or a parent was cancelled."""
        return self._event.is_set() or (self.parent is not None and self.parent.is_set)

    def set(self) -> None:
        """Cancel: wake the sleepers and shut down the sockets."""
        if os.getpid() != self._pid:
            return  # A forked process shares its parent's sockets, but not the load.
        with self._lock:
            self._event.set()
            watches = list(self._watches)
        for watch in watches:
            watch.wake()
        for callback in self._callbacks:
            callback()

    def on_set(self, callback: Callable[[], None]) -> None:
        """Call `callback`, perhaps more than once, when this is cancelled."""
        self._callbacks.append(callback)

    def check(self) -> None:
        """Raise `CancelledError` if this, a parent, or the caller's event was set."""
        if self.parent is not None:
            self.parent.check()
        if self.cancel is not None and self.cancel.is_set():
            self.set()
        if main_thread_has_ended() and self._is_abandoned:
            self.set()
            raise CancelledError(
                "the load was cancelled, as Python is shutting down",
                hint="Python waits only for threads that are not daemons: load in one of them, or finish the load "
                "earlier.",
            )
        if self._event.is_set():
            raise CancelledError("the load was cancelled", hint="Shards that were complete are kept.")

    def poll(self) -> None:
        """Raise as `check` does, and end stalled requests. The caller's thread calls this while it waits."""
        self.check()
        with self._lock:
            watches = list(self._watches)
        for watch in watches:
            watch.poll()

    def sleep(self, seconds: float) -> None:
        """Sleep, and raise as `check` does as soon as this is cancelled."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            self._event.wait(min(left, _LONGEST_WAIT if self.cancel is None else 0.1))
        self.check()

    def resume(self) -> None:
        """Record that this thread now wants the result, perhaps instead of another; raise as `check` does."""
        self._consumer = threading.current_thread()
        self.check()

    def add(self, watch: StallWatch) -> None:
        """Register `watch`, to be polled for stalls and woken on cancellation; if that has come, wake it at once."""
        with self._lock:
            self._watches.add(watch)
            is_set = self._event.is_set()
        if is_set:
            watch.wake()
        if self.parent is not None:
            self.parent.add(watch)

    def remove(self, watch: StallWatch) -> None:
        """Unregister `watch`, whose request is done."""
        if self.parent is not None:
            self.parent.remove(watch)
        with self._lock:
            self._watches.discard(watch)

    @property
    def _is_abandoned(self) -> bool:
        """Return whether no thread will take the result, now that the main thread has ended."""
        if self.parent is not None or self._began_late:  # A late load has no workers: its consumer does the work.
            return False
        consumer = self._consumer
        return consumer is threading.main_thread() or consumer.daemon or not consumer.is_alive()


#: All cancellations by their ids, so that loads whose consumer is gone do not delay the end of Python. Not a WeakSet:
#: iterating over one fails when another thread begins a load meanwhile, and Python then skips its other exit hooks.
_live: weakref.WeakValueDictionary[int, Cancellation] = weakref.WeakValueDictionary()


def _cancel_abandoned() -> None:
    for reference in _live.valuerefs():
        cancellation = reference()
        if cancellation is not None and cancellation._is_abandoned:
            cancellation.set()


call_when_main_thread_ends(_cancel_abandoned)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_live.clear)
