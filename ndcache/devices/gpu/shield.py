"""Calls into wgpu that an exception of a signal handler must not reach, KeyboardInterrupt above all.

wgpu's library calls back into Python. What a signal handler raises there is printed and lost, and so is what the
callback had to say: an AssertionError comes out, or a thread waits without end. Python runs signal handlers on the main
thread only, so the main thread has another one make such a call, and waits for it.
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

#: Seconds between looks at what else may end a wait. Also what lets Ctrl-C through on Windows.
_TICK = 0.1
#: Seconds that a call which can be left alone gets to end after an interrupt.
_GRACE = 0.8


def shielded(
    work: Callable[[], T],
    *,
    poll: Callable[[], None] | None = None,
    undo: Callable[[T], object] | None = None,
    thread: CallThread | None = None,
) -> T:
    """Return ``work()``, which another thread runs if this one could be interrupted.

    Whatever interrupts the wait is raised once `work` has ended.

    Parameters
    ----------
    work : callable
    look : callable, optional
        Called about every 0.1 s, to raise what is to end the wait.
    undo : callable, optional
        Takes the result that nobody gets because the wait was interrupted. With it, `work` may be left to end by itself
        when it takes longer, as drivers sometimes do: nothing of it may then matter to anybody else.
    thread : CallThread, optional
        Where there are many calls: to start a thread for each takes longer. Its calls cannot be left.
    """
    if poll is None and threading.current_thread() is not threading.main_thread():
        return work()
    call = _Call(work, undo)
    try:
        call.start(thread)
        call.wait(poll)
        call.join()
    except BaseException:
        call.leave()
        raise
    return call.result()


def nothing_to_undo(result: object) -> None:
    """Do nothing: `undo` of a call that leaves nothing behind."""


class CallThread:
    """A thread that makes shielded calls, one after the other. See `open_call_thread`."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=_make_calls, args=(self._calls,), name="ndcache-calls", daemon=True)

    def start(self) -> CallThread:
        """Start the thread, where no signal comes."""
        self._thread.start()
        return self

    def submit(self, call: Callable[[], None]) -> None:
        """Hand it a call to make, which must not raise."""
        self._calls.put(call)

    def end(self) -> None:
        """Wait for its calls and end it."""
        self._calls.put(None)
        self._thread.join()

    def __del__(self) -> None:
        self._calls.put(None)  # where an interrupt kept `end` from being called


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
        del call  # or it would keep what it gave until the next one


class _Call(Generic[T]):
    """One call, with no locks: an interrupt could leave one locked. Who takes the only item of a list decides."""

    def __init__(self, work: Callable[[], T], undo: Callable[[T], object] | None) -> None:
        self._work = work
        self._undo = undo
        self._to_begin = [True]
        self._to_end = [True]
        self._has_ended = False
        self._has_own_thread = True
        self._wake_up: SimpleQueue[None] = SimpleQueue()
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ndcache-device", daemon=True)

    def start(self, thread: CallThread | None) -> None:
        """Begin, in a thread if there can be one more."""
        if thread is not None:
            self._has_own_thread = False
            thread.submit(self._run)
            return
        try:
            self._thread.start()
        except RuntimeError as error:
            raise_hidden_interrupt(error)
            self._run()  # The interpreter is about to end.

    def wait(self, poll: Callable[[], None] | None = None, deadline: float = math.inf) -> bool:
        """Wait for the end; whether it came before the deadline."""
        while not self._has_ended and time.monotonic() < deadline:
            try:
                self._wake_up.get(timeout=_TICK)
            except Empty:
                if poll is not None:
                    poll()
        return self._has_ended

    def leave(self) -> None:
        """Give the call up after an interrupt."""
        if _take(self._to_begin):
            self._join_whatever_comes()
            return  # It never will.
        if self._undo is not None and not self._wait_on(time.monotonic() + _GRACE) and _take(self._to_end):
            return  # The thread will see that, and undo what it has done.
        self._wait_on(math.inf)
        self._join_whatever_comes()
        undo, results = self._undo, self._results
        if undo is not None and results:
            shielded(lambda: undo(results.pop()))

    def join(self) -> None:
        """Wait until the thread, which has done its work, is gone."""
        if self._thread.ident is not None:
            self._thread.join()

    def result(self) -> T:
        """Return what came of the work, or raise it."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # or it would hold itself
        return self._results.pop()

    def _run(self) -> None:
        if not _take(self._to_begin):
            return
        try:
            self._results.append(self._work())
        except BaseException as error:
            self._error = error
        if _take(self._to_end):
            self._has_ended = True
            self._wake_up.put(None)
        elif self._undo is not None and self._results:
            self._undo(self._results.pop())

    # Further interrupts change nothing: the first one is what will be raised.

    def _wait_on(self, deadline: float) -> bool:
        while True:
            with suppress(BaseException):
                return self.wait(deadline=deadline)

    def _join_whatever_comes(self) -> None:
        if not self._has_own_thread:
            return
        deadline = time.monotonic() + _GRACE
        while True:
            try:
                self._thread.join()
                return
            except RuntimeError:  # It has not started: not yet, or, if the interrupt came first, never.
                if time.monotonic() > deadline:
                    return
                time.sleep(0.001)
            except BaseException:
                continue


def _take(item: list[bool]) -> bool:
    try:
        item.pop()
    except IndexError:
        return False
    return True
