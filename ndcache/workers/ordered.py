"""Map a function over items in worker threads, and yield its results in order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from typing import TypeVar

from ..stats import LoadStats
from .cancellation import Cancellation
from .outcomes import Outcomes, Task
from .pool import WorkerPool
from .stop_iteration import WrappedStopIteration

__all__ = ["map_ordered"]

#: The most tasks for each worker that are submitted and not yet taken. More would only fill the queue.
_PENDING_PER_WORKER = 4

S = TypeVar("S")
T = TypeVar("T")


def map_ordered(
    items: Sequence[S],
    work: Callable[[S], T],
    *,
    pool: WorkerPool,
    sizes: Sequence[int],
    freed: Sequence[int] | None = None,
    memory_limit: int,
    stats: LoadStats,
    tick: Callable[[], None] | None = None,
    beside: Callable[[], None] | None = None,
    needs_slot: Callable[[S], bool] = lambda _: True,
) -> Generator[T, None, None]:
    """Run ``work(item)`` for every item in `pool`; yield the results in the order of `items`.

    The bytes of items that have begun count towards `memory_limit` until they are freed. An item begins only if it fits
    within the limit, or if its result is the next to be yielded. No thread is left when the generator ends or is
    closed.

    Parameters
    ----------
    items : sequence
    work : callable
        Must check the `Cancellation` of `pool`, which is set when an item fails or the generator is closed.
    pool : WorkerPool
        Already started; the caller must not use it for anything else from now on.
    sizes : sequence of int
        The bytes of each item.
    freed : sequence of int, optional
        The bytes that are freed when the result after that of each item is requested; by default `sizes`.
    memory_limit : int
        In bytes.
    stats : LoadStats
    tick : callable, optional
        Called on the caller's thread for each item, and about every 0.1 s while it waits.
    beside : callable, optional
        Other work for one worker, called once the first items have been given to workers. The generator ends when it
        is done, too.
    needs_slot : callable
        Return whether the work on an item may use a connection; by default, all may.

    Raises
    ------
    NdcacheError
        The first error of any item, raised at once and not in order. Errors of other items are in its ``others``.
    WrappedStopIteration
        `work`, or `tick`, raised StopIteration.
    """
    max_workers = pool.max_workers if pool.has_threads else 0
    outcomes, apart = Outcomes[T](pool.cancellation), _Apart(beside, pool.cancellation)
    begun = taken = in_flight = 0

    def has_room() -> bool:
        return not sizes[begun] or in_flight + sizes[begun] <= memory_limit

    def may_begin_next() -> bool:
        return begun == taken or (has_room() and begun - taken < _PENDING_PER_WORKER * max_workers)

    def is_limited_by_memory() -> bool:  # a worker is idle because nothing more may begin
        return begun < len(items) and not has_room() and begun - taken - len(outcomes) < max_workers

    try:
        while taken < len(items):
            while begun < len(items) and may_begin_next():
                in_flight += sizes[begun]
                stats.peak_bytes_in_flight = max(stats.peak_bytes_in_flight, in_flight)
                pool.submit(_task(work, items[begun], outcomes, begun, needs_slot))
                begun += 1
            for task in apart.to_begin():
                pool.submit(task)
            with stats.timed("memory_limit") if is_limited_by_memory() else nullcontext():
                with stats.timed("wait"):
                    outcomes.wait_for(taken, tick)
                yield outcomes.take(taken)
            taken, in_flight = taken + 1, in_flight - (freed or sizes)[taken]
        apart.finish(pool, tick)
    except BaseException as error:
        pool.cancellation.set()
        pool.shutdown()
        outcomes.attach_others(error)
        if isinstance(error, StopIteration):
            raise WrappedStopIteration(error) from None
        raise
    finally:
        pool.shutdown()


def _task(
    work: Callable[[S], T], item: S, outcomes: Outcomes[T], index: int, needs_slot: Callable[[S], bool]
) -> Task[T]:
    return Task(functools.partial(work, item), outcomes, index, needs_slot=needs_slot(item))


class _Apart:
    """Work beside that on the items, in one worker."""

    def __init__(self, work: Callable[[], None] | None, cancellation: Cancellation) -> None:
        self._outcomes = Outcomes[None](cancellation)
        self._tasks = [] if work is None else [Task(work, self._outcomes)]
        self._count = len(self._tasks)

    def to_begin(self) -> Iterator[Task[None]]:
        """Yield the task, unless it has begun."""
        while self._tasks:
            yield self._tasks.pop()

    def finish(self, pool: WorkerPool, tick: Callable[[], None] | None) -> None:
        """Wait until the work is done; raise its error."""
        for task in self.to_begin():  # there were no items
            pool.submit(task)
        if self._count:
            self._outcomes.wait_for(0, tick)
