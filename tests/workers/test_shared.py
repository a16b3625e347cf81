"""Resources that one task obtains and several use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

import ndcache
from ndcache.workers.pool import WorkerPool
from ndcache.workers.postponed import Gate, Postponed
from ndcache.workers.shared import SharedResource

from ..helpers.loads import wait_until
from ..helpers.tasks import run, shards


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        pool.start()
        yield pool


def test_it_is_closed_when_all_have_used_it(pool: WorkerPool) -> None:
    closed: list[str] = []
    shared = SharedResource[str](2, closed.append)
    shared.provide("file", pool)
    with shared as one:
        with shared as other:
            assert (one, other) == ("file", "file")
        assert closed == []
    assert closed == ["file"]
    shared.abandon()
    assert closed == ["file"]


def test_whoever_comes_too_early_is_postponed(pool: WorkerPool) -> None:
    shared = SharedResource[str](1, lambda _: None)
    with pytest.raises(Postponed) as caught, shared:
        pass
    assert caught.value.gate is not None
    shared.provide("file", pool)
    with shared as found:
        assert found == "file"


@pytest.mark.parametrize("when", ["before", "unused", "in use"])
def test_it_is_closed_if_it_is_abandoned(pool: WorkerPool, when: str) -> None:
    closed: list[str] = []
    shared = SharedResource[str](2, closed.append)
    if when == "before":
        shared.abandon()
        shared.provide("file", pool)
    else:
        shared.provide("file", pool)
        if when == "in use":
            with shared:
                shared.abandon()
                assert closed == []
        else:
            shared.abandon()
    assert closed == ["file"]
    with pytest.raises(ndcache.CancelledError), shared:
        pass


def test_an_error_of_a_user_counts_as_a_use(pool: WorkerPool) -> None:
    closed: list[str] = []
    shared = SharedResource[str](1, closed.append)
    shared.provide("file", pool)
    with pytest.raises(ZeroDivisionError), shared:
        raise ZeroDivisionError
    assert closed == ["file"]


def test_a_gate_holds_tasks_until_it_is_open() -> None:
    gate = Gate[str]()
    assert [gate.hold("a"), gate.hold("b")] == [True, True]
    assert gate.open() == ["a", "b"]
    assert gate.hold("c") is False
    assert gate.open() == []


@pytest.mark.parametrize("max_workers", [1, 2, 8])
def test_tasks_that_wait_hold_no_worker_and_come_before_those_that_have_not_begun(max_workers: int) -> None:
    pool = WorkerPool(max_workers)
    shared, order, waited = SharedResource[str](4, lambda _: None), list[str](), threading.Event()

    def work(shard: ndcache.Shard) -> str:
        name = shard.data_path
        if name == "0.bin":
            if max_workers > 1:
                assert waited.wait(60), "all others have run, or wait, while one worker obtains the file"
            shared.provide("file", pool)
        if name in ("0.bin", "1.bin", "2.bin", "3.bin"):
            with shared:
                order.append(name)
        else:
            order.append(name)
            if name == "7.bin":
                waited.set()
        return name

    assert list(run(shards(*[1] * 8), work, pool=pool, max_workers=max_workers)) == [f"{n}.bin" for n in range(8)]
    assert sorted(order) == [f"{n}.bin" for n in range(8)]
    if max_workers > 1:
        assert {*order[:4]} == {f"{n}.bin" for n in range(4, 8)}


def test_tasks_that_wait_are_dropped_when_another_fails() -> None:
    pool = WorkerPool(4)
    shared, waiting = SharedResource[str](3, lambda _: None), list[str]()

    def work(shard: ndcache.Shard) -> None:
        if shard.data_path == "0.bin":
            wait_until(lambda: len(waiting) == 2)
            raise ndcache.ChecksumError("bad", shard=shard.data_path)
        waiting.append(shard.data_path)
        with shared:
            pytest.fail("nobody has provided it")

    with pytest.raises(ndcache.ChecksumError), closing(run(shards(1, 1, 1), work, pool=pool)) as results:
        list(results)
    assert sorted(waiting) == ["1.bin", "2.bin"]
