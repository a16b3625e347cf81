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

#: Tasks for each worker that may have been submitted and not taken. More would only fill the queue.
_PENDING_PER_WORKER = 4

S = TypeVar("S")
T = TypeVar("T")


def map_ordered(
    items: Sequence[S],
    work: Callable[[S], T],
    *,
    pool: WorkerPool,
    sizes: Sequence[int],
    memory_limit: int,
    stats: LoadStats,
    tick: Callable[[], None] = lambda: None,
) -> Generator[T, None, None]:
    """Run ``work(item)`` for every item in `pool`; yield the results in the order of `items`.

    No item is begun while the items that are under way, or wait for their turn, would exceed `memory_limit` bytes with
    it, unless it is the next one. An item whose result was yielded counts until the next result is requested. No thread
    is left when the generator ends or is closed.

    Parameters
    ----------
    items : sequence
    work : callable
        Must check the `Cancellation` of `pool`, which is set when something failed, or when the caller goes away.
    pool : WorkerPool
        Already started, and used for nothing else from now on.
    sizes : sequence of int
        The bytes that each item counts.
    memory_limit : int
        In bytes.
    stats : LoadStats
    tick : callable
        Called on the caller's thread about every 0.1 s while it waits.

    Raises
    ------
    NdcacheError
        The first error of any item, at once, whichever's turn it is; those of other items attached.
    WrappedStopIteration
        `work`, or `tick`, raised StopIteration.
    """
    max_workers = pool.max_workers if pool.has_threads else 0
    outcomes = Outcomes[T](pool.cancellation)
    begun = taken = in_flight = 0

    def may_begin_next() -> bool:
        pending = begun - taken
        has_room = in_flight + sizes[begun] <= memory_limit
        return pending == 0 or (has_room and pending < _PENDING_PER_WORKER * max_workers)

    def is_limited_by_memory() -> bool:
        """Return whether a worker is idle because `memory_limit` lets no further item begin."""
        is_full = begun < len(items) and in_flight + sizes[begun] > memory_limit
        return is_full and begun - taken - len(outcomes) < max_workers

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
            in_flight -= sizes[taken]
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
