"""Forks and threads that load with one loader."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

import ndcache

from ..helpers import models
from ..helpers.kills import left_behind, model_directory
from ..helpers.processes import Zygote, fork
from ..helpers.servers import Request
from .children import MIB, SHARD, Serve, digest_of, load_with, partial_bytes, wait_until


def peers(some: list[Request]) -> set[str]:
    """Return the client's ports."""
    return {request.headers["x-test-peer"] for request in some}


def in_fork(function: Callable[..., Any], *args: Any, meanwhile: Callable[[], Any] = lambda: None) -> Any:
    """Call a function in a fork of this process, and return its result."""
    pid, results = fork(function, args, {})
    try:
        meanwhile()
        if not results.poll(30):
            os.kill(pid, signal.SIGKILL)
            raise TimeoutError("the fork hangs")
        result, error = results.recv()
    finally:
        os.waitpid(pid, 0)
        results.close()
    if error is not None:
        raise error
    return result


def load_around_a_fork(url: str, cache_dir: Path, *, with_session: bool) -> list[str]:
    """Load from the server before a fork, in it and after it, with one loader and one connection."""
    session = requests.Session() if with_session else None
    with ndcache.Loader(session=session, cache_dir=cache_dir, max_workers=1) as loader:

        def load_cold() -> str:
            loader.delete(url)
            return load_with(loader, url)

        loaded = [load_cold(), in_fork(load_cold), load_cold()]
    if session is not None:
        session.close()
    return loaded


def load_in_forks_of_a_load(busy_url: str, urls: list[str], cache_dir: Path, forked: Path) -> list[str]:
    """Fork processes that load from other URLs and from the same one, while a thread waits for a body.

    Make the file `forked` when the body may go on.
    """
    with ndcache.Loader(cache_dir=cache_dir) as loader, ThreadPoolExecutor(1) as pool:
        busy = pool.submit(load_with, loader, busy_url)
        wait_until(lambda: partial_bytes(model_directory(cache_dir, busy_url)))
        loaded = [in_fork(load_with, loader, url) for url in urls]
        loaded.append(in_fork(load_with, loader, busy_url, meanwhile=forked.touch))
        return [busy.result(60), *loaded]


def fork_at_any_moment(busy_url: str, url: str, cache_dir: Path, times: int) -> list[str]:
    """Fork processes that load, while a thread loads again and again."""
    done = threading.Event()
    with ndcache.Loader(cache_dir=cache_dir) as loader, ThreadPoolExecutor(1) as pool:

        def keep_busy() -> None:
            while not done.is_set():
                loader.delete(busy_url)
                load_with(loader, busy_url)

        busy = pool.submit(keep_busy)
        try:
            return [in_fork(load_with, loader, url) for _ in range(times)]
        finally:
            done.set()
            busy.result(60)


@pytest.mark.parametrize("with_session", [False, True], ids=["own session", "the caller's session"])
def test_row_37_a_fork_shares_no_connection(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path, with_session: bool
) -> None:
    arrays = models.simple_model(model)
    server = counting(model)
    loading = zygote.start(load_around_a_fork, server.url, cache_dir, with_session=with_session)
    assert loading.result() == [digest_of(arrays)] * 3
    assert len(server.requests) == 15  # the manifest and four shards, three times
    before, in_child, after = (server.requests[index : index + 5] for index in (0, 5, 10))
    assert peers(before) == peers(after)  # the child left the parent's connection alone
    assert not peers(before) & peers(in_child)


def test_row_37_a_fork_in_the_middle_of_a_load_can_load(
    tmp_path: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    held = models.simple_model(tmp_path / "held", shards=2, shard_bytes=MIB)
    other = models.simple_model(tmp_path / "other", shards=3)
    server, second = counting(tmp_path / "held"), counting(tmp_path / "other")
    server.holds[SHARD] = (MIB // 2,)
    forked = tmp_path / "forked"
    loading = zygote.start(load_in_forks_of_a_load, server.url, [second.url] * 2, cache_dir, forked)
    wait_until(lambda: forked.exists() or not loading.is_running)
    server.go.release()
    assert loading.result() == [digest_of(held), *[digest_of(other)] * 2, digest_of(held)]
    assert left_behind(model_directory(cache_dir, server.url)) == []


def test_row_37_a_fork_at_any_moment_of_a_load_can_load(
    tmp_path: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    models.simple_model(tmp_path / "busy", shards=6, shard_bytes=1 << 14)
    arrays = models.simple_model(tmp_path / "other", shards=2)
    busy, server = counting(tmp_path / "busy"), counting(tmp_path / "other")
    loading = zygote.start(fork_at_any_moment, busy.url, server.url, cache_dir, 20)
    assert loading.result() == [digest_of(arrays)] * 20


def test_row_37_threads_share_one_download(model: Path, counting: Serve, cache_dir: Path) -> None:
    arrays = models.simple_model(model, shards=6, shard_bytes=MIB // 2)
    server = counting(model, rate=8 * MIB)
    barrier = threading.Barrier(8)

    def load_together() -> str:
        barrier.wait(60)
        return load_with(loader, server.url)

    with ndcache.Loader() as loader, ThreadPoolExecutor(8) as pool:
        loading = [pool.submit(load_together) for _ in range(8)]
        assert {future.result(60) for future in loading} == {digest_of(arrays)}
    assert server.sent_bytes <= 1.05 * 3 * MIB
    assert left_behind(model_directory(cache_dir, server.url)) == []


def test_row_37_threads_load_models_with_one_loader(tmp_path: Path, counting: Serve) -> None:
    contents = []
    for index in range(4):
        shards = [{f"t{n}": models.random_array((1 << 16,), seed=10 * index + n)} for n in range(4)]
        models.write_model(tmp_path / str(index), shards)
        contents.append({name: array for shard in shards for name, array in shard.items()})
    servers = [counting(tmp_path / str(index)) for index in range(4)]
    with ndcache.Loader(max_workers=3) as loader, ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda server: load_with(loader, server.url), servers * 2))
    assert loaded == [digest_of(arrays) for arrays in contents] * 2
