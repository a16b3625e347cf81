"""Tasks that cannot go on now, and are run again later."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from typing import Generic, TypeVar

__all__ = ["Postponed", "PostponedTasks"]

T = TypeVar("T")


class Postponed(Exception):
    """Raised by the work of a task that cannot go on now: the task is to be run again, perhaps by another worker.

    Parameters
    ----------
    seconds : float
        After how many seconds.

    Attributes
    ----------
    seconds : float
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class PostponedTasks(Generic[T]):
    """Hold tasks until they are due. Only workers may use this, as it has a lock; see `WorkerPool`."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._numbers = itertools.count()  # to compare tasks that are due at the same time
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, task: T, seconds: float) -> None:
        """Add a task that is due after so many seconds."""
        with self._lock:
            heapq.heappush(self._heap, (time.monotonic() + seconds, next(self._numbers), task))

    def take(self) -> T | None:
        """Remove and return a task that is due, if there is one."""
        with self._lock:
            if self._heap and self._heap[0][0] <= time.monotonic():
                return heapq.heappop(self._heap)[2]
        return None

    def seconds_left(self) -> float | None:
        """Return the seconds until a task is due; None if there is no task."""
        with self._lock:
            return max(0.0, self._heap[0][0] - time.monotonic()) if self._heap else None
