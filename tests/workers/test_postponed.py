"""Tasks that are postponed, and what workers do meanwhile."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import pytest

import ndcache
from ndcache.workers.cancellation import Cancellation
from ndcache.workers.pool import WorkerPool
from ndcache.workers.postponed import Postponed, PostponedTasks

from ..helpers.loads import loading_threads
from ..helpers.tasks import run, shards


def name_of(index: int) -> str:
    return f"{index}.bin"


class Waiting:
    """Work that is postponed until its items are released.

    Attributes
    ----------
    runs : list of str
        The items whose work was called, each time.
    """

    def __init__(self, *waits: int) -> None:
        self.waits = {name_of(index): threading.Event() for index in waits}
        self.runs: list[str] = []

    def __call__(self, shard: ndcache.Shard) -> str:
        self.runs.append(shard.data_path)
        event = self.waits.get(shard.data_path)
        if event is not None and not event.is_set():
            raise Postponed(0.001)
        return shard.data_path


def in_turn(works: list[Callable[[], object]]) -> Callable[[], Callable[[], object] | None]:
    """Return a function that returns these, one after the other, and then None."""
    return lambda: works.pop(0) if works else None


def test_tasks_come_when_they_are_due_the_earliest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("ndcache.workers.postponed.time.monotonic", lambda: now[0])
    tasks = PostponedTasks[str]()
    assert (tasks.take(), tasks.seconds_left(), len(tasks)) == (None, None, 0)
    tasks.add("late", 5.0)
    tasks.add("soon", 1.0)
    tasks.add("soon, too", 1.0)
    assert (tasks.take(), tasks.seconds_left(), len(tasks)) == (None, 1.0, 3)
    now[0] += 2
    assert [tasks.take(), tasks.take(), tasks.take()] == ["soon", "soon, too", None]
    now[0] += 4
    assert tasks.seconds_left() == 0.0
    assert tasks.take() == "late"


@pytest.mark.parametrize("max_workers", [1, 3])
def test_a_postponed_task_is_run_again_and_the_order_stays(max_workers: int) -> None:
    """Its worker does the other tasks meanwhile."""
    work, names = Waiting(0, 2), [name_of(index) for index in range(4)]

    def releasing(shard: ndcache.Shard) -> str:
        if set(work.runs) == set(names) and work.runs.count(names[0]) >= 3:
            for event in work.waits.values():
                event.set()
        return work(shard)

    assert list(run(shards(*[1] * 4), releasing, max_workers=max_workers)) == names
    assert [work.runs.count(names[index]) for index in (1, 3)] == [1, 1]


def test_spare_work_is_done_only_while_a_task_is_postponed() -> None:
    done: list[int] = []
    pool, work = WorkerPool(2), Waiting(1)

    def spare(index: int) -> None:
        done.append(index)
        if index == 4:
            work.waits[name_of(1)].set()

    pool.set_spare_work(in_turn([functools.partial(spare, index) for index in range(5)]))
    results = run(shards(*[1] * 3), work, pool=pool)
    assert list(results) == [name_of(index) for index in range(3)]
    assert sorted(done) == list(range(5))

    idle = WorkerPool(2)
    idle.set_spare_work(lambda: pytest.fail("no task is postponed"))
    assert list(run(shards(1, 1), Waiting(), pool=idle)) == [name_of(0), name_of(1)]


def test_a_task_can_end_while_all_slots_are_taken_but_not_download() -> None:
    """A worker without a slot runs it."""
    pool, work, has_slot = WorkerPool(1), Waiting(0), list[bool]()
    busy, go_on = threading.Event(), threading.Event()

    def noting(shard: ndcache.Shard) -> str:
        result = work(shard)
        has_slot.append(pool.has_slot)
        return result

    def spare() -> None:
        busy.set()
        assert go_on.wait(30)

    pool.set_spare_work(in_turn([spare]))
    results = run(shards(1), noting, pool=pool)

    def release() -> None:
        assert busy.wait(30)
        work.waits[name_of(0)].set()

    thread = threading.Thread(target=release)
    thread.start()
    assert next(results) == name_of(0)
    assert has_slot == [False]
    assert not go_on.is_set()
    go_on.set()
    assert list(results) == []
    thread.join()


def test_an_error_of_spare_work_is_dropped() -> None:
    pool, work = WorkerPool(1), Waiting(0)

    def fail() -> None:
        work.waits[name_of(0)].set()
        raise ZeroDivisionError

    pool.set_spare_work(in_turn([fail]))
    assert list(run(shards(1, 1), work, pool=pool)) == [name_of(0), name_of(1)]


def test_an_error_of_another_task_ends_the_wait() -> None:
    work = Waiting(0)

    def failing(shard: ndcache.Shard) -> str:
        if shard.data_path == name_of(1):
            raise ndcache.NotFoundError("gone")
        return work(shard)

    with pytest.raises(ndcache.NotFoundError):
        list(run(shards(1, 1), failing, max_workers=1))
    assert loading_threads() == []


def test_row_36_a_load_whose_tasks_are_postponed_can_be_cancelled() -> None:
    cancel, work = threading.Event(), Waiting(0, 1, 2)

    def cancelling(shard: ndcache.Shard) -> str:
        if len(work.runs) > 6:
            cancel.set()
        return work(shard)

    with pytest.raises(ndcache.CancelledError):
        list(run(shards(1, 1, 1), cancelling, cancellation=Cancellation(cancel)))
    assert loading_threads() == []


def test_only_workers_can_postpone() -> None:
    pool, seen = WorkerPool(1), list[bool]()
    assert (pool.can_postpone, pool.has_slot) == (False, True)

    def note(shard: ndcache.Shard) -> None:
        seen.extend([pool.can_postpone, pool.has_slot])

    list(run(shards(1), note, pool=pool))
    assert seen == [True, True]
