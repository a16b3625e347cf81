"""Processes that fetch one model at once: with locks, without them, with a holder that is killed or stopped."""

from __future__ import annotations

import errno
import functools
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ndcache
import ndcache.store.lock

from ..helpers import kills, models
from ..helpers.kills import CountingServer, check_published, left_behind, model_directory
from ..helpers.processes import Child, Zygote
from .children import (
    MIB,
    SHARD,
    Serve,
    assert_fetched,
    digest_of,
    hold_at_half,
    load,
    partial_bytes,
    ranges,
    wait_until,
)

#: Patience that does not end while a test runs.
ENDLESS = 1e9


def load_without_locks(url: str, how: str, **options: Any) -> str:
    """Load where `fcntl.flock` does nothing, or raises an error of this name."""
    import fcntl

    def flock(handle: Any, operation: int) -> None:
        if how != "nothing":
            raise OSError(getattr(errno, how.split()[0]), "no locks here")

    fcntl.flock = flock
    warnings.simplefilter("error" if "strict" in how else "ignore")
    return load(url, **options)


def fetch_with_patience(
    url: str, patience: float, waiting: Path, told_time: Path | None = None, **options: Any
) -> None:
    """Fetch with so much patience.

    Parameters
    ----------
    url : str
    patience : float
        Seconds without progress after which the holder of a lock counts as dead.
    waiting : pathlib.Path
        A file to make as soon as another process is seen to hold the lock.
    told_time : pathlib.Path, optional
        A file with the current time, in place of the system's clock.
    **options
        For `ndcache.fetch`.
    """
    locks = ndcache.store.lock
    locks._PATIENCE = (patience, patience)
    locks._LONGEST_PAUSE = 0.05
    really_try = locks._try

    def noted(lock: Any, **options: Any) -> ndcache.store.lock._Result:
        result = really_try(lock, **options)
        if result is locks._Result.BUSY:
            waiting.touch()
        return result

    def monotonic() -> float:
        assert told_time is not None
        with open(told_time.with_suffix(".looks"), "ab") as file:
            file.write(b".")
        return float(told_time.read_text())

    locks._try = noted
    if told_time is not None:
        locks.time = SimpleNamespace(monotonic=monotonic)  # type: ignore[assignment, attr-defined]
    ndcache.fetch(url, **options)


def fetch_and_fork(url: str, forked: Path, **options: Any) -> None:
    """Fetch; on SIGUSR1, fork a process that only keeps the lock, and write its ID to the file `forked`."""
    import fcntl

    really_lock = fcntl.flock

    def flock(handle: Any, operation: int) -> None:
        really_lock(handle, operation)
        # A fork would inherit the lock like this, but filelock takes precautions.
        os.dup(handle)

    def fork(*_: object) -> None:
        if os.fork() == 0:
            forked.with_suffix(".new").write_text(str(os.getpid()))
            forked.with_suffix(".new").rename(forked)
            time.sleep(600)
            os._exit(0)

    fcntl.flock = flock
    signal.signal(signal.SIGUSR1, fork)
    ndcache.fetch(url, **options)


# --- all at once


def load_at_once(
    processes: int, server: CountingServer, zygote: Zygote, function: Callable[..., str], *args: Any, cache_dir: Path
) -> set[str]:
    """Load in so many processes, which go on when all have asked for the manifest; return the digests."""
    server.gated_manifest = True
    server.gate.clear()
    children = [zygote.start(function, server.url, *args, cache_dir=cache_dir) for _ in range(processes)]
    wait_until(lambda: len(server.requests) == processes)
    server.gate.set()
    return {child.result() for child in children}


