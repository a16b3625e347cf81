"""The threads of one call, and shards in manifest order, fetched by them and handed to the caller's thread."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..errors import CancelledError, NdcacheError
from ..format.manifest import Shard
from ..stats import LoadStats
from .cancellation import Cancellation, is_ending, raise_hidden_interrupt
from .serial import Serial
from .stop_iteration import Carried

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["Workers", "map_ordered"]

#: Seconds between looks at ``cancel`` and movements of the bar while nothing else happens. Also what lets Ctrl-C
#: through on Windows, where a wait without an end cannot be interrupted.
_TICK = 0.1
#: Threads beyond `max_workers`, for those that go on when they are relieved: to publish a file waits for the disk, and
#: no connection is to wait for that. With 20 MiB/s for each of 8, a load to a disk takes 0.95 times as long (6 pairs);
#: with more of them, one that is limited by the CPU takes longer (benchmarks/fetch.py).
_SPARE = 2
#: Seconds between looks of an idle thread whether somebody still waits for the load.
_LOOK_AFTER = 1.0
#: Seconds between looks at threads that have not said that they go.
_SOON = 0.05

T = TypeVar("T")
logger = logging.getLogger("ndcache")


class Workers:
    """The threads of one call. They begin together, as later the main thread may have ended, and no thread can begin.

    Where none can begin at all (the main thread has ended already, the system allows no more), the thread that asks for
    work does it itself. So does what was never started.

    Tasks are begun in the order in which they come, by no more than `max_workers` threads at once, beside those that
    were relieved.

    Parameters
    ----------
    max_workers : int
    cancellation : Cancellation, optional
        When it is set, the threads end.
    has_serial : bool
        Whether there is one thread more, for `serial`.
    """

    # Ctrl-C can come between any two steps of the main thread. So it shares queues with the threads, and no lock that
    # it could leave locked; it begins one thread, which begins the next one; and it waits until the threads have said
    # that they go before it joins them: before Python 3.13, a join that Ctrl-C ends takes the thread for dead.

    _numbers = itertools.count(1)

    def __init__(
        self, max_workers: int = 1, cancellation: Cancellation | None = None, *, has_serial: bool = False
    ) -> None:
        self.max_workers = max_workers
        self.cancellation = Cancellation() if cancellation is None else cancellation
        self._has_serial = has_serial
        self._serial: Serial | None = None
        self._name = f"ndcache-{next(self._numbers)}"
        self._executor: ThreadPoolExecutor | None = None
        self._wanted = self._begun = self._gone = 0  # threads
        self._has_ended = False
        self._beginning = threading.Lock()
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._posts: SimpleQueue[None] = SimpleQueue()
        self._goodbyes: SimpleQueue[None] = SimpleQueue()
        self._mine = threading.local()
        for _ in range(max_workers):
            self._posts.put(None)

    def start(self, tasks: int | None = None) -> None:
        """Begin as many threads as so many tasks can use; by default, all. Fewer will do if there can be no more.

        Parameters
        ----------
        tasks : int, optional
            How many there will be at once.
        """
        most = self.max_workers + _SPARE
        wanted = self._has_serial + (most if tasks is None else max(1, min(tasks, most)))
        if self._wanted >= wanted or is_ending():
            return
        self._wanted = wanted
        if self._executor is not None:
            self.ask(self._begin_next)
            return
        from concurrent.futures import ThreadPoolExecutor  # which cannot be imported any more once Python is ending

        # To what its threads do first, as after the main thread has ended nothing can be submitted to it.
        self._executor = ThreadPoolExecutor(most + self._has_serial, self._name, initializer=self._serve)
        self.cancellation.on_set(self._close)
        self._begin()

    @property
    def has_threads(self) -> bool:
        """Whether there are any; if not, whoever asks for work has to do it."""
        return self._begun > 0

    @property
    def most(self) -> int:
        """Return how many there are to help one of them."""
        return max(0, min(self.max_workers, self._wanted - self._has_serial) - 1)

    def submit(self, task: Callable[[], None]) -> None:
        """Run `task` in a thread when it is its turn; without threads, in this one. Nobody hears of what it raises."""
        if self.has_threads:
            self._tasks.put(task)
        else:
            task()

    def ask(self, task: Callable[[], None]) -> None:
        """Run `task` as soon as a thread has nothing else to do, if that comes to pass."""
        if self.has_threads:
            self._tasks.put(task)

    def release_slot(self) -> None:
        """Called by a task that needs no connection any more: the next one may begin beside what it has still to do."""
        if getattr(self._mine, "is_manned", False):
            self._mine.is_manned = False
            self._posts.put(None)

    def run(self, work: Callable[[], T], *, tasks_to_come: int | None = None) -> T:
        """``work()`` in one of the threads, while the caller's thread looks after the `Cancellation`.

        Parameters
        ----------
        work : callable
        tasks_to_come : int, optional
            How many tasks there will be at once afterwards, whose threads begin now; by default, for all.
        """
        self.start(tasks_to_come)
        done: SimpleQueue[_Done[T]] = SimpleQueue()
        results: dict[int, T] = {}
        try:
            self.submit(functools.partial(_run, lambda _: work(), None, 0, done, threading.Event(), self.cancellation))
            _collect(done, results, 0, self.cancellation, lambda: None)
        except NdcacheError:
            raise  # of the work, which is over
        except BaseException:
            self.cancellation.set()
            raise
        return results[0]

    def serial(self) -> Serial:
        """A thread for what must be done one after the other; if there is none to spare, who asks does it."""
        self._serial = serial = Serial(has_thread=self._has_serial and self.has_threads)

        def serve() -> None:
            self.release_slot()
            serial.serve()

        self.ask(serve)
        return serial

    def end(self) -> None:
        """Forget what has not begun, and wait for what has: then there is no thread left."""
        if self._executor is None or self._has_ended:
            return
        self._wanted = 0
        self._executor.shutdown(wait=False, cancel_futures=True)
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()
        if self._serial is not None:
            self._serial.cancel()
        self._close()
        if getattr(self._mine, "is_serving", False):
            return  # garbage may be collected in any thread
        while self._gone < self._begun:
            with suppress(Empty):
                self._goodbyes.get(timeout=_SOON)
                self._gone += 1
                continue
            if not any(thread.is_alive() for thread in self._threads()):
                break  # Ctrl-C came while one was begun, or counted
        self._executor.shutdown()
        for thread in self._threads():  # which the pool may not know of
            _join(thread)
        self._has_ended = True

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is not None:
                self.cancellation.set()
            self.end()
        finally:
            self.end()  # also if Ctrl-C came while it waited

    def _begin(self) -> None:
        """Begin one thread more."""
        assert self._executor is not None
        self._begun += 1
        try:
            self._executor.submit(_nothing)
        except (RuntimeError, MemoryError) as error:  # too late, or too many for the system
            if isinstance(error, RuntimeError):
                raise_hidden_interrupt(error)
            self._begun -= 1
            if self._begun < self._wanted:
                logger.debug("%d threads instead of %d: %s", self._begun, self._wanted, error)

    def _begin_next(self) -> None:
        with self._beginning:
            if self._begun < self._wanted:
                self._begin()

    def _serve(self) -> None:
        self._mine.is_serving = True
        self._begin_next()
        while True:
            self._posts.get()
            self._mine.is_manned = True
            task = self._next()
            if task is None:
                self._close()  # for the next thread
                self._goodbyes.put(None)
                return
            with suppress(BaseException):
                task()
            del task  # and what it holds
            self.release_slot()

    def _next(self) -> Callable[[], None] | None:
        while True:
            try:
                return self._tasks.get(timeout=_LOOK_AFTER)
            except Empty:
                with suppress(CancelledError):
                    self.cancellation.check()  # if nobody waits any more, this sets it

    def _close(self) -> None:
        """Let the threads go when what was submitted so far is done."""
        if self._serial is not None:
            self._serial.close()
        self._tasks.put(None)
        self._posts.put(None)

    def _threads(self) -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith(f"{self._name}_")]


def map_ordered(
    shards: Sequence[Shard],
    work: Callable[[Shard], T],
    *,
    workers: Workers,
    sizes: Sequence[int] | None = None,
    memory_limit: int,
    stats: LoadStats,
    tick: Callable[[], None] = lambda: None,
) -> Generator[T, None, None]:
    """Run ``work(shard)`` for every shard in `workers`; yield the results in the order of `shards`.

    No shard is begun while more than `memory_limit` bytes of shards are under way or waiting for their turn, unless it
    is the next one. The shard whose result was yielded counts until the next result is asked for. Close the generator
    (or let it end): then no thread is left.

    Parameters
    ----------
    shards : sequence of Shard
    work : callable
        Must look at the `Cancellation` of `workers`, which is set when something failed, or when the caller goes away.
    workers : Workers
        Already started, and used for nothing else any more.
    sizes : sequence of int, optional
        The bytes that each shard counts. Default: those that it has.
    memory_limit : int
        In bytes of the shards.
    stats : LoadStats
    tick : callable
        Called on the caller's thread about every 0.1 s while it waits.

    Raises
    ------
    NdcacheError
        The first error of any shard, at once, whichever's turn it is; those of other shards attached.
    Carried
        Work, or `tick`, raised StopIteration.
    """
    sizes = [shard.nbytes for shard in shards] if sizes is None else sizes
    cancellation, max_workers = workers.cancellation, workers.max_workers if workers.has_threads else 0
    results: dict[int, T] = {}
    done: SimpleQueue[_Done[T]] = SimpleQueue()
    failed = threading.Event()
    begun = taken = in_flight = 0
    try:
        while taken < len(shards):
            while begun < len(shards) and _may_begin(sizes[begun], begun - taken, in_flight, memory_limit, max_workers):
                in_flight += sizes[begun]
                stats.peak_bytes_in_flight = max(stats.peak_bytes_in_flight, in_flight)
                workers.submit(functools.partial(_run, work, shards[begun], begun, done, failed, cancellation))
                begun += 1
            is_limited = begun < len(shards) and in_flight + sizes[begun] > memory_limit
            is_limited = is_limited and begun - taken - len(results) < max_workers
            with stats.timed("memory_limit") if is_limited else nullcontext():
                with stats.timed("wait"):
                    _collect(done, results, taken, cancellation, tick)
                yield results.pop(taken)
            in_flight -= sizes[taken]
            taken += 1
    except BaseException as error:
        cancellation.set()
        workers.end()
        _attach_others(error, done)
        if isinstance(error, StopIteration):
            raise Carried(error) from None
        raise
    finally:
        workers.end()


def _nothing() -> None:
    pass


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
    cancellation: Cancellation,
) -> None:
    # After a failure, the caller's thread, which is to stop everything, may be busy with a shard that came before.
    if failed.is_set() or cancellation.is_set:
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
    done: SimpleQueue[_Done[T]],
    results: dict[int, T],
    wanted: int,
    cancellation: Cancellation,
    tick: Callable[[], None],
) -> None:
    """Take what is done until `wanted` is there, and all that is there already; raise the first error."""
    while wanted not in results or not done.empty():
        try:
            item = done.get(timeout=_TICK)
        except Empty:
            cancellation.poll()
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
