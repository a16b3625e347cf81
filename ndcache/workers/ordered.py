"""Map a function over items in worker threads, and yield its results in order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from typing import TypeVar

from ..stats import LoadStats
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
    tick: Callable[[], None] = lambda: None,
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
    tick : callable
        Called on the caller's thread about every 0.1 s while it waits.

    Raises
    ------
    NdcacheError
        The first error of any item, raised at once and not in order. Errors of other items are in its ``others``.
    WrappedStopIteration
        `work`, or `tick`, raised StopIteration.
    """
    max_workers = pool.max_workers if pool.has_threads else 0
    outcomes = Outcomes[T](pool.cancellation)
    begun = taken = in_flight = 0
    freed = sizes if freed is None else freed

    def may_begin_next() -> bool:
        pending = begun - taken
        has_room = not sizes[begun] or in_flight + sizes[begun] <= memory_limit
        return pending == 0 or (has_room and pending < _PENDING_PER_WORKER * max_workers)

    def is_limited_by_memory() -> bool:
        """Return whether a worker is idle because `memory_limit` lets no further item begin."""
        is_full = begun < len(items) and sizes[begun] and in_flight + sizes[begun] > memory_limit
        return bool(is_full) and begun - taken - len(outcomes) < max_workers

    try:
        while taken < len(items):
            while begun < len(items) and may_begin_next():
                in_flight += sizes[begun]
                stats.peak_bytes_in_flight = max(stats.peak_bytes_in_flight, in_flight)
                pool.submit(Task(functools.partial(work, items[begun]), outcomes, begun))
                begun += 1
            with stats.timed("memory_limit") if is_limited_by_memory() else nullcontext():
                with stats.timed("wait"):
                    outcomes.wait_for(taken, tick)
                yield outcomes.take(taken)
            in_flight -= freed[taken]
            taken += 1
    except BaseException as error:
        pool.cancellation.set()
        pool.shutdown()
        outcomes.attach_others(error)
        if isinstance(error, StopIteration):
            raise WrappedStopIteration(error) from None
        raise
    finally:
        pool.shutdown()
