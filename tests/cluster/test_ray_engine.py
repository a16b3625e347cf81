"""The tasks that `ndcache.ray` starts on a real Ray cluster: where they run, what is lost, and what is left."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ndcache.ray import _RayEngine

from ..helpers.loads import wait_until
from ..helpers.ray_cluster import TIMEOUT, RayCluster, open_ray_cluster, wait_for_nothing

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with open_ray_cluster(*(tmp_path_factory.mktemp("home") for _ in range(2))) as cluster:
        yield cluster


@contextlib.contextmanager
def _engine() -> Iterator[_RayEngine]:
    """Yield an engine, and have Ray send the functions of this module, which workers cannot import, by value."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with contextlib.closing(_RayEngine()) as engine:
        yield engine


def _results(engine: _RayEngine, *handles: Any) -> list[Any]:
    found: dict[Any, Any] = {}
    end = time.monotonic() + TIMEOUT
    while not found.keys() >= set(handles):
        assert time.monotonic() < end
        found.update(engine.collect(1.0))
    return [found[handle] for handle in handles]


def home(cancel: Any) -> str:
    return os.environ["NDCACHE_HOME"]


def ones(size: int, cancel: Any) -> Any:
    return np.ones(size, np.uint8)


def total(data: Any, cancel: Any) -> int:
    return int(data.sum())


def wait_for_release(path: str, cancel: Any) -> None:
    Path(path).touch()
    cancel.wait(TIMEOUT)
    Path(path).unlink()


def die(cancel: Any) -> None:
    os.kill(os.getpid(), 9)


def _homes() -> dict[str, str]:
    with _engine() as engine:
        workers = engine.workers()
        return dict(zip(workers, _results(engine, *(engine.submit(worker, home) for worker in workers)), strict=True))


def test_tasks_run_where_they_should(cluster: RayCluster) -> None:
    assert cluster.run(_homes) == {node: str(home) for node, home in cluster.homes.items()}


def _send() -> list[Any]:
    sent = _send_one()
    wait_for_nothing()
    return sent


def _send_one() -> list[Any]:
    with _engine() as engine:
        one, other = engine.workers()
        piece = engine.submit(one, ones, 1 << 20, stays=True)
        handle = engine.submit(other, total, piece)
        engine.release([piece])
        sent = _results(engine, handle)
        assert engine.collect(0.1) == []  # what stays is not returned
        return sent


def test_results_travel_and_nothing_is_left(cluster: RayCluster) -> None:
    assert cluster.run(_send) == [1 << 20]


def _release(path: Path) -> bool:
    with _engine() as engine:
        worker = next(iter(engine.workers()))
        handle = engine.submit(worker, wait_for_release, str(path))
        wait_until(path.exists)
        engine.release([handle, handle])
        wait_until(lambda: not path.exists())
        assert engine.collect(0) == []
        assert _results(engine, engine.submit(worker, total, np.ones(3))) == [3]
    return True


def test_a_released_task_learns_of_it(cluster: RayCluster, tmp_path: Path) -> None:
    assert cluster.run(_release, tmp_path / "runs")


def _lose() -> tuple[list[str], list[str], list[Any]]:
    with _engine() as engine:
        one, other = before = list(engine.workers())
        piece = engine.submit(other, ones, 1 << 20, stays=True)
        assert _results(engine, engine.submit(one, total, piece)) == [1 << 20]
        engine.submit(other, die)
        engine.submit(other, wait_for_release, "/never")
        wait_until(lambda: bool(engine.collect(0.1)) or other not in engine._actors)
        engine.submit(other, home)  # it is not there any more
        after = list(engine.workers())
        # What the actor had made is still in its node's store.
        totals = _results(engine, *(engine.submit(worker, total, piece) for worker in after))
        return before, after, totals


def test_an_actor_that_dies_is_replaced(cluster: RayCluster) -> None:
    before, after, totals = cluster.run(_lose)
    assert after == [before[0], f"{before[1]}/2"]
    assert totals == [1 << 20] * 2


def _die_often() -> None:
    with _engine() as engine:
        while True:
            engine.submit(min(engine.workers()), die)
            engine.collect(1.0)


def test_actors_that_die_all_the_time_end_the_call(cluster: RayCluster) -> None:
    with pytest.raises(RuntimeError, match=r"the actor on the Ray node [0-9a-f]+ died 4 times"):
        cluster.run(_die_often)