def test_row_26_32_processes_download_a_model_once(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    arrays = models.simple_model(model, shards=8, shard_bytes=MIB)
    server = counting(model, rate=8 * MIB)
    assert load_at_once(32, server, zygote, load, cache_dir=cache_dir) == {digest_of(arrays)}
    assert server.sent_bytes <= 1.05 * 8 * MIB
    assert left_behind(model_directory(cache_dir, server.url)) == []


@pytest.mark.parametrize("how", ["nothing", pytest.param("ENOSYS", marks=pytest.mark.once), "ENOSYS strict", "ENOTSUP"])
def test_row_27_where_locks_do_not_work_the_result_is_the_same(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path, how: str
) -> None:
    arrays = models.simple_model(model, shards=4, shard_bytes=MIB // 2)
    server = counting(model, rate=8 * MIB)
    assert load_at_once(6, server, zygote, load_without_locks, how, cache_dir=cache_dir) == {digest_of(arrays)}
    directory = model_directory(cache_dir, server.url)
    assert kills.digests(directory) == kills.digests(model)
    assert left_behind(directory) == []


# --- the holder of a lock


def start_waiter(
    server: CountingServer, zygote: Zygote, cache_dir: Path, patience: float, told_time: Path | None = None
) -> Child:
    """Start a fetch that waits for a lock which another process holds."""
    waiting = cache_dir.parent / "waiting"
    waiter = zygote.start(fetch_with_patience, server.url, patience, waiting, told_time=told_time, cache_dir=cache_dir)
    wait_until(waiting.exists)
    return waiter


def test_row_28_when_the_holder_of_a_lock_is_killed_the_waiter_takes_over(
    one_shard: CountingServer, zygote: Zygote, cache_dir: Path
) -> None:
    holder, directory = hold_at_half(one_shard, zygote, cache_dir, MIB)
    waiter = start_waiter(one_shard, zygote, cache_dir, ENDLESS)
    assert not holder.kill()
    waiter.result()
    assert ranges(one_shard) == [None, f"bytes={MIB // 2}-{MIB - 1}"]
    assert_fetched(directory, one_shard)


def test_row_28_when_the_holder_of_a_lock_is_stopped_the_waiter_goes_on_and_the_holder_later(
    one_shard: CountingServer, zygote: Zygote, cache_dir: Path
) -> None:
    holder, directory = hold_at_half(one_shard, zygote, cache_dir, MIB)
    holder.signal(signal.SIGSTOP)
    start_waiter(one_shard, zygote, cache_dir, 0.5).result()
    assert holder.is_running
    assert check_published(directory, kills.digests(one_shard.directory)) == 2
    one_shard.go.release()
    holder.signal(signal.SIGCONT)
    holder.result()
    assert_fetched(directory, one_shard)


def test_row_28_when_a_fork_of_a_dead_holder_keeps_the_lock_the_waiter_goes_on(
    one_shard: CountingServer, zygote: Zygote, cache_dir: Path, tmp_path: Path
) -> None:
    forked = tmp_path / "forked"
    holder, directory = hold_at_half(one_shard, zygote, cache_dir, MIB, fetch_and_fork, forked)
    holder.signal(signal.SIGUSR1)
    wait_until(forked.exists)
    try:
        assert not holder.kill()
        waiter = start_waiter(one_shard, zygote, cache_dir, 0.5)  # it waits, so the lock is held
        waiter.result()
    finally:
        os.kill(int(forked.read_text()), signal.SIGKILL)
    assert_fetched(directory, one_shard)


def has_written(directory: Path, nbytes: int) -> bool:
    return partial_bytes(directory) == nbytes


def has_bytes(path: Path, nbytes: int) -> bool:
    return path.stat().st_size >= nbytes


def test_row_28_a_waiter_that_sees_progress_waits_as_long_as_it_takes(
    one_shard: CountingServer, zygote: Zygote, cache_dir: Path, tmp_path: Path
) -> None:
    """The test sets the clock: 20 seconds from one step to the next, with a patience of 30."""
    steps = tuple(MIB * eighths // 8 for eighths in range(2, 8))
    clock, looks = tmp_path / "time", tmp_path / "time.looks"
    clock.write_text("0")
    one_shard.holds[SHARD] = steps
    holder = zygote.start(kills.fetch, one_shard.url, cache_dir=cache_dir)
    directory = model_directory(cache_dir, one_shard.url)
    wait_until(lambda: partial_bytes(directory) == steps[0])
    waiter = start_waiter(one_shard, zygote, cache_dir, 30.0, clock)
    for seconds, step in enumerate(steps[1:], 1):
        one_shard.go.release()
        wait_until(functools.partial(has_written, directory, step))
        # The second look at the clock from now on comes after a look at the partial file as it is now.
        enough = looks.stat().st_size + 2
        wait_until(functools.partial(has_bytes, looks, enough))
        clock.with_suffix(".new").write_text(str(20.0 * seconds))
        clock.with_suffix(".new").replace(clock)
    assert waiter.is_running
    one_shard.go.release()
    holder.result()
    waiter.result()
    assert ranges(one_shard) == [None]
    assert_fetched(directory, one_shard)
