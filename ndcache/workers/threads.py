"""Start and join threads in spite of Ctrl-C and the end of the main thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["call_when_main_thread_ends", "join_thread", "main_thread_has_ended", "raise_hidden_interrupt"]

_has_ended = threading.Event()
_callbacks: list[Callable[[], None]] = []


def main_thread_has_ended() -> bool:
    """Return whether the main thread has come to its end. Python then starts no more threads."""
    return _has_ended.is_set()


def call_when_main_thread_ends(callback: Callable[[], None]) -> None:
    """Call `callback` when the main thread has ended, before Python waits for the threads of executors."""
    _callbacks.append(callback)


def raise_hidden_interrupt(error: RuntimeError) -> None:
    """Raise the exception of a signal handler that `error` hides, if there is one.

    `Thread.start` waits on a condition. If an exception comes just before the condition takes its lock again, its
    ``with`` block cannot release the lock. It then raises a RuntimeError, whose context is the first exception.
    """
    if error.__context__ is not None and "lock" in str(error):
        raise error.__context__ from None


def join_thread(thread: threading.Thread) -> None:
    """Wait until `thread` ends, even if Ctrl-C interrupted its start."""
    deadline = time.monotonic() + 1
    while True:
        try:
            thread.join()
            return
        except RuntimeError:  # It has not started: not yet, or never, if Ctrl-C came first.
            if time.monotonic() > deadline:
                return
        time.sleep(0.001)


def _main_thread_ends() -> None:
    _has_ended.set()
    for callback in _callbacks:
        callback()


try:
    # The hook of concurrent.futures joins its threads. Hooks run in reverse order, so it must register first.
    import concurrent.futures.thread  # noqa: F401

    if hasattr(threading, "_register_atexit"):
        threading._register_atexit(_main_thread_ends)
except RuntimeError:  # Python is already shutting down
    _has_ended.set()
