"""Shards in manifest order, fetched by a bounded pool of workers, handed to the caller's thread."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from .errors import CancelledError, NdcacheError
from .manifest import Shard
from .pieces import Helpers
from .stats import LoadStats
from .stop import Stop

__all__ = ["in_order", "in_worker"]

#: Seconds between looks at ``cancel`` and movements of the bar while nothing else happens. Also what lets Ctrl-C
#: through on Windows, where a wait without an end cannot be interrupted.
_TICK = 0.1
#: Threads beyond `max_workers`, for those that go on when they are relieved: to publish a file waits for the disk, and
#: no connection is to wait for that. With 20 MiB/s for each of 8, a load to a disk takes 0.95 times as long (6 pairs);
#: with more of them, one that is limited by the CPU takes longer (benchmarks/fetch.py).
_SPARE = 2

T = TypeVar("T")


def in_order(
    shards: Sequence[Shard],
    work: Callable[[Shard], T],
    *,
    sizes: Sequence[int] | None = None,
    max_workers: int,
    memory_limit: int,
    stop: Stop,
    stats: LoadStats,
    helpers: Helpers | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Generator[T, None, None]:
    """Run ``work(shard)`` for every shard in worker threads; yield the results in the order of `shards`.

    At most `max_workers` run at once, beside two that were relieved (see `Helpers`). No shard is begun while more than
    `memory_limit` bytes of shards are under way or waiting for their turn, unless it is the next one. The shard whose
    result was yielded counts until the next result is asked for. Close the generator (or let it end): then no thread is
    left.

    Parameters
    ----------
    shards : sequence of Shard
    work : callable
        Called in the workers; must look at `stop`.
    sizes : sequence of int, optional
        The bytes that each shard counts. Default: those that it has.
    max_workers : int
    memory_limit : int
        In bytes of the shards.
    stop : Stop
        Set when something failed, or when the caller goes away.
    stats : LoadStats
    helpers : Helpers, optional
        Through which those who work can have others help them, for as long as this goes on.
    tick : callable
        Called on the caller's thread about every 0.1 s while it waits.

    Raises
    ------
    NdcacheError
        The first error of any shard, at once, whichever's turn it is; those of other shards attached.
    """
    sizes = [shard.nbytes for shard in shards] if sizes is None else sizes
    results: dict[int, T] = {}
    done: SimpleQueue[_Done[T]] = SimpleQueue()
    failed = threading.Event()
    begun = taken = in_flight = 0
    workers = _Workers(max_workers + _SPARE)
    posts = _Posts(max_workers, workers)
    if helpers is not None:
        helpers.open(posts.submit, max_workers - 1, posts.leave)
    try:
        while taken < len(shards):
            while begun < len(shards) and _may_begin(sizes[begun], begun - taken, in_flight, memory_limit, max_workers):
                posts.submit(functools.partial(_run, work, shards[begun], begun, done, failed, stop))
                in_flight += sizes[begun]
                stats.peak_bytes_in_flight = max(stats.peak_bytes_in_flight, in_flight)
                begun += 1
            is_limited = begun < len(shards) and in_flight + sizes[begun] > memory_limit
            is_limited = is_limited and begun - taken - len(results) < max_workers
            with stats.timed("memory_limit") if is_limited else nullcontext():
                with stats.timed("wait"):
                    _collect(done, results, taken, stop, tick)
                yield results.pop(taken)
            in_flight -= sizes[taken]
            taken += 1
    except BaseException as error:
        stop.set()
        workers.end()
        _attach_others(error, done)
        raise
    finally:
        workers.end()


def in_worker(work: Callable[[], T], stop: Stop) -> T:
    """``work()`` in a worker thread, while the caller's thread looks after `stop`."""
    done: SimpleQueue[_Done[T]] = SimpleQueue()
    results: dict[int, T] = {}
    workers = _Workers(1)
    try:
        workers.submit(_run, lambda _: work(), None, 0, done, threading.Event(), stop)
        _collect(done, results, 0, stop, lambda: None)
    except NdcacheError:
        raise  # of the work, which is over
    except BaseException:
        stop.set()
        raise
    finally:
        workers.end()
    return results[0]


