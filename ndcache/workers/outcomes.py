"""Results and errors of tasks, on their way from the workers to the caller's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

from ..errors import CancelledError, NdcacheError
from .cancellation import Cancellation
from .postponed import Gate, Postponed

__all__ = ["Outcomes", "Task"]

#: Seconds between calls of `Cancellation.poll` and of `tick` while nothing else happens. A wait without a timeout could
#: not be interrupted by Ctrl-C on Windows.
_TICK = 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """The result of one task, or its error."""

    index: int
    result: T | None
    error: BaseException | None


class Outcomes(Generic[T]):
    """Hand results and errors of tasks from the workers to the caller's thread.

    Parameters
    ----------
    cancellation : Cancellation
    """

    # Not futures: to wait for them, the caller's thread would take locks that the workers need, and Ctrl-C could leave
    # one of these locked for ever.

    def __init__(self, cancellation: Cancellation) -> None:
        self._cancellation = cancellation
        self._arriving: SimpleQueue[_Outcome[T]] = SimpleQueue()
        self._results: dict[int, T] = {}
        self._has_failure = threading.Event()

    def __len__(self) -> int:
        """Return the number of results that have arrived and were not taken."""
        return len(self._results)

    @property
    def are_wanted(self) -> bool:
        """Return whether results are still wanted: no task has failed, and nothing has cancelled the load."""
        # The caller's thread cancels everything after a failure, but may still be busy with an earlier result.
        return not (self._has_failure.is_set() or self._cancellation.is_set)

    def put_result(self, index: int, result: T) -> None:
        """Hand over the result of the task `index`."""
        self._arriving.put(_Outcome(index, result, None))

    def put_error(self, index: int, error: BaseException) -> None:
        """Hand over the error of the task `index`."""
        self._arriving.put(_Outcome(index, None, error))
        self._has_failure.set()

    def wait_for(self, index: int, tick: Callable[[], None] | None = None) -> None:
        """Wait for the result of the task `index`, calling `tick` meanwhile; raise the first error of any task."""
        while index not in self._results or not self._arriving.empty():
            if tick is not None:
                tick()
            try:
                outcome = self._arriving.get(timeout=_TICK)
            except Empty:
                self._cancellation.poll()
                continue
            if outcome.error is not None:
                try:
                    raise outcome.error
                finally:
                    del outcome  # or the error would hold itself, and with it the maps of all shards
            self._results[outcome.index] = outcome.result  # type: ignore[assignment]

    def take(self, index: int) -> T:
        """Remove and return the result of the task `index`, which must have arrived."""
        return self._results.pop(index)

    def attach_others(self, error: BaseException) -> None:
        """Attach the errors of other tasks to `error`, except those that only report the cancellation."""
        while isinstance(error, NdcacheError) and not self._arriving.empty():
            other = self._arriving.get().error
            if isinstance(other, NdcacheError) and not isinstance(other, CancelledError):
                error.others += (other,)


class Task(Generic[T]):
    """Work for a worker, and the place for its outcome.

    The worker calls `work` itself, in a ``with`` block of the task, which catches all exceptions::

        with task:
            if task.is_wanted:
                task.finish(task.work())

    Tracebacks have one frame less than if the task made the call. If the work raises `Postponed`, the task has no
    outcome yet, and is to be run again.

    Parameters
    ----------
    work : callable
    outcomes : Outcomes, optional
        Receives the result or the error. Without it, they are dropped.
    index : int
        The number of the task in `outcomes`.
    needs_slot : bool
        Whether it may use a connection, and so runs only in a worker that has a slot, unless it was postponed.

    Attributes
    ----------
    work, needs_slot
    postponed_seconds : float or None
        After how many seconds to run the task again; None if it is done.
    gate : Gate or None
        Instead, run it again when this gate is open.
    """

    postponed_seconds: float | None = None
    gate: Gate[Task[Any]] | None = None

    def __init__(
        self, work: Callable[[], T], outcomes: Outcomes[T] | None = None, index: int = 0, *, needs_slot: bool = True
    ) -> None:
        self.work = work
        self.needs_slot = needs_slot
        self._outcomes = outcomes
        self._index = index

    @property
    def is_wanted(self) -> bool:
        """Return whether the work is still to be done."""
        return self._outcomes is None or self._outcomes.are_wanted

    def finish(self, result: T) -> None:
        """Hand over the result of the work."""
        if self._outcomes is not None:
            self._outcomes.put_result(self._index, result)

    def __enter__(self) -> Task[T]:
        self.postponed_seconds = self.gate = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        if isinstance(error, Postponed):
            self.postponed_seconds, self.gate = error.seconds, error.gate
        elif error is not None and self._outcomes is not None:
            self._outcomes.put_error(self._index, error)
        return True
