"""How all threads of one load are stopped at once, and how one is that waits for a server in vain."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..errors import CancelledError

__all__ = ["Cancellation", "StallWatch", "is_ending", "raise_hidden_interrupt"]

#: Bytes per second below which a server does not send but drips.
_MIN_RATE = 1024
#: How finely the time is divided in which that is measured.
_MARKS = 20


@dataclass(eq=False)
class StallWatch:
    """One request's wait for its server, as the thread sees it that may have to end it.

    Attributes
    ----------
    patience : float
        Seconds after which the wait is in vain, if fewer than 1 KiB for each of them came.
    wakers : list of callables
        Called to end the wait; see `add_waker`.
    waiting : bool
        Whether the request's thread waits now. What it takes to write and hash is not the server's fault.
    overdue : bool
        Whether the wait was ended because it was in vain.
    reused : bool
        Whether the request went out on a connection that had been used before.
    is_connected : bool
        Whether there is a connection, with TLS if it is to have it.
    is_woken : bool
        Whether the wait was ended, for whatever reason.
    """

    patience: float
    wakers: list[Callable[[], None]] = field(default_factory=list)
    waiting: bool = True
    overdue: bool = False
    reused: bool = False
    is_connected: bool = False
    is_woken: bool = field(default=False, init=False)
    _nbytes: int = 0
    _marks: deque[tuple[float, int]] = field(default_factory=deque)  # when, and what had come

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Be patient anew from now on."""
        self._marks = deque([(time.monotonic(), self._nbytes)])

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Something else has its own limit of time in the block."""
        self.waiting = False
        try:
            yield
        finally:
            self.restart()
            self.waiting = True

    def received(self, nbytes: int) -> None:
        """Something came."""
        self._nbytes += nbytes

    def add_waker(self, waker: Callable[[], None]) -> None:
        """Know of one more way to end the wait; if it was to end already, end it."""
        self.wakers.append(waker)
        if self.is_woken:  # looked at after the waker is known, as `wake` does it the other way round
            waker()

    def wake(self) -> None:
        """End the wait."""
        self.is_woken = True
        for waker in list(self.wakers):
            waker()

    def poll(self) -> None:
        """End the wait if it is in vain."""
        if not self.waiting:
            self.restart()
            return
        now = time.monotonic()
        while len(self._marks) > 1 and self._marks[1][0] <= now - self.patience:
            self._marks.popleft()
        since, before = self._marks[0]
        if since <= now - self.patience and self._nbytes - before < _MIN_RATE * self.patience:
            self.overdue = True
            self.wake()
            self.restart()
        elif now - self._marks[-1][0] >= self.patience / _MARKS:
            self._marks.append((now, self._nbytes))


#: All there are, so that none whose consumer is gone holds up the end of the interpreter.
_live: weakref.WeakSet[Cancellation] = weakref.WeakSet()
_main_thread_has_ended = threading.Event()


def is_ending() -> bool:
    """Whether the main thread has come to its end, so that no thread can begin any more."""
    return _main_thread_has_ended.is_set()


def raise_hidden_interrupt(error: RuntimeError) -> None:
    """Raise the exception of a signal handler that became `error`, if one did.

    `Thread.start` waits on a condition. An exception that comes just before the condition's lock is taken again leaves
    its ``with`` block, which then cannot release the lock: a RuntimeError comes out, with the first one as its context.
    """
    if error.__context__ is not None and "lock" in str(error):
        raise error.__context__ from None


def _main_thread_ends() -> None:
    _main_thread_has_ended.set()
    for cancellation in list(_live):
        if cancellation._is_abandoned:
            cancellation.set()


try:
    # Before concurrent.futures, whose own hook joins the workers: the last to register is the first to be called.
    import concurrent.futures.thread  # noqa: F401

    if hasattr(threading, "_register_atexit"):
        threading._register_atexit(_main_thread_ends)
except RuntimeError:  # Python is ending, and this was not imported before
    _main_thread_has_ended.set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_live.clear)


@dataclass(eq=False)
class Cancellation:
    """The order to stop, for all threads of one load.

    The caller's thread sets it; the workers look at it, sleep on it, and have their sockets shut under them by it, so
    that none waits for a server that does not answer. When the main thread ends, a load goes on only if Python waits
    for the thread that waits for the load.

    Parameters
    ----------
    cancel : threading.Event, optional
        The caller's own event, looked at wherever this one is.
    parent : Cancellation, optional
        One for more threads than these, which stops these as well; see `branch`.
    """

    cancel: threading.Event | None = None
    parent: Cancellation | None = None
    _pid: int = field(default_factory=os.getpid, init=False)
    _event: threading.Event = field(default_factory=threading.Event, init=False)
    _watches: set[StallWatch] = field(default_factory=set, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _when_set: list[Callable[[], None]] = field(default_factory=list, init=False)
    _consumer: threading.Thread = field(default_factory=threading.current_thread, init=False)
    _began_late: bool = field(default_factory=is_ending, init=False)

    def __post_init__(self) -> None:
        _live.add(self)

    def branch(self) -> Cancellation:
        """A stop for some of the threads, which leaves the others alone."""
        return Cancellation(parent=self)

    @property
    def is_set(self) -> bool:
        """Whether the order has been given, here or further up."""
        return self._event.is_set() or (self.parent is not None and self.parent.is_set)

    @property
    def _is_abandoned(self) -> bool:
        """Whether nobody will take what is loaded, now that the main thread has ended."""
        if self.parent is not None or self._began_late:  # late, there are no threads: who loads is at work
            return False
        consumer = self._consumer
        return consumer is threading.main_thread() or consumer.daemon or not consumer.is_alive()

    def set(self) -> None:
        """Stop everything: wake the sleepers, shut the sockets."""
        if os.getpid() != self._pid:
            return  # a fork has the parent's sockets, but not its load
        with self._lock:
            self._event.set()
            watches = list(self._watches)
        for watch in watches:
            watch.wake()
        for callback in self._when_set:
            callback()

    def on_set(self, callback: Callable[[], None]) -> None:
        """Call `callback`, perhaps more than once, when the order is given."""
        self._when_set.append(callback)

    def resume(self) -> None:
        """The consumer goes on, perhaps in another thread than before; raises as `check` does."""
        self._consumer = threading.current_thread()
        self.check()

    def poll(self) -> None:
        """What the caller's thread does now and then while it waits: end what is cancelled, or waits in vain."""
        self.check()
        with self._lock:
            watches = list(self._watches)
        for watch in watches:
            watch.poll()

    def check(self) -> None:
        """Raise `CancelledError` if the order has been given."""
        if self.parent is not None:
            self.parent.check()
        if self.cancel is not None and self.cancel.is_set():
            self.set()
        if is_ending() and self._is_abandoned:
            self.set()
            raise CancelledError(
                "the load was stopped, as Python is shutting down",
                hint="Python waits for threads that are not daemons: load in one of them, or end the load before.",
            )
        if self._event.is_set():
            raise CancelledError("the load was cancelled", hint="The shards that had come are kept.")

    def sleep(self, seconds: float) -> None:
        """Wait, or raise `CancelledError` as soon as the order is given."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            self._event.wait(left if self.cancel is None else min(left, 0.1))
        self.check()

    def add(self, watch: StallWatch) -> None:
        """End the wait of `watch` when the order is given (at once, if it has been), or when it is in vain."""
        with self._lock:
            self._watches.add(watch)
            given = self._event.is_set()
        if given:
            watch.wake()
        if self.parent is not None:
            self.parent.add(watch)

    def remove(self, watch: StallWatch) -> None:
        """`watch` has ended."""
        if self.parent is not None:
            self.parent.remove(watch)
        with self._lock:
            self._watches.discard(watch)
