"""A queue of tasks that run one after the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, ParamSpec, TypeVar

from ..errors import CancelledError

__all__ = ["Pending", "SerialQueue"]

P = ParamSpec("P")
T = TypeVar("T")


class Pending(Generic[T]):
    """A task of a `SerialQueue`, and its result once it is done.

    This is not a future: Ctrl-C in the middle of `Future.result` can leave the future's lock locked, and whoever asks
    for the result then waits for ever.

    Parameters
    ----------
    work : callable
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work: Callable[[], T] | None = work
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._done: SimpleQueue[None] = SimpleQueue()

    @property
    def is_done(self) -> bool:
        """Return whether the task has ended, with a result or an error, or will never begin."""
        return bool(self._results) or self._error is not None

    @property
    def error(self) -> BaseException | None:
        """Return the error that has ended the task, or a `CancelledError` if it will never begin."""
        return self._error

    def wait(self) -> None:
        """Wait for the end of the task."""
        if not self.is_done:
            self._done.get()
            self._done.put(None)  # for the next one who waits

    def result(self) -> T:
        """Wait for the end of the task; return its result, or raise its error."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._results[0]

    def run(self) -> None:
        """Do the work. Only the queue calls this, and once."""
        work, self._work = self._work, None
        assert work is not None
        try:
            self._results.append(work())
        except BaseException as error:
            self._error = error
        self._done.put(None)

    def cancel(self) -> None:
        """Give up the task, which has not begun."""
        self._work, self._error = None, CancelledError("the load was cancelled")
        self._done.put(None)


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
        self._tasks: SimpleQueue[Pending[Any] | None] = SimpleQueue()

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Pending[T]:
        """Run ``work(*args, **kwargs)`` when its turn comes."""
        task = Pending(lambda: work(*args, **kwargs))
        self._tasks.put(task)
        if self._is_closed:  # Checked after the task is in the queue; `close` does these in reverse order.
            self._run_remaining()
        return task

    def serve(self) -> None:
        """Run tasks until the queue is closed."""
        while (task := self._tasks.get()) is not None:
            task.run()
            del task  # frees what it holds while this thread waits
        self._run_remaining()

    def close(self) -> None:
        """Let `serve` return after the tasks that were submitted so far."""
        self._is_closed = True
        self._tasks.put(None)

    def cancel(self) -> None:
        """Cancel the tasks that have not begun."""
        self._is_closed = True
        with suppress(Empty):
            while True:
                if (task := self._tasks.get_nowait()) is not None:
                    task.cancel()

    def _run_remaining(self) -> None:
        with suppress(Empty):
            while True:
                if (task := self._tasks.get_nowait()) is not None:
                    task.run()
