"""Tasks that cannot go on now, and are run again later."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from typing import Any, Generic, TypeVar

__all__ = ["Gate", "Postponed", "PostponedTasks"]

T = TypeVar("T")


class Postponed(Exception):
    """Raised by the work of a task that cannot go on now: the task is to be run again, perhaps by another worker.

    Parameters
    ----------
    seconds : float
        After how many seconds.
    gate : Gate, optional
        Instead, as soon as this gate is open.

    Attributes
    ----------
    seconds, gate
    """

    def __init__(self, seconds: float = 0.0, gate: Gate[Any] | None = None) -> None:
        super().__init__(seconds, gate)
        self.seconds = seconds
        self.gate = gate


class Gate(Generic[T]):
    """Hold tasks back until it opens, for good. Only workers may use this, as it has a lock; see `WorkerPool`."""

    def __init__(self) -> None:
        self._held: list[T] | None = []
        self._lock = threading.Lock()

    def hold(self, task: T) -> bool:
        """Keep a task until the gate opens; return False if it is open."""
        with self._lock:
            if self._held is None:
                return False
            self._held.append(task)
            return True

    def open(self) -> list[T]:
        """Open the gate, and return the tasks that were held, in their order."""
        with self._lock:
            held, self._held = self._held, None
            return held or []


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