class _Workers(ThreadPoolExecutor):
    """A pool that leaves no thread behind, even if Ctrl-C comes while it makes one and does not know of it yet."""

    _numbers = itertools.count(1)

    def __init__(self, max_workers: int) -> None:
        self._name = f"ndcache-{next(self._numbers)}"
        super().__init__(max_workers, thread_name_prefix=self._name)

    def end(self) -> None:
        """Forget what has not begun, and wait for what has."""
        self.shutdown(wait=True, cancel_futures=True)
        for thread in threading.enumerate():
            if thread.name.startswith(f"{self._name}_"):
                _join(thread)


def _join(thread: threading.Thread) -> None:
    deadline = time.monotonic() + 1
    while True:
        try:
            thread.join()
            return
        except RuntimeError:  # It has not started: not yet, or, if Ctrl-C came first, never.
            if time.monotonic() > deadline:
                return
        time.sleep(0.001)


class _Posts:
    """What tasks, in the order in which they come, need one of to begin, and may leave to the next before they end."""

    def __init__(self, count: int, workers: ThreadPoolExecutor) -> None:
        self._vacant = threading.Semaphore(count)
        self._workers = workers
        self._tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._mine = threading.local()

    def submit(self, task: Callable[[], None]) -> None:
        """Have a worker run `task` when it is its turn."""
        self._tasks.put(task)
        self._workers.submit(self._run_next)

    def leave(self) -> None:
        """Leave the post of this thread, if it has one, to the next task."""
        if getattr(self._mine, "is_manned", False):
            self._mine.is_manned = False
            self._vacant.release()

    def _run_next(self) -> None:
        self._vacant.acquire()
        self._mine.is_manned = True
        try:
            self._tasks.get_nowait()()  # only now, as of many who wait any may be the first to get a post
        finally:
            self.leave()


@dataclass(frozen=True)
class _Done(Generic[T]):
    """What became of one task. One of the two is None."""

    index: int
    result: T | None
    error: BaseException | None


def _run(
    work: Callable[[Any], T],
    item: Any,
    index: int,
    done: SimpleQueue[_Done[T]],
    failed: threading.Event,
    stop: Stop,
) -> None:
    # After a failure, the caller's thread, which is to stop everything, may be busy with a shard that came before.
    if failed.is_set() or stop.is_set:
        return
    # Through a queue, and not the future that the executor makes: to wait for futures, the caller's thread would have
    # to take locks that the workers need, and Ctrl-C could leave one of them locked for ever.
    try:
        done.put(_Done(index, work(item), None))
    except BaseException as error:
        done.put(_Done(index, None, error))
        failed.set()


def _may_begin(nbytes: int, pending: int, in_flight: int, memory_limit: int, max_workers: int) -> bool:
    # Enough tasks to keep the workers busy; more would only fill the queue.
    return pending == 0 or (in_flight + nbytes <= memory_limit and pending < 4 * max_workers)


def _collect(
    done: SimpleQueue[_Done[T]], results: dict[int, T], wanted: int, stop: Stop, tick: Callable[[], None]
) -> None:
    """Take what is done until `wanted` is there, and all that is there already; raise the first error."""
    while wanted not in results or not done.empty():
        try:
            item = done.get(timeout=_TICK)
        except Empty:
            stop.look()
            tick()
            continue
        if item.error is not None:
            try:
                raise item.error
            finally:
                del item  # or the error would hold itself, and with it the maps of all shards
        results[item.index] = item.result  # type: ignore[assignment]


def _attach_others(error: BaseException, done: SimpleQueue[_Done[T]]) -> None:
    """Give the error that is raised those of the other shards, but not what stopping them made of them."""
    while isinstance(error, NdcacheError) and not done.empty():
        other = done.get().error
        if isinstance(other, NdcacheError) and not isinstance(other, CancelledError):
            error.others += (other,)
