"""Submit tasks to an engine, and call back with their results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .engine import Engine

__all__ = ["Dispatcher"]

Handle = TypeVar("Handle")


@dataclass(frozen=True)
class _Task:
    workers: frozenset[str]  # its own, and those that have results which it takes
    done: Callable[[Any], None]
    lost: Callable[[], None]


class Dispatcher(Generic[Handle]):
    """Keep the tasks that have not ended, and what to do when they end or their worker is lost.

    Parameters
    ----------
    engine : Engine
    """

    def __init__(self, engine: Engine[Handle]) -> None:
        self._engine = engine
        self._tasks: dict[Handle, _Task] = {}
        self._kept: dict[Handle, str] = {}  # results that stay, and their workers

    def submit(
        self,
        worker: str,
        function: Callable[..., Any],
        *args: Any,
        done: Callable[[Any], None],
        lost: Callable[[], None] = lambda: None,
    ) -> Handle:
        """Start a task; its result is given to `done`, unless `drop` or `forget` come first.

        `lost` is called if its worker is gone, or the one that has a result which it takes.
        """
        handle = self._engine.submit(worker, function, *args)
        self._tasks[handle] = _Task(frozenset([worker, *self._workers_with(args)]), done, lost)
        return handle

    def submit_staying(self, worker: str, function: Callable[..., Any], *args: Any) -> Handle:
        """Start a task whose result stays where it is, for other tasks, until `forget` is called."""
        handle = self._engine.submit(worker, function, *args, stays=True)
        self._kept[handle] = worker
        return handle

    def forget(self, *handles: Handle) -> None:
        """Release tasks and results."""
        for handle in handles:
            self._tasks.pop(handle, None)
            self._kept.pop(handle, None)
        self._engine.release(handles)

    def collect(self, timeout: float) -> None:
        """Wait for tasks that end, and call `done` for each."""
        for handle, result in self._engine.collect(timeout):
            task = self._tasks.pop(handle, None)
            if task is not None:
                self._engine.release([handle])
                task.done(result)

    def drop(self, worker: str) -> None:
        """Call `lost` for the tasks of a worker that is gone, and for those that need its results."""
        lost = {handle: task for handle, task in self._tasks.items() if worker in task.workers}
        self.forget(*lost, *(handle for handle, owner in self._kept.items() if owner == worker))
        for task in lost.values():
            task.lost()

    def _workers_with(self, args: Iterable[Any]) -> Iterator[str]:
        for each in args:
            with contextlib.suppress(TypeError):  # most arguments are values, and some cannot be hashed
                if each in self._kept:
                    yield self._kept[each]

    def close(self) -> None:
        """Release everything."""
        self.forget(*self._tasks, *self._kept)
