"""Call wgpu where no signal handler can interrupt it.

Python runs signal handlers on the main thread, between any two steps of Python code. wgpu's library calls back into
Python. If a handler raises there, as Ctrl-C does, the exception is printed and lost, and the callback's own result is
lost, too: wgpu raises an AssertionError, or a thread waits forever. So the main thread lets another thread make the
call, and waits for it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from ...workers.threads import raise_hidden_interrupt

__all__ = ["CallThread", "nothing_to_undo", "open_call_thread", "shielded"]

T = TypeVar("T")

#: Seconds between calls of `poll`. On Windows, Ctrl-C is only noticed this often.
_TICK = 0.1
#: Seconds for which a call may still run after an interrupt before it is abandoned.
_GRACE = 0.8


def shielded(
    work: Callable[[], T],
    *,
    poll: Callable[[], None] | None = None,
    undo: Callable[[T], object] | None = None,
    thread: CallThread | None = None,
) -> T:
    """Return ``work()``, which another thread runs if this one could be interrupted.

    An exception that interrupts the wait is raised once `work` has ended.

    Parameters
    ----------
    work : callable
    poll : callable, optional
        Called about every 0.1 s; an exception that it raises interrupts the wait.
    undo : callable, optional
        Called with the result if an interrupt keeps the caller from getting it. Drivers sometimes take long. With
        `undo`, a call that still runs 0.8 s after an interrupt is abandoned: it goes on alone, and its exception is
        lost.
    thread : CallThread, optional
        Makes the call; for many calls this is faster than to start a thread for each. Do not give `undo` as well: the
        thread would make no other call until an abandoned one ends.
    """
    if poll is None and threading.current_thread() is not threading.main_thread():
        return work()
    call = _Call(work, undo)
    try:
        call.start(thread)
        call.wait(poll)
        call.join()
    except BaseException:
        call.abandon()
        raise
    return call.result()


def nothing_to_undo(result: object) -> None:
    """Do nothing: the `undo` of a call that leaves nothing behind."""


class CallThread:
    """A thread that makes shielded calls, one after the other. See `open_call_thread`."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=_make_calls, args=(self._calls,), name="ndcache-calls", daemon=True)

    def start(self) -> CallThread:
        """Start the thread. Call this through `shielded`."""
        self._thread.start()
        return self

    def submit(self, call: Callable[[], None]) -> None:
        """Make a call, which must not raise, when its turn comes."""
        self._calls.put(call)

    def end(self) -> None:
        """Wait for the calls that were submitted, and end the thread."""
        self._calls.put(None)
        self._thread.join()

    def __del__(self) -> None:
        self._calls.put(None)  # in case an interrupt kept `end` from being called


def open_call_thread() -> CallThread | None:
    """Start a thread for shielded calls, or return None if Python is shutting down and starts no more threads."""

    def start() -> CallThread | None:
        try:
            return CallThread().start()
        except RuntimeError:
            return None

    return shielded(start, undo=lambda thread: None if thread is None else thread.end())


def _make_calls(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # or it would keep its result alive until the next one


class _Call(Generic[T]):
    """One shielded call, made by another thread.

    It has no lock, as an interrupt could leave that locked. Instead, the caller and the other thread compete for
    tokens: the first to take one decides.

    Attributes
    ----------
    _start_token : list
        Taken by the other thread to begin the work, or by the caller so that it never begins.
    _end_token : list
        Taken by the other thread when it hands its result over, or by the caller when it abandons the call.
    """

    def __init__(self, work: Callable[[], T], undo: Callable[[T], object] | None) -> None:
        self._work = work
        self._undo = undo
        self._start_token = [True]
        self._end_token = [True]
        self._has_ended = False
        self._wake_up: SimpleQueue[None] = SimpleQueue()
        self._results: list[T] = []
        self._error: BaseException | None = None
        # Made only when it is started. Until then, it and this object would refer to each other: the garbage collector
        # could drop wgpu's objects on the main thread, and Ctrl-C in one of their destructors would be lost.
        self._thread: threading.Thread | None = None

    def start(self, thread: CallThread | None) -> None:
        """Begin in `thread`, or a new one; in this thread if no more can start."""
        if thread is not None:
            thread.submit(self._run)
            return
        self._thread = threading.Thread(target=self._run, name="ndcache-device", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise_hidden_interrupt(error)
            self._run()  # No thread can start: Python is shutting down, or the system's limit is reached.

    def wait(self, poll: Callable[[], None] | None = None, deadline: float = math.inf) -> bool:
        """Wait for the end of the work; return whether it came before the deadline."""
        while not self._has_ended and time.monotonic() < deadline:
            try:
                self._wake_up.get(timeout=_TICK)
            except Empty:
                if poll is not None:
                    poll()
        return self._has_ended

    def abandon(self) -> None:
        """Give up the result after an interrupt: prevent, abandon or undo the work."""
        if _take(self._start_token):
            self._join_despite_interrupts()
            return  # The work will never begin.
        can_leave = self._undo is not None
        if can_leave and not self._wait_despite_interrupts(time.monotonic() + _GRACE) and _take(self._end_token):
            return  # The other thread will find the token taken, and undo its work.
        self._wait_despite_interrupts(math.inf)
        self._join_despite_interrupts()
        undo, results = self._undo, self._results
        if undo is not None and results:
            shielded(lambda: undo(results.pop()))

    def join(self) -> None:
        """Wait for the end of the thread, whose work is done."""
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def result(self) -> T:
        """Return the result of the work, or raise its error."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # or the error would refer to itself, through the traceback
        return self._results.pop()

    def _run(self) -> None:
        if not _take(self._start_token):
            return
        try:
            self._results.append(self._work())
        except BaseException as error:
            self._error = error
        if _take(self._end_token):
            self._has_ended = True
            self._wake_up.put(None)
        elif self._undo is not None and self._results:
            self._undo(self._results.pop())

    # The first interrupt is the one that will be raised; these two ignore any that follow.

    def _wait_despite_interrupts(self, deadline: float) -> bool:
        while True:
            with suppress(BaseException):
                return self.wait(deadline=deadline)

    def _join_despite_interrupts(self) -> None:
        if self._thread is None:
            return
        deadline = time.monotonic() + _GRACE
        while True:
            try:
                self._thread.join()
                return
            except RuntimeError:  # It has not started: not yet, or never, if the interrupt came first.
                if time.monotonic() > deadline:
                    return
                time.sleep(0.001)
            except BaseException:
                continue


def _take(token: list[bool]) -> bool:
    try:
        token.pop()
    except IndexError:
        return False
    return True
