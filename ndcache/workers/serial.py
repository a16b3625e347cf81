"""Run tasks one after the other, in a thread of their own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

__all__ = ["Serial"]

P = ParamSpec("P")
T = TypeVar("T")


class Serial:
    """Does one thing after the other, in the thread that calls `serve`; without it, whoever submits something does it.

    Not an executor: to one, nothing can be submitted once the main thread has ended.

    Parameters
    ----------
    has_thread : bool
    """

    def __init__(self, *, has_thread: bool) -> None:
        self.has_thread = has_thread
        self._is_closed = not has_thread
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``work(*args, **kwargs)`` when its turn comes."""
        future: Future[T] = Future()
        self._tasks.put((future, lambda: work(*args, **kwargs)))
        if self._is_closed:  # looked at after it is in the queue, as `close` does it the other way round
            self._do_what_is_left()
        return future

    def serve(self) -> None:
        """Do what is submitted, until it is closed."""
        while (task := self._tasks.get()) is not None:
            _do(*task)
            del task  # and what it holds
        self._do_what_is_left()

    def close(self) -> None:
        """Let `serve` return when what was submitted so far is done."""
        self._is_closed = True
        self._tasks.put(None)

    def cancel(self) -> None:
        """Cancel what has not begun; nobody waits for it."""
        self._is_closed = True
        with suppress(Empty):
            while True:
                if (task := self._tasks.get_nowait()) is not None:
                    task[0].cancel()

    def _do_what_is_left(self) -> None:
        with suppress(Empty):
            while True:
                if (task := self._tasks.get_nowait()) is not None:
                    _do(*task)


def _do(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
