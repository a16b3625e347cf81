"""The interface of an engine such as Dask or Ray, as the coordinator uses it.

An adapter implements `Engine` for one running cluster. The engine starts functions on workers, and carries their
results to other workers by its own means. Nothing here knows how.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol, TypeVar

__all__ = ["Engine", "IsSet"]

Handle = TypeVar("Handle")


class IsSet(Protocol):
    """The part of `threading.Event` that a task needs to notice that nobody wants its result any more."""

    def is_set(self) -> bool:
        """Return whether the task was cancelled."""
        ...


class Engine(Protocol[Handle]):
    """A running cluster. The coordinator calls these methods on one thread.

    A handle is hashable, and stands for a task and its result.
    """

    def workers(self) -> Collection[str]:
        """Return the addresses or ids of the workers that can run tasks now. Called about once a second.

        A worker that was lost must disappear within some seconds. One that was restarted should come with another name;
        if it has the old one, its tasks must run again.
        """
        ...

    def submit(self, worker: str, function: Callable[..., Any], *args: Any, stays: bool = False) -> Handle:
        """Start ``function(*args)`` on a worker, and on no other; do not wait for it.

        Parameters
        ----------
        worker : str
            One of `workers`.
        function : callable
            One of `ndcache.cluster.tasks`. The engine may give it ``cancel=``, an object whose ``is_set()`` returns
            whether the task was released: `tasks.LONG` run for long, look at it often, and should not keep other tasks
            of the worker waiting.
        *args
            Small values that pickle. A handle among them stands for its task's result, which reaches the worker through
            the engine's own data plane. The task starts when all of these results are there.
        stays : bool
            Whether the result stays where it was made until other tasks take it. `collect` does not return it.
        """
        ...

    def collect(self, timeout: float) -> list[tuple[Handle, Any]]:
        """Return the tasks that have ended and their results, each once; wait up to `timeout` seconds for the first.

        Tasks whose worker was lost, and those that were released, are not among them. Functions return what fails as a
        `Failure`; an exception of the engine itself, such as a worker without ndcache, is raised.
        """
        ...

    def release(self, handles: Iterable[Handle]) -> None:
        """Drop results that nobody needs any more, and cancel tasks that have not ended. Unknown handles are ignored.

        Results that tasks under way still need stay until these have ended.
        """
        ...
