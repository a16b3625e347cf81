"""Workers, order and look-ahead, without a network."""

from __future__ import annotations

import _thread
import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import pytest

import ndcache
from ndcache.stats import LoadStats
from ndcache.workers.cancellation import Cancellation
from ndcache.workers.ordered import map_ordered
from ndcache.workers.pool import WorkerPool


def shards(*sizes: int) -> list[ndcache.Shard]:
    return [ndcache.Shard(f"{index}.bin", size, None, None, "raw-shard", ()) for index, size in enumerate(sizes)]


def run(
    items: Sequence[ndcache.Shard],
    work: Callable[[ndcache.Shard], Any],
    *,
    max_workers: int = 4,
    cancellation: Cancellation | None = None,
    workers: WorkerPool | None = None,
    **options: Any,
) -> Generator[Any, None, None]:
    workers = workers or WorkerPool(max_workers, cancellation)
    workers.start()
    sizes = [item.nbytes for item in items]
    return map_ordered(
        items, work, **{"pool": workers, "sizes": sizes, "memory_limit": 1000, "stats": LoadStats(), **options}
    )


def name(shard: ndcache.Shard) -> str:
    return shard.data_path


def test_results_come_in_order_whatever_finishes_first() -> None:
    last_is_done = threading.Event()

    def work(shard: ndcache.Shard) -> str:
        if shard.data_path == "3.bin":
            last_is_done.set()
        elif shard.data_path == "0.bin":
            assert last_is_done.wait(30)
        return shard.data_path

    assert list(run(shards(1, 1, 1, 1), work)) == ["0.bin", "1.bin", "2.bin", "3.bin"]


@pytest.mark.parametrize(("memory_limit", "is_limited"), [(1, True), (4, True), (5, False), (1000, False)])
def test_time_that_the_memory_limit_costs(memory_limit: int, is_limited: bool) -> None:
    stats = LoadStats()
    results = run(shards(1, 1, 1, 1, 1), name, max_workers=8, memory_limit=memory_limit, stats=stats)
    assert len(list(results)) == 5
    assert (stats.seconds["memory_limit"] > 0) is is_limited


def test_no_shards() -> None:
    assert list(run([], name)) == []


@pytest.mark.parametrize("max_workers", [1, 3])
def test_never_more_than_max_workers(max_workers: int) -> None:
    lock, running, peak = threading.Lock(), 0, 0

    def work(shard: ndcache.Shard) -> None:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        barrier.wait(30)  # none goes on before max_workers of them are here
        with lock:
            running -= 1

    barrier = threading.Barrier(max_workers)
    list(run(shards(*[1] * 12), work, max_workers=max_workers))
    assert peak == max_workers


@pytest.mark.parametrize("max_workers", [1, 3])
def test_who_is_relieved_has_another_begin(max_workers: int) -> None:
    lock, workers = threading.Lock(), WorkerPool(max_workers)
    together, relieved = threading.Barrier(max_workers), threading.Barrier(2)
    unrelieved = peak = 0

    def work(shard: ndcache.Shard) -> str:
        nonlocal unrelieved, peak
        with lock:
            unrelieved += 1
            peak = max(peak, unrelieved)
        together.wait(30)  # none goes on before max_workers of them are here
        with lock:
            unrelieved -= 1
        workers.release_slot()
        relieved.wait(30)  # with max_workers=1: for one that has begun although this one is not done
        workers.release_slot()  # twice is once
        return shard.data_path

    count = 4 * max_workers  # which are begun before the first one's turn comes
    arrived = list(run(shards(*[1] * count), work, workers=workers))
    assert arrived == [f"{index}.bin" for index in range(count)]
    assert peak == max_workers


@pytest.mark.parametrize(
    ("sizes", "limit", "begun_before_the_first_is_taken", "peak"),
    [
        ([100, 100, 100, 100], 250, 2, 200),
        ([100, 100, 100, 100], 400, 4, 400),
        ([900, 100, 100], 250, 1, 900),  # one over the limit goes alone
        ([100, 900, 100], 250, 1, 900),
    ],
)
def test_the_look_ahead_is_bounded_by_bytes(
    sizes: list[int], limit: int, begun_before_the_first_is_taken: int, peak: int
) -> None:
    begun: list[str] = []
    stats = LoadStats()
    with closing(
        run(shards(*sizes), lambda shard: begun.append(shard.data_path), memory_limit=limit, stats=stats)
    ) as results:
        next(results)
        # The look-ahead was filled before the first result was waited for.
        assert stats.peak_bytes_in_flight == sum(sizes[:begun_before_the_first_is_taken])
        list(results)
    assert len(begun) == len(sizes)
    assert stats.peak_bytes_in_flight == peak


