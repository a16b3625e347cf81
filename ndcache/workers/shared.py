"""A resource that one task obtains and several tasks use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

from ..errors import CancelledError
from .outcomes import Task
from .pool import WorkerPool
from .postponed import Gate, Postponed

__all__ = ["SharedResource"]

T = TypeVar("T")


class SharedResource(Generic[T]):
    """Share a resource, such as an open file, between a number of tasks; it is closed when all have used it.

    One of the tasks obtains it. Each uses it once, as a context manager. The tasks that come too early are held back
    without a worker, by the exception `Postponed`.

    Parameters
    ----------
    users : int
        How many tasks use the resource.
    close : callable
        Closes it.
    """

    def __init__(self, users: int, close: Callable[[T], None]) -> None:
        self._resource: T | None = None
        self._users = users  # that have not used it yet
        self._in_use = 0
        self._failure: BaseException | None = None
        self._is_abandoned = False
        self._close = close
        self._gate = Gate[Task[Any]]()
        # Reentrant: the garbage collector, which closes generators, may call `abandon` in a thread that has the lock.
        self._lock = threading.RLock()

    def provide(self, resource: T, pool: WorkerPool) -> None:
        """Let the tasks use the resource, those first that have waited for it."""
        with self._lock:
            self._resource = resource
            self._close_if_unused()
        pool.open_gate(self._gate)

    def fail(self, error: BaseException, pool: WorkerPool) -> None:
        """Let one of the tasks raise an error, because there will be no resource; the others are cancelled."""
        with self._lock:
            self._failure = None if self._is_abandoned else error
        pool.open_gate(self._gate)

    def skip(self) -> None:
        """Count a use by a task that did without the resource."""
        with self._lock:
            self._users -= 1
            self._close_if_unused()

    def abandon(self) -> None:
        """Close the resource now, or as soon as no task uses it; call this when no other task will."""
        with self._lock:
            self._is_abandoned, self._failure = True, None
            self._close_if_unused()

    def __enter__(self) -> T:
        with self._lock:
            if (error := self._failure) is not None:
                self._failure, self._is_abandoned = None, True
                raise error
            if self._is_abandoned:
                raise CancelledError("the load was cancelled")
            if self._resource is None:
                raise Postponed(gate=self._gate)
            self._users -= 1
            self._in_use += 1
            return self._resource

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._in_use -= 1
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._resource is not None and not self._in_use and (self._is_abandoned or not self._users):
            resource, self._resource = self._resource, None
            self._close(resource)
