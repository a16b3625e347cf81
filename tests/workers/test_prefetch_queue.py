"""The queue of items that workers begin ahead of their turn."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from ndcache.workers import prefetch_queue
from ndcache.workers.prefetch_queue import PrefetchQueue


def take_all(queue: PrefetchQueue[int]) -> list[int]:
    taken = []
    while (item := queue.take()) is not None:
        taken.append(item)
    return taken


def test_items_come_in_order_and_once() -> None:
    queue = PrefetchQueue(range(5))
    assert take_all(queue) == [0, 1, 2, 3, 4]
    assert take_all(queue) == []


def test_items_whose_turn_has_come_are_left_out() -> None:
    queue = PrefetchQueue(range(5))
    queue.discard(0)
    queue.discard(3)
    assert take_all(queue) == [1, 2, 4]


def test_what_others_work_on_comes_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("ndcache.workers.prefetch_queue.time.monotonic", lambda: now[0])
    queue = PrefetchQueue(range(3))
    for _ in range(3):
        for item in take_all(queue):
            queue.put_back(item)
        assert take_all(queue) == []
        now[0] += prefetch_queue._RECHECK
    queue.discard(1)
    assert take_all(queue) == [0, 2]


def test_nothing_comes_after_it_was_cleared() -> None:
    queue = PrefetchQueue(range(3))
    item = queue.take()
    assert item == 0
    queue.clear()
    assert take_all(queue) == []


def test_of_many_workers_each_gets_other_items() -> None:
    """Also while items are put back: each is handed out no more often than it was put in."""
    queue, count = PrefetchQueue(range(5000)), 5000

    def work(_: int) -> list[int]:
        return take_all(queue)

    with ThreadPoolExecutor(8) as threads:
        taken = [item for items in threads.map(work, range(8)) for item in items]
    assert sorted(taken) == list(range(count))
