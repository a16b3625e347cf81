"""A queue of tasks that run one after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

__all__ = ["SerialQueue"]

P = ParamSpec("P")
T = TypeVar("T")


class SerialQueue:
    """Run tasks one after the other, in the thread that calls `serve`; without one, in the thread that submits them.

    This is not an executor, as nothing can be submitted to one after the main thread has ended.

    Parameters
    ----------
    has_thread : bool
        Whether a thread will call `serve`.
    """

    def __init__(self, *, has_thread: bool) -> None:
        self.has_thread = has_thread
        self._is_closed = not has_thread
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``work(*args, **kwargs)`` when its turn comes."""
        future: Future[T] = Future()
        self._tasks.put((future, lambda: work(*args, **kwargs)))
        if self._is_closed:  # Checked after the task is in the queue; `close` does these in reverse order.
            self._run_remaining()
        return future

    def serve(self) -> None:
        """Run tasks until the queue is closed."""
        while (task := self._tasks.get()) is not None:
            _run(*task)
            del task  # frees what it holds while this thread waits
        self._run_remaining()

    def close(self) -> None:
        """Let `serve` return after the tasks that were submitted so far."""
        self._is_closed = True
        self._tasks.put(None)

    def cancel(self) -> None:
        """Cancel the tasks that have not begun. Call this only when no thread waits for them."""
        self._is_closed = True
        with suppress(Empty):
            while True:
                if (task := self._tasks.get_nowait()) is not None:
                    task[0].cancel()

    def _run_remaining(self) -> None:
        with suppress(Empty):
            while True:
                if (task := self._tasks.get_nowait()) is not None:
                    _run(*task)


def _run(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
