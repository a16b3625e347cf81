"""Processes that load from one server which limits requests; row 67 of docs/faults.rst."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ndcache
from ndcache.http.retry import RetryPolicy
from ndcache.store import lock
from ndcache.store.partials import file as partial

from ..helpers import models
from ..helpers.nginx import nginx, statuses
from ..helpers.processes import Child, Zygote
from ..helpers.servers import Connection, ConnectionLimit, FileServer, RateLimit, Request, ScriptedServer, reply
from .children import load, wait_until

pytestmark = pytest.mark.once
PROCESSES = 4
SHARDS = 48


def model_of_each(folder: Path, processes: int, shards: int, shard_bytes: int) -> list[str]:
    """Write a model for each process, `shards` in all, and return their names. All shards differ."""
    names, count = [f"model-{number}" for number in range(processes)], shards // processes
    for number, name in enumerate(names):
        models.simple_model(folder / name, shards=count, shard_bytes=shard_bytes, seed=number * count)
    return names


def load_all(zygote: Zygote, url: str, names: list[str], cache_dir: Path) -> list[Child]:
    """Start a process for each model, all with one cache."""
    policy = RetryPolicy(retries=2)
    return [zygote.start(load, f"{url}{name}/", cache_dir=cache_dir, retries=policy) for name in names]


def refusals(
    zygote: Zygote, serve: Callable[..., FileServer], folder: Path, limit: ConnectionLimit, processes: int
) -> int:
    """Return how many requests are refused while processes load; all but the first begin when it knows the limit."""
    is_rate = isinstance(limit, RateLimit)
    names = model_of_each(folder / "models", processes, SHARDS, 1000 if is_rate else 25_000)
    server = serve(folder / "models", rate=None if is_rate else 100_000, limit=limit)
    children = load_all(zygote, server.url, names[:1], folder / "cache")
    wait_until(lambda: limit.refused)
    children += load_all(zygote, server.url, names[1:], folder / "cache")
    for child in children:
        child.result()
    return limit.refused


@pytest.mark.parametrize("make", [lambda: ConnectionLimit(2), lambda: RateLimit(8, 1)], ids=["connections", "rate"])
def test_row_67_processes_are_refused_as_seldom_as_one(
    tmp_path: Path, zygote: Zygote, serve: Callable[..., FileServer], make: Callable[[], ConnectionLimit]
) -> None:
    alone = refusals(zygote, serve, tmp_path / "one", make(), 1)
    together = refusals(zygote, serve, tmp_path / "many", make(), PROCESSES)
    # Without sharing, each of the three others is refused 6 or 7 times at first, and again and again later.
    assert together <= alone + 18


@pytest.mark.parametrize(
    ("limit", "shard_bytes", "needed"),
    [
        ("limit_conn connections 2; limit_rate 100k;", 51_200, 12.0),
        ("limit_req zone=requests burst=5 nodelay;", 1000, 9.0),
    ],
)
def test_row_67_processes_load_as_fast_as_nginx_allows(
    tmp_path: Path, zygote: Zygote, limit: str, shard_bytes: int, needed: float
) -> None:
    """All begin at the same moment, when nobody knows the limit."""
    names = model_of_each(tmp_path / "models", PROCESSES, SHARDS, shard_bytes)
    with nginx(tmp_path / "nginx", tmp_path / "models", limit) as url:
        for child in load_all(zygote, url, names, tmp_path / "cache"):
            child.result()
        answers = statuses(tmp_path / "nginx")
    times = [moment for moment, _ in answers]
    assert max(times) - min(times) <= 1.5 * needed
    assert [status for _, status in answers].count(503) <= 8 * PROCESSES + SHARDS // 2


def load_impatiently(url: str, cache_dir: Path) -> str:
    """Load a model in a process that soon takes the holder of a lock for dead."""
    lock._PATIENCE = (3.0, 3.2)
    partial._TOUCH_SECONDS = 0.2
    return load(url, cache_dir=cache_dir, retries=RetryPolicy(retries=20, backoff=0.1, max_backoff=0.5))


def test_row_67_a_process_that_waits_for_its_turn_is_not_taken_for_dead(
    tmp_path: Path, zygote: Zygote, serve: Callable[..., FileServer]
) -> None:
    """All workers want the few shards, and most of those that hold a lock wait for the server's only connection."""
    models.simple_model(tmp_path / "model", shards=8, shard_bytes=100_000)
    server = serve(tmp_path / "model", rate=100_000, limit=(limit := ConnectionLimit(1)))
    children = [zygote.start(load_impatiently, server.url, cache_dir=tmp_path / "cache") for _ in range(PROCESSES)]
    assert len({child.result() for child in children}) == 1
    assert len(server.shard_requests()) - limit.refused == 8


def test_row_67_one_retry_after_delays_all_processes(
    tmp_path: Path, zygote: Zygote, scripted: ScriptedServer, cache_dir: Path
) -> None:
    names = model_of_each(tmp_path / "models", PROCESSES, 2 * SHARDS, 1000)
    came: list[float] = []
    told: list[float] = []

    def step(connection: Connection, request: Request) -> None:
        came.append(time.monotonic())
        if len(came) == 1:
            connection.send(reply(429, headers={"Retry-After": "3"}))
            told.append(time.monotonic())
        else:
            time.sleep(0.2)  # so that a process has requests left when it learns of the refusal
            connection.send(reply(200, (tmp_path / "models" / request.path[1:]).read_bytes()))

    for path in (tmp_path / "models").rglob("*.*"):
        name = f"/{path.relative_to(tmp_path / 'models')}"
        scripted.script[name] = [reply(200, path.read_bytes()) if path.suffix == ".json" else step]
    for child in load_all(zygote, scripted.url, names, cache_dir):
        child.result()
    assert len(came) == 2 * SHARDS + 1
    # Each process may have begun all that it can at once, and some more until the first one had read the response.
    # Without sharing, the three others have nothing left to ask for at the end of this pause.
    assert len([moment for moment in came if moment < told[0] + 2.9]) <= 12 * PROCESSES


def test_row_67_a_process_killed_in_the_middle_stops_nobody(
    tmp_path: Path, zygote: Zygote, serve: Callable[..., FileServer], cache_dir: Path
) -> None:
    names = model_of_each(tmp_path / "models", 2, 24, 25_000)
    limit = ConnectionLimit(2)
    server = serve(tmp_path / "models", rate=100_000, limit=limit)
    first, second = load_all(zygote, server.url, names, cache_dir)
    wait_until(lambda: limit.refused and limit.peak == 2)
    first.kill()
    second.result()
    assert ndcache.is_cached(f"{server.url}{names[1]}/", cache_dir=cache_dir)
