"""Results in order, errors and the look-ahead, without a network."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

import ndcache
from ndcache.stats import LoadStats
from ndcache.workers.cancellation import Cancellation

from ..helpers.tasks import run, shards


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
def test_the_time_lost_to_the_memory_limit_is_counted(memory_limit: int, is_limited: bool) -> None:
    stats = LoadStats()
    results = run(shards(1, 1, 1, 1, 1), name, max_workers=8, memory_limit=memory_limit, stats=stats)
    assert len(list(results)) == 5
    assert (stats.seconds["memory_limit"] > 0) is is_limited


def test_no_shards() -> None:
    assert list(run([], name)) == []


@pytest.mark.parametrize(
    ("sizes", "limit", "begun_before_the_first_is_taken", "peak"),
    [
        ([100, 100, 100, 100], 250, 2, 200),
        ([100, 100, 100, 100], 400, 4, 400),
        ([900, 100, 100], 250, 1, 900),  # one beyond the limit runs alone
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


def test_row_35_the_first_error_is_raised_at_once() -> None:
    cancellation = Cancellation()

    def work(shard: ndcache.Shard) -> None:
        if shard.data_path == "2.bin":
            raise ndcache.ChecksumError("bad", shard=shard.data_path)
        cancellation.sleep(1000)

    with pytest.raises(ndcache.ChecksumError) as caught:
        list(run(shards(1, 1, 1, 1), work, cancellation=cancellation))
    assert caught.value.shard == "2.bin"
    assert caught.value.others == ()  # the cancelled ones add none


def test_row_35_errors_of_other_shards_are_attached() -> None:
    both = threading.Barrier(2)

    def work(shard: ndcache.Shard) -> None:
        both.wait(30)
        raise ndcache.ServerError("failed", shard=shard.data_path)

    with pytest.raises(ndcache.ServerError) as caught:
        list(run(shards(1, 1), work))
    assert {caught.value.shard, *(other.shard for other in caught.value.others)} == {"0.bin", "1.bin"}
    assert "1 more failed" in str(caught.value)


def test_row_35_no_task_begins_after_an_error() -> None:
    begun: list[str] = []

    def work(shard: ndcache.Shard) -> None:
        begun.append(shard.data_path)
        raise ndcache.NotFoundError("gone")

    with pytest.raises(ndcache.NotFoundError):
        list(run(shards(*[1] * 100), work, max_workers=1))
    assert begun == ["0.bin"]


@pytest.mark.parametrize("how", ["close", "drop", "raise", "cancel"])
def test_row_36_leaving_the_generator_stops_the_workers(how: str) -> None:
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


def test_row_36_no_task_begins_after_the_generator_is_closed() -> None:
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


def test_tick_is_called_on_the_callers_thread_while_it_waits() -> None:
    ticked = threading.Event()
    threads: set[threading.Thread] = set()

    def tick() -> None:
        threads.add(threading.current_thread())
        ticked.set()

    def work(shard: ndcache.Shard) -> None:
        assert ticked.wait(30)

    list(run(shards(1), work, tick=tick))
    assert threads == {threading.current_thread()}
