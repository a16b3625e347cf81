"""The threads of one call."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import CancelledError, NdcacheError
from .cancellation import Cancellation
from .outcomes import Outcomes, Task
from .postponed import Gate, PostponedTasks
from .serial import SerialQueue
from .slots import Slots
from .threads import join_thread, main_thread_has_ended, raise_hidden_interrupt
from .turns import Turns

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["WorkerPool"]

#: Threads beyond `max_workers`, for tasks that go on after they released their slots: publishing a file waits for the
#: disk, and no connection should wait for that. With 20 MiB/s for each of 8 workers, a load to a disk takes 0.95 times
#: as long (6 pairs of runs). With more spare threads, a load that is limited by the CPU takes longer
#: (benchmarks/fetch.py).
_SPARE_THREADS = 2
#: Seconds after which an idle thread checks whether the load is still wanted, and whether there are postponed tasks.
_IDLE_CHECK = 1.0
#: The same, once a task was postponed.
_POSTPONED_CHECK = 0.05
#: Seconds after which `shutdown` checks for threads that ended without saying so.
_SHUTDOWN_CHECK = 0.05

T = TypeVar("T")
logger = logging.getLogger("ndcache")


class WorkerPool:
    """Run tasks in the threads of one call, in first-in, first-out order.

    At most `max_workers` tasks hold a slot at once; tasks that released theirs may still be running beside them.

    All threads start at the beginning, because none can start after the main thread has ended. If none can start at all
    (the main thread has ended already, or the system allows no more), or if the pool was never started, the thread that
    submits a task runs it.

    A task may be postponed, see `Postponed`. It is then run again before tasks that have not begun; without a slot, if
    none is free.

    Parameters
    ----------
    max_workers : int
    cancellation : Cancellation, optional
        When it is set, the threads end.
    has_serial_thread : bool
        Whether to have one more thread, for the `SerialQueue`.
    has_side_thread : bool
        Whether to have one more thread, for `run_beside`.

    Attributes
    ----------
    turns : Turns
        The workers' turns at short steps in Python. A task that takes one releases it, however the task ends.
    tick : callable or None
        Called on the caller's thread about every 0.1 s while it waits in `run`.
    """

    tick: Callable[[], None] | None = None

    # Ctrl-C can come between any two steps of the main thread. So it shares queues with the workers, and no lock that
    # it could leave locked. It starts one thread, which starts the next one. And `shutdown` waits until the threads say
    # that they end before it joins them: before Python 3.13, a join that Ctrl-C interrupts takes the thread for dead.

    _numbers = itertools.count(1)

    def __init__(
        self,
        max_workers: int = 1,
        cancellation: Cancellation | None = None,
        *,
        has_serial_thread: bool = False,
        has_side_thread: bool = False,
    ) -> None:
        self.max_workers = max_workers
        self._most_workers = 2 * max_workers
        self.cancellation = Cancellation() if cancellation is None else cancellation
        self._has_serial_thread = has_serial_thread
        self._extra = has_serial_thread + has_side_thread
        self._serial_queue: SerialQueue | None = None
        self._end_side: Callable[[], None] | None = None
        self._name = f"ndcache-{next(self._numbers)}"
        self._executor: ThreadPoolExecutor | None = None
        self._wanted = self._started = self._ended = 0  # threads
        self._is_shut_down = False
        self._starting = threading.Lock()
        self._tasks: SimpleQueue[Task[Any] | None] = SimpleQueue()
        self._slotless_tasks: SimpleQueue[Task[Any]] = SimpleQueue()
        self._slots = Slots(max_workers)
        self.turns = Turns(max_workers + _SPARE_THREADS)
        self._goodbyes: SimpleQueue[None] = SimpleQueue()
        self._postponed = PostponedTasks[Task[Any]]()
        self._check_seconds = _IDLE_CHECK
        self._next_spare_work: Callable[[], Callable[[], object] | None] = _do_nothing
        self._sleep: Callable[[float], None] = self.cancellation.sleep
        self._this_thread = threading.local()

    def start(self, tasks: int | None = None, max_workers: int = 0) -> None:
        """Start as many threads as `tasks` tasks at once can use, by default all; fewer if no more can start.

        Parameters
        ----------
        tasks : int, optional
            The most tasks that there will be at once.
        max_workers : int
            Let so many hold a slot at once, up to twice as many as at first, unless more do already.
        """
        while self.max_workers < min(max_workers, self._most_workers):
            self.max_workers += 1
            self._slots.add()
        most = self.max_workers + _SPARE_THREADS
        wanted = self._extra + (most if tasks is None else max(1, min(tasks, most)))
        if self._wanted >= wanted or main_thread_has_ended():
            return
        self._wanted = wanted
        if self._executor is not None:
            self.submit_helper(self._start_next_thread)
            return
        from concurrent.futures import ThreadPoolExecutor  # fails to import once Python is shutting down

        # The threads run `_serve` as their initializer, because the executor accepts no task once the main thread has
        # ended.
        self._executor = ThreadPoolExecutor(
            self._most_workers + _SPARE_THREADS + self._extra, self._name, initializer=self._serve
        )
        self.cancellation.on_set(self._end_threads)
        self._start_thread()

    @property
    def has_threads(self) -> bool:
        """Return whether there are threads; if not, `submit` runs tasks in the calling thread."""
        return self._started > 0

    @property
    def max_helpers(self) -> int:
        """Return the number of other workers that can help a worker with its task."""
        return max(0, min(self.max_workers, self._wanted - self._extra) - 1)

    def submit(self, task: Task[Any]) -> None:
        """Run `task` in a worker when its turn comes; without workers, run it here and now.

        One that needs no slot is run before those that have not begun, because it may be long until a slot is free.
        """
        if self.has_threads:
            if task.needs_slot:
                self._tasks.put(task)
                return
            self._slotless_tasks.put(task)
            self._slots.wake()
            self.submit_helper(_do_nothing)  # wakes a worker that has a slot, and waits for tasks
            return
        with task:
            if task.is_wanted:
                task.finish(task.work())

    def submit_helper(self, work: Callable[[], None]) -> None:
        """Call `work` when a worker has nothing else to do. It may never be called; its exceptions are dropped."""
        if self.has_threads:
            self._tasks.put(Task(work))

    def submit_next(self, task: Task[Any]) -> None:
        """Run `task` in a worker before those that have not begun. Only workers may call this."""
        self._postponed.add(task, 0.0)
        if not task.needs_slot:
            self._slots.wake()
        self.submit_helper(_do_nothing)

    def open_gate(self, gate: Gate[Task[Any]]) -> None:
        """Run the tasks that `gate` has held back, before those that have not begun."""
        for task in gate.open():
            self.submit_next(task)

    @property
    def can_postpone(self) -> bool:
        """Return whether the calling thread runs a task that it may postpone by raising `Postponed`."""
        return getattr(self._this_thread, "is_worker", False)

    @property
    def has_slot(self) -> bool:
        """Return whether the calling thread may use a connection: only a postponed task may run without a slot."""
        return self._slots.is_held or not self.can_postpone

    def set_spare_work(
        self,
        next_work: Callable[[], Callable[[], object] | None],
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        """Set what workers do while tasks are postponed and there are no others.

        Parameters
        ----------
        next_work : callable
            Return something to call, or None if there is nothing to do. Exceptions of that call are dropped.
        sleep : callable, optional
            Wait for a number of seconds until a postponed task is due; by default `Cancellation.sleep`.
        """
        self._next_spare_work, self._sleep = next_work, sleep or self.cancellation.sleep

    def release_slot(self) -> None:
        """Let the next task begin. A task calls this when it has not ended but needs no connection any more."""
        self._slots.release()

    def run(self, work: Callable[[], T], *, tasks_to_come: int | None = None) -> T:
        """Return ``work()``, run in a worker while the caller's thread polls the `Cancellation`.

        Parameters
        ----------
        work : callable
        tasks_to_come : int, optional
            The most tasks that there will be at once afterwards. Their threads start now; by default, all threads do.
        """
        self.start(tasks_to_come)
        outcomes = Outcomes[T](self.cancellation)
        try:
            self.submit(Task(work, outcomes))
            outcomes.wait_for(0, self.tick)
        except NdcacheError:
            raise  # The work is over; nothing needs to be cancelled.
        except BaseException:
            self.cancellation.set()
            raise
        return outcomes.take(0)

    def open_serial_queue(self) -> SerialQueue:
        """Return a queue whose tasks run one after the other, in a worker if there is one to spare."""
        self._serial_queue = queue = SerialQueue(has_thread=self._has_serial_thread and self.has_threads)

        def serve() -> None:
            self.release_slot()
            if self._started == 1:
                queue.close()  # No other thread could start. If this one waited for the queue, no task would ever run.
            queue.serve()

        self.submit_helper(serve)
        return queue

    def run_beside(self, work: Callable[[], None], end: Callable[[], None]) -> None:
        """Call `work` in a thread beside the tasks, if there is one to spare.

        Parameters
        ----------
        work : callable
            Must return soon after `end` was called.
        end : callable
            Called, perhaps more than once, when the threads are to end. Must not wait for anything.
        """
        self._end_side = end

        def serve() -> None:
            self.release_slot()
            if self._started > self._extra:  # otherwise no thread would be left for the tasks
                work()

        self.submit_helper(serve)

    def shutdown(self) -> None:
        """Drop the tasks that have not begun, wait for the others, and end all threads."""
        if self._executor is None or self._is_shut_down:
            return
        self._wanted = 0
        self._next_spare_work, self._sleep = _do_nothing, self.cancellation.sleep  # not what refers to this pool
        self._executor.shutdown(wait=False, cancel_futures=True)
        for queue in (self._tasks, self._slotless_tasks):
            with suppress(Empty):
                while True:
                    queue.get_nowait()
        if self._serial_queue is not None:
            self._serial_queue.cancel()
        self._end_threads()
        if getattr(self._this_thread, "is_worker", False):
            return  # The garbage collector, which closes generators, may run in a worker.
        while self._ended < self._started:
            with suppress(Empty):
                self._goodbyes.get(timeout=_SHUTDOWN_CHECK)
                self._ended += 1
                continue
            if not any(thread.is_alive() for thread in _threads_of(self._name)):
                break  # Ctrl-C came while a thread was started, or counted.
        self._executor.shutdown()
        for thread in _threads_of(self._name):  # The executor may not know all of them.
            join_thread(thread)
        self._is_shut_down = True

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is not None:
                self.cancellation.set()
            self.shutdown()
        finally:
            self.shutdown()  # once more, in case Ctrl-C interrupted it

    def _start_thread(self) -> None:
        assert self._executor is not None
        self._started += 1
        try:
            self._executor.submit(_do_nothing)
        except (RuntimeError, MemoryError) as error:  # too late, or too many for the system
            if isinstance(error, RuntimeError):
                raise_hidden_interrupt(error)
            self._started -= 1
            if self._started < self._wanted:
                logger.debug("only %d of %d threads could start: %s", self._started, self._wanted, error)

    def _start_next_thread(self) -> None:
        with self._starting:
            if self._started < self._wanted:
                self._start_thread()

    def _serve(self) -> None:
        """Run tasks until the pool ends."""
        self._this_thread.is_worker = True
        self._start_next_thread()
        while True:
            has_slot = self._slots.acquire(self._check_seconds)
            # While all slots are taken, a postponed task can still be completed if what it waited for is there.
            task = self._next_task() if has_slot else self._next_without_slot()
            if task is None and not has_slot:
                continue
            if task is None:
                self._end_threads()  # so that the next thread ends, too
                self._goodbyes.put(None)
                return
            with task:
                if task.is_wanted:
                    task.finish(task.work())
            if task.postponed_seconds is not None:
                self._postpone(task, task.postponed_seconds)
            del task  # frees what it holds while this thread waits
            self.release_slot()

    def _next_without_slot(self) -> Task[Any] | None:
        with suppress(Empty):
            return self._postponed.take() or self._slotless_tasks.get_nowait()
        return None

    def _next_task(self) -> Task[Any] | None:
        while True:
            if (task := self._next_without_slot()) is not None:
                return task
            with suppress(Empty):
                if self._postponed:
                    return self._tasks.get_nowait()
                return self._tasks.get(timeout=self._check_seconds)
            with suppress(CancelledError):
                self.cancellation.check()  # cancels itself if no thread waits for the load any more
                if not (seconds := self._postponed.seconds_left()):
                    continue  # there is none any more, or one is due
                if (work := self._next_spare_work()) is not None:
                    return Task(work)
                self._sleep(min(seconds, _POSTPONED_CHECK))

    def _postpone(self, task: Task[Any], seconds: float) -> None:
        if task.gate is not None:
            if not task.gate.hold(task):
                self._postponed.add(task, 0.0)  # it was opened just now
            return
        # With many of them, each is looked at less often.
        self._postponed.add(task, seconds * max(1.0, len(self._postponed) / self.max_workers))
        if self._check_seconds == _IDLE_CHECK:  # it is the first one
            self._check_seconds = _POSTPONED_CHECK
            for _ in range(self.max_workers):
                self.submit_helper(_let_others_wake)

    def _end_threads(self) -> None:
        """Let the threads end after the tasks that were submitted so far."""
        if self._serial_queue is not None:
            self._serial_queue.close()
        if self._end_side is not None:
            self._end_side()
        self._tasks.put(None)
        self._slots.add()


def _threads_of(name: str) -> list[threading.Thread]:
    """Return the threads of the pool with this name."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"{name}_")]


def _do_nothing() -> None:
    pass


def _let_others_wake() -> None:
    """Take a moment. Otherwise the worker that is awake already could take all that was submitted to wake others."""
    time.sleep(0.001)
