"""An engine in this process, whose workers can be lost and whose transfers can be damaged."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ndcache.cluster.call import Call

#: Called before each task: the worker, the function's name and the arguments.
Hook = Callable[[str, str, tuple[Any, ...]], None]


@dataclasses.dataclass(frozen=True)
class _Task:
    worker: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    stays: bool


@dataclasses.dataclass(frozen=True)
class Handle:
    """A task of a `LocalEngine`."""

    number: int


class LocalEngine:
    """Run tasks one after the other, in the order in which they were submitted, when results are asked for.

    Parameters
    ----------
    homes : dict of str to pathlib.Path
        The cache directory of each worker.

    Attributes
    ----------
    counts : Counter
        How often each function ran, by its name.
    before : list of Hook
    change : callable
        Replaces the result of a task: the worker, the function's name, the result.
    is_last : callable
        Whether a task waits for the others: the worker, the function's name, how many others could run.
    """

    def __init__(self, homes: dict[str, Path]) -> None:
        self.homes = dict(homes)
        self.counts: Counter[str] = Counter()
        self.before: list[Hook] = []
        self.change: Callable[[str, str, Any], Any] = lambda worker, name, result: result
        self.is_last: Callable[[str, str, int], bool] = lambda worker, name, others: False
        self._numbers = itertools.count()
        self._tasks: dict[Handle, _Task] = {}
        self._results: dict[Handle, Any] = {}
        self._alive = set(homes)

    @property
    def left(self) -> int:
        """Return how many tasks and results were not released."""
        return len(self._tasks) + len(self._results)

    def start(self, worker: str, home: Path) -> None:
        self.homes[worker] = home
        self._alive.add(worker)

    def kill(self, worker: str) -> None:
        """Lose a worker with its tasks and results."""
        self._alive.discard(worker)

    def workers(self) -> set[str]:
        return set(self._alive)

    def submit(self, worker: str, function: Callable[..., Any], *args: Any, stays: bool = False) -> Handle:
        handle = Handle(next(self._numbers))
        self._tasks[handle] = _Task(worker, function, args, stays)
        return handle

    def collect(self, timeout: float) -> list[tuple[Handle, Any]]:
        for handle in self._in_order():
            if handle in self._tasks and self._can_run(self._tasks[handle]):
                result = self._run(handle)
                if handle in self._results and not self._tasks.pop(handle).stays:
                    return [(handle, result)]
        return []

    def release(self, handles: Iterable[Handle]) -> None:
        for handle in handles:
            self._tasks.pop(handle, None)
            self._results.pop(handle, None)

    def _in_order(self) -> list[Handle]:
        """Return the tasks in the order in which they run, those that are last at the end."""
        able = sum(map(self._can_run, self._tasks.values()))

        def is_last(handle: Handle) -> bool:
            task = self._tasks[handle]
            return self.is_last(task.worker, task.function.__name__, able - 1)

        return sorted(self._tasks, key=is_last)

    def _can_run(self, task: _Task) -> bool:
        needed = [each for each in task.args if isinstance(each, Handle)]
        return task.worker in self._alive and all(each in self._results for each in needed)

    def _run(self, handle: Handle) -> Any:
        task = self._tasks[handle]
        name = task.function.__name__
        args = tuple(self._results[each] if isinstance(each, Handle) else each for each in task.args)
        for hook in self.before:
            hook(task.worker, name, args)
        if task.worker not in self._alive:
            return None  # it was killed just now
        call = args[0]
        assert isinstance(call, Call)
        here = dataclasses.replace(call, options={**call.options, "cache_dir": self.homes[task.worker]})
        self.counts[name] += 1
        result = self.change(task.worker, name, task.function(here, *args[1:]))
        if handle in self._tasks:
            self._results[handle] = result
        return result
