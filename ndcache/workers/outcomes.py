"""Results and errors of tasks, on their way from the workers to the caller's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, ParamSpec, TypeVar

from ..errors import CancelledError, NdcacheError
from .cancellation import Cancellation

__all__ = ["Outcomes"]

#: Seconds between calls of `Cancellation.poll` and of `tick` while nothing else happens. A wait without a timeout could
#: not be interrupted by Ctrl-C on Windows.
_TICK = 0.1

T = TypeVar("T")
P = ParamSpec("P")


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
        """Return how many results have arrived and were not taken."""
        return len(self._results)

    def run(self, index: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run one task in a worker, unless another one has failed."""
        # The caller's thread cancels everything after a failure, but may still be busy with an earlier result.
        if self._has_failure.is_set() or self._cancellation.is_set:
            return
        try:
            self._arriving.put(_Outcome(index, work(*args, **kwargs), None))
        except BaseException as error:
            self._arriving.put(_Outcome(index, None, error))
            self._has_failure.set()

    def wait_for(self, index: int, tick: Callable[[], None] = lambda: None) -> None:
        """Wait for the result of the task `index`, calling `tick` meanwhile; raise the first error of any task."""
        while index not in self._results or not self._arriving.empty():
            try:
                outcome = self._arriving.get(timeout=_TICK)
            except Empty:
                self._cancellation.poll()
                tick()
                continue
            if outcome.error is not None:
                try:
                    raise outcome.error
                finally:
                    del outcome  # or the error would hold itself, and with it the maps of all shards
            self._results[outcome.index] = outcome.result  # type: ignore[assignment]

    def take(self, index: int) -> T:
        """Return the result of the task `index`, which has arrived, and keep it no longer."""
        return self._results.pop(index)

    def attach_others(self, error: BaseException) -> None:
        """Attach to `error` those of other tasks, unless they only report the cancellation."""
        while isinstance(error, NdcacheError) and not self._arriving.empty():
            other = self._arriving.get().error
            if isinstance(other, NdcacheError) and not isinstance(other, CancelledError):
                error.others += (other,)
