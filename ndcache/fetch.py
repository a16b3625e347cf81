"""Shards in manifest order, fetched by a bounded pool of workers, handed to the caller's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from .errors import CancelledError, NdcacheError
from .manifest import Shard
from .stats import LoadStats
from .stop import Stop

__all__ = ["in_order", "in_worker"]

#: Seconds between looks at ``cancel`` and movements of the bar while nothing else happens. Also what lets Ctrl-C
#: through on Windows, where a wait without an end cannot be interrupted.
_TICK = 0.1

T = TypeVar("T")


def in_order(
    shards: Sequence[Shard],
    work: Callable[[Shard], T],
    *,
    max_workers: int,
    memory_limit: int,
    stop: Stop,
    stats: LoadStats,
    tick: Callable[[], None] = lambda: None,
) -> Generator[T, None, None]:
    """Run ``work(shard)`` for every shard in worker threads; yield the results in the order of `shards`.

    At most `max_workers` run at once, and no shard is begun while more than `memory_limit` bytes of shards are under
    way or waiting for their turn, unless it is the next one. The shard whose result was yielded counts until the next
    result is asked for. Close the generator (or let it end): then no thread is left.

    Parameters
    ----------
    shards : sequence of Shard
    work : callable
        Called in the workers; must look at `stop`.
    max_workers : int
    memory_limit : int
        In bytes of the shards.
    stop : Stop
        Set when something failed, or when the caller goes away.
    stats : LoadStats
    tick : callable
        Called on the caller's thread about every 0.1 s while it waits.

    Raises
    ------
    NdcacheError
        The first error of any shard, at once, whichever's turn it is; those of other shards attached.
    """
    waiting, pending = deque(shards), deque[tuple[Shard, "Future[T]"]]()
    in_flight = 0
    executor = ThreadPoolExecutor(max_workers, thread_name_prefix="ndcache")
    try:
        while waiting or pending:
            while waiting and _may_begin(waiting[0], pending, in_flight, memory_limit, max_workers):
                shard = waiting.popleft()
                pending.append((shard, executor.submit(work, shard)))
                in_flight += shard.nbytes
                stats.peak_bytes_in_flight = max(stats.peak_bytes_in_flight, in_flight)
            with stats.timed("wait"):
                _wait_for_first([future for _, future in pending], stop, tick)
            shard, future = pending[0]
            yield future.result()
            pending.popleft()
            in_flight -= shard.nbytes
    except BaseException as error:
        stop.set()
        executor.shutdown(wait=True, cancel_futures=True)
        _attach_others(error, [future for _, future in pending])
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def in_worker(work: Callable[[], T], stop: Stop) -> T:
    """``work()`` in a worker thread, while the caller's thread looks after `stop`."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="ndcache")
    future = executor.submit(work)
    try:
        _wait_for_first([future], stop, lambda: None)
        return future.result()
    finally:
        if not future.done():
            stop.set()
        executor.shutdown(wait=True)


def _may_begin(
    shard: Shard,
    pending: Sequence[object],
    in_flight: int,
    memory_limit: int,
    max_workers: int,
) -> bool:
    if not pending:
        return True
    # Enough tasks to keep the workers busy; more would only make each wait longer to set up.
    return in_flight + shard.nbytes <= memory_limit and len(pending) < 4 * max_workers


def _wait_for_first(futures: Sequence[Future[T]], stop: Stop, tick: Callable[[], None]) -> None:
    """Until the first of `futures` is done, or any has failed: then raise its error."""
    while True:
        for future in futures:
            if future.done() and (error := future.exception()) is not None:
                raise error
        if futures[0].done():
            return
        wait([f for f in futures if not f.done()], _TICK, FIRST_COMPLETED)
        stop.look()
        tick()


def _attach_others(error: BaseException, futures: Sequence[Future[T]]) -> None:
    """Give the error that is raised those of the other shards, but not what stopping them made of them."""
    if not isinstance(error, NdcacheError):
        return
    others = [future.exception() for future in futures if future.done() and not future.cancelled()]
    error.others += tuple(
        other
        for other in others
        if isinstance(other, NdcacheError) and not isinstance(other, CancelledError) and other is not error
    )
