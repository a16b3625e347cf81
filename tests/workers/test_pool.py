"""The pool's threads: how many there are, slots, and Ctrl-C."""

from __future__ import annotations

import _thread
import contextlib
import threading
import time
from typing import Any

import pytest

import ndcache
from ndcache.workers import pool as pool_module
from ndcache.workers.cancellation import Cancellation
from ndcache.workers.outcomes import Outcomes, Task
from ndcache.workers.pool import WorkerPool
from ndcache.workers.postponed import Gate

from ..helpers.tasks import run, shards


@pytest.mark.parametrize("max_workers", [1, 3])
def test_never_more_than_max_workers(max_workers: int) -> None:
    lock, running, peak = threading.Lock(), 0, 0

    def work(shard: ndcache.Shard) -> None:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        barrier.wait(30)  # until max_workers of them are here
        with lock:
            running -= 1

    barrier = threading.Barrier(max_workers)
    list(run(shards(*[1] * 12), work, max_workers=max_workers))
    assert peak == max_workers


@pytest.mark.parametrize("how", ["submit", "open_gate"])
def test_a_task_that_needs_no_slot_runs_while_all_are_taken(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_IDLE_CHECK", 300.0)  # no thread finds the task by chance
    with WorkerPool(1) as pool:
        pool.start()
        begun, may_end, ran = threading.Event(), threading.Event(), threading.Event()
        outcomes, gate = Outcomes[None](pool.cancellation), Gate[Task[Any]]()

        def hold() -> None:
            begun.set()
            assert may_end.wait(30)

        pool.submit(Task(hold, outcomes, 0))
        assert begun.wait(30)
        task = Task(ran.set, outcomes, 1, needs_slot=False)
        if how == "submit":
            pool.submit(task)
        else:
            gate.hold(task)
            pool.open_gate(gate)
        try:
            assert ran.wait(30)
        finally:
            may_end.set()
        outcomes.wait_for(0)


@pytest.mark.parametrize("max_workers", [1, 3])
def test_a_task_that_releases_its_slot_lets_another_begin(max_workers: int) -> None:
    lock, pool = threading.Lock(), WorkerPool(max_workers)
    together, released = threading.Barrier(max_workers), threading.Barrier(2)
    holding = peak = 0

    def work(shard: ndcache.Shard) -> str:
        nonlocal holding, peak
        with lock:
            holding += 1
            peak = max(peak, holding)
        together.wait(30)  # until max_workers of them are here
        with lock:
            holding -= 1
        pool.release_slot()
        released.wait(30)  # for another one, which must have begun although this one is not done
        pool.release_slot()  # a second release does nothing
        return shard.data_path

    count = 4 * max_workers  # as many as begin before the first result is taken
    arrived = list(run(shards(*[1] * count), work, pool=pool))
    assert arrived == [f"{index}.bin" for index in range(count)]
    assert peak == max_workers


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("begun", [1, 2])
@pytest.mark.parametrize("where", ["in start", "before start", "after start"])
def test_row_36_ctrl_c_while_a_thread_starts_leaves_no_thread(
    monkeypatch: pytest.MonkeyPatch, begun: int, where: str
) -> None:
    """The pool may not know the thread yet, and must wait for it all the same."""
    start, threads = threading.Thread.start, list[threading.Thread]()
    name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
    start_new = getattr(threading, name)

    def press(now: str) -> None:
        if len(threads) != begun or now != where:
            return
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        _thread.interrupt_main()  # the main thread waits for the work; other threads get no signals

    def pressed(self: threading.Thread) -> None:
        threads.append(self)
        press("before start")
        start(self)
        press("after start")

    def pressed_inside(*args: Any, **options: Any) -> Any:
        started = start_new(*args, **options)
        press("in start")
        return started

    cancellation = Cancellation()

    def work(shard: ndcache.Shard) -> None:
        cancellation.sleep(100)

    monkeypatch.setattr(threading.Thread, "start", pressed)
    monkeypatch.setattr(threading, name, pressed_inside)
    with pytest.raises(KeyboardInterrupt), WorkerPool(4, cancellation) as pool:
        pool.start()
        list(run(shards(1, 1, 1, 1), work, pool=pool))
    assert len(threads) >= begun
    for thread in threads:
        with contextlib.suppress(RuntimeError):  # never started
            thread.join(30)  # its last steps
    assert not any(thread.is_alive() for thread in threads)


def test_a_pool_with_a_single_thread_runs_tasks_beside_its_serial_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    start, threads = threading.Thread.start, list[threading.Thread]()
    deadline = time.monotonic() + 30

    def start_only_one(self: threading.Thread) -> None:
        if threads:
            raise RuntimeError("can't start new thread")  # as where the system limits them
        threads.append(self)
        start(self)

    def tick() -> None:
        assert time.monotonic() < deadline, "no task runs"

    monkeypatch.setattr(threading.Thread, "start", start_only_one)
    with WorkerPool(4, has_serial_thread=True) as pool:
        pool.start()
        queue = pool.open_serial_queue()

        def work(shard: ndcache.Shard) -> str:
            return queue.submit(lambda: shard.data_path).result()

        assert list(run(shards(1, 1, 1), work, pool=pool, tick=tick)) == ["0.bin", "1.bin", "2.bin"]


@pytest.mark.parametrize("is_started", [True, False])
@pytest.mark.parametrize(("wanted", "expected"), [(1, 2), (3, 3), (9, 4)])
def test_a_wider_pool_runs_more_tasks_at_once(wanted: int, expected: int, is_started: bool) -> None:
    together = threading.Barrier(expected)
    with WorkerPool(2) as pool:
        if is_started:
            pool.start(1)
        pool.start(expected, wanted)
        assert pool.max_workers == expected
        outcomes = Outcomes[int](pool.cancellation)
        for index in range(expected):
            pool.submit(Task(lambda: together.wait(30), outcomes, index))
        for index in range(expected):
            outcomes.wait_for(index)


def test_a_wider_pool_runs_no_more_tasks_than_that() -> None:
    with WorkerPool(2) as pool:
        pool.start(None, 3)
        begun, may_end, outcomes = threading.Semaphore(0), threading.Event(), Outcomes[bool](pool.cancellation)

        def work() -> bool:
            begun.release()
            return may_end.wait(30)

        for index in range(4):
            pool.submit(Task(work, outcomes, index))
        assert all(begun.acquire(timeout=30) for _ in range(3))
        assert not begun.acquire(timeout=0.2)
        may_end.set()
        for index in range(4):
            outcomes.wait_for(index)
