"""Models of many small shards: when workers have turns, and what a shard costs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import pytest
import requests

import ndcache
from ndcache.workers import turns as module
from ndcache.workers.turns import Turns

from ..helpers.loads import QUICK, assert_same, flip, published, scripted_model, wait_until
from ..helpers.models import simple_model
from ..helpers.servers import Connection, ConnectionLimit, FileServer, Request, ScriptedServer, Step

Serve = Callable[..., FileServer]


@pytest.fixture
def all_turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Turns]]:
    """Let a worker wait for a minute for its turn, and let there be one; afterwards, nobody may have it."""
    made: list[Turns] = []
    init = Turns.__init__

    def noting_init(self: Turns, most: int) -> None:
        init(self, most)
        made.append(self)

    monkeypatch.setattr(Turns, "__init__", noting_init)
    monkeypatch.setattr(module, "_PATIENCE", 60)
    monkeypatch.setattr(module, "_IDLE", -1.0)
    yield made
    assert made
    assert {turns._tokens.qsize() for turns in made} == {1}


@pytest.mark.parametrize("by", ["ndcache", "session", "session with an adapter"])
def test_workers_wait_for_the_server_at_once(
    tmp_path: Path, scripted: ScriptedServer, all_turns: list[Turns], by: str
) -> None:
    """The server answers only when four requests have come, over new connections and over open ones."""

    class Adapter(requests.adapters.HTTPAdapter):
        """Whose connections are not watched."""

    arrays = scripted_model(scripted, tmp_path / "model", shards=12)
    barrier = threading.Barrier(4)

    def after_three_others(path: str) -> Step:
        (response,) = scripted.script[path]

        def answer(connection: Connection, request: Request) -> bool:
            assert isinstance(response, bytes)
            with contextlib.suppress(threading.BrokenBarrierError):  # after 30 s without an answer, the load fails
                barrier.wait(30)
                connection.send(response)
            return True

        return answer

    for path in [path for path in scripted.script if path.endswith(".bin")]:
        scripted.script[path] = [after_three_others(path)]
    session = None if by == "ndcache" else requests.Session()
    if session is not None and by == "session with an adapter":
        session.mount("http://", Adapter())
    assert_same(ndcache.load(scripted.url, max_workers=4, session=session, retries=0, files=False), arrays)
    assert len(scripted.requests) == 13
    if session is not None:
        session.close()


def test_nobody_has_a_turn_while_waiting_for_another_process(
    tmp_path: Path, serve: Serve, cache_dir: Path, all_turns: list[Turns]
) -> None:
    arrays = simple_model(tmp_path / "model", shards=6)
    server = serve(tmp_path / "model")
    locks = ndcache.fetch(server.url) / ".ndcache" / "locks"
    ndcache.delete(server.url)
    locks.mkdir(parents=True)
    with ThreadPoolExecutor(1) as executor:
        with filelock.FileLock(locks / "params_shard_0.bin"):
            loading = executor.submit(ndcache.load, server.url, max_workers=2)
            wait_until(lambda: len(published(cache_dir)) == 6, 30)  # the manifest, and five shards
        assert_same(loading.result(60), arrays)


@pytest.mark.parametrize("fault", ["refusals", "wrong digest", "no server"])
def test_nobody_keeps_the_turn_after_a_fault(tmp_path: Path, serve: Serve, all_turns: list[Turns], fault: str) -> None:
    arrays = simple_model(tmp_path / "model", shards=12)
    server = serve(tmp_path / "model", limit=ConnectionLimit(2) if fault == "refusals" else None)
    if fault == "refusals":
        assert_same(ndcache.load(server.url), arrays)
        return
    if fault == "wrong digest":
        flip(tmp_path / "model" / "params_shard_5.bin")
    else:
        server.status = {f"/params_shard_{index}.bin": 500 for index in range(5, 12)}
    with pytest.raises(ndcache.ChecksumError if fault == "wrong digest" else ndcache.ServerError):
        ndcache.load(server.url, retries=QUICK)


def test_a_small_shard_takes_few_system_calls(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def count(name: str) -> None:
        call = getattr(os, name)

        def counted(*args: Any, **options: Any) -> Any:
            if threading.current_thread().name.startswith("ndcache"):
                calls[name] += 1
            return call(*args, **options)

        monkeypatch.setattr(os, name, counted)

    def calls_for(shards: int) -> Counter[str]:
        simple_model(tmp_path / str(shards), shards=shards, shard_bytes=4096)
        server = serve(tmp_path / str(shards))
        calls.clear()
        ndcache.fetch(server.url, max_workers=2)
        return Counter(calls)

    for name in ("open", "lstat", "stat", "replace", "unlink", "fsync", "listdir", "mkdir"):
        count(name)
    few, many = calls_for(5), calls_for(25)
    for_one = {name: (many[name] - few[name]) / 20 for name in many if many[name] != few[name]}
    assert for_one.pop("fsync") == 2  # the file, and its directory
    assert for_one.pop("replace") == 2  # the shard, and the note about it
    assert for_one.pop("unlink") == 1  # the lock
    assert for_one.pop("open") <= 18
    assert for_one.pop("lstat") <= 22
    assert sum(for_one.values()) <= 4, for_one