def test_row_35_an_error_is_raised_at_once_whoevers_turn_it_is() -> None:
    cancellation = Cancellation()

    def work(shard: ndcache.Shard) -> None:
        if shard.data_path == "2.bin":
            raise ndcache.ChecksumError("bad", shard=shard.data_path)
        cancellation.sleep(1000)

    with pytest.raises(ndcache.ChecksumError) as caught:
        list(run(shards(1, 1, 1, 1), work, cancellation=cancellation))
    assert caught.value.shard == "2.bin"
    assert caught.value.others == ()  # that the rest was stopped is no error of its own


def test_row_35_errors_of_other_shards_are_attached() -> None:
    both = threading.Barrier(2)

    def work(shard: ndcache.Shard) -> None:
        both.wait(30)
        raise ndcache.ServerError("failed", shard=shard.data_path)

    with pytest.raises(ndcache.ServerError) as caught:
        list(run(shards(1, 1), work))
    assert {caught.value.shard, *(other.shard for other in caught.value.others)} == {"0.bin", "1.bin"}
    assert "1 more failed" in str(caught.value)


def test_row_35_what_was_not_begun_is_never_begun_after_an_error() -> None:
    begun: list[str] = []

    def work(shard: ndcache.Shard) -> None:
        begun.append(shard.data_path)
        raise ndcache.NotFoundError("gone")

    with pytest.raises(ndcache.NotFoundError):
        list(run(shards(*[1] * 100), work, max_workers=1))
    assert begun == ["0.bin"]


@pytest.mark.parametrize("how", ["close", "drop", "raise", "cancel"])
def test_row_36_going_away_stops_the_workers(how: str) -> None:
    cancel = threading.Event()
    cancellation = Cancellation(cancel)
    reached = threading.Event()

    def work(shard: ndcache.Shard) -> str:
        if shard.data_path != "0.bin":
            reached.set()
            cancellation.sleep(1000)
        return shard.data_path

    results = run(shards(1, 1, 1), work, cancellation=cancellation)
    assert next(results) == "0.bin"
    assert reached.wait(30)
    if how == "close":
        results.close()
    elif how == "drop":
        del results
    elif how == "raise":
        with pytest.raises(KeyboardInterrupt):
            results.throw(KeyboardInterrupt)
    else:
        cancel.set()
        with pytest.raises(ndcache.CancelledError):
            next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ndcache")]


def test_row_36_what_waits_for_its_turn_is_never_begun_after_going_away() -> None:
    cancellation, begun, reached = Cancellation(), list[str](), threading.Event()

    def work(shard: ndcache.Shard) -> None:
        begun.append(shard.data_path)
        if shard.data_path == "1.bin":
            reached.set()
            with pytest.raises(ndcache.CancelledError):
                cancellation.sleep(1000)

    results = run(shards(1, 1, 1, 1), work, max_workers=1, cancellation=cancellation)
    next(results)
    assert reached.wait(30)
    results.close()
    assert begun == ["0.bin", "1.bin"]


def test_ticks_come_on_the_callers_thread_while_it_waits() -> None:
    ticked = threading.Event()
    threads: set[threading.Thread] = set()

    def tick() -> None:
        threads.add(threading.current_thread())
        ticked.set()

    def work(shard: ndcache.Shard) -> None:
        assert ticked.wait(30)

    list(run(shards(1), work, tick=tick))
    assert threads == {threading.current_thread()}


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("begun", [1, 2])
@pytest.mark.parametrize("where", ["in start", "before start", "after start"])
def test_row_36_ctrl_c_while_a_thread_is_begun(monkeypatch: pytest.MonkeyPatch, begun: int, where: str) -> None:
    """The pool does not know of it yet, and would not wait for it."""
    start, threads = threading.Thread.start, list[threading.Thread]()
    name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
    start_new = getattr(threading, name)

    def press(now: str) -> None:
        if len(threads) != begun or now != where:
            return
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        _thread.interrupt_main()  # which waits for the work meanwhile: other threads get no signals

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
    with pytest.raises(KeyboardInterrupt), WorkerPool(4, cancellation) as workers:
        workers.start()
        list(run(shards(1, 1, 1, 1), work, workers=workers))
    assert len(threads) >= begun
    for thread in threads:
        with contextlib.suppress(RuntimeError):  # never begun
            thread.join(30)  # of one that has gone, its last steps
    assert not any(thread.is_alive() for thread in threads)
