"""Submit tasks to an engine, and call back with their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .engine import Engine

__all__ = ["Dispatcher"]

Handle = TypeVar("Handle")


@dataclass(frozen=True)
class _Task:
    worker: str
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
        """Start a task; its result is given to `done`, unless `drop` or `forget` come first."""
        handle = self._engine.submit(worker, function, *args)
        self._tasks[handle] = _Task(worker, done, lost)
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
        """Call `lost` for the tasks of a worker that is gone."""
        lost = {handle: task for handle, task in self._tasks.items() if task.worker == worker}
        self.forget(*lost)
        for task in lost.values():
            task.lost()

    def close(self) -> None:
        """Release everything."""
        self.forget(*self._tasks, *self._kept)
