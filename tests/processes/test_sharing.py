"""Processes that load one model at once take different shards of it."""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache.store.partials.file import PartialFile

from ..helpers import models
from ..helpers.kills import CountingServer, left_behind, model_directory
from ..helpers.processes import Child, Zygote
from .children import MIB, SHARD, Serve, digest_of, load, partial_bytes, wait_until

SHARD_BYTES = MIB // 8


def load_and_count(url: str, **options: Any) -> tuple[str, ndcache.LoadStats]:
    """Load a model; return the digest of its tensors, and the load's statistics. Check the reports of progress."""
    reports: list[ndcache.ProgressReport] = []
    with ndcache.load(url, progress=reports.append, **options) as weights:
        digest, stats = digest_of(weights), weights.stats
    done = [report.progress for report in reports]
    assert done == sorted(done)
    assert done[-1] == 1.0
    return digest, stats


def fetch_and_count(url: str, **options: Any) -> tuple[str, ndcache.LoadStats]:
    """Fetch a model; return the digest of its tensors as a load finds them, and that load's statistics."""
    ndcache.fetch(url, **options)
    return load_and_count(url, offline=True, **options)


def stream_and_count(url: str, **options: Any) -> tuple[str, ndcache.LoadStats]:
    """Stream a model, and pause after each tensor."""
    loaded = {}
    for name, array in ndcache.stream(url, **options):
        loaded[name] = array
        time.sleep(0.005)
    assert list(loaded) == sorted(loaded, key=lambda name: int(name.removeprefix("layer.")))
    return digest_of(loaded), ndcache.LoadStats()


def stream_until_error(url: str, **options: Any) -> tuple[list[str], str | None]:
    """Stream a model; return the names of the tensors that came, and the shard of the error that ended it."""
    names = []
    try:
        for name, _ in ndcache.stream(url, **options):
            names.append(name)
    except ndcache.NdcacheError as error:
        return names, f"{type(error).__name__} {error.shard}"
    return names, None


def first_tensor(url: str, **options: Any) -> str:
    """Return the name of the first tensor of a stream, and end the load."""
    name, _ = next(ndcache.stream(url, **options))
    return str(name)


def load_on_full_disk(url: str, name: str, **options: Any) -> tuple[list[str], str | None]:
    """Stream a model where the disk has no room for this shard."""
    write_at = PartialFile.write_at

    def full(self: PartialFile, data: bytes | memoryview, start: int) -> None:
        if self.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_at(self, data, start)

    PartialFile.write_at = full  # type: ignore[method-assign]
    return stream_until_error(url, **options)


def load_until_interrupt(url: str, **options: Any) -> int:
    """Load until SIGINT; return how many threads are left."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        ndcache.load(url, **options)
    return threading.active_count()


def requested(server: CountingServer) -> list[int]:
    """Return the numbers of the shards that were requested, in order."""
    prefix = len("/params_shard_")
    return [int(request.path[prefix:].removesuffix(".bin")) for request in server.shard_requests()]


def hold_first(server: CountingServer, zygote: Zygote, cache_dir: Path) -> Child:
    """Start a load that has received half of the first shard, and waits for the rest."""
    server.holds[SHARD] = (SHARD_BYTES // 2,)
    holder = zygote.start(load, server.url, cache_dir=cache_dir, max_workers=1, memory_limit=1)
    wait_until(lambda: partial_bytes(model_directory(cache_dir, server.url)) == SHARD_BYTES // 2)
    return holder


# --- what the bar says


def test_what_another_process_downloads_moves_the_bar(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    models.simple_model(model, shards=1, shard_bytes=SHARD_BYTES)
    server, reports = counting(model), list[ndcache.ProgressReport]()
    holder = hold_first(server, zygote, cache_dir)
    told = f"waiting for process {holder.pid}, which downloads {SHARD[1:]}"
    with ThreadPoolExecutor(1) as executor:
        try:
            future = executor.submit(ndcache.load, server.url, progress=reports.append, progress_interval=0.05)
            wait_until(lambda: reports and (reports[-1].bytes_done, reports[-1].waiting) == (SHARD_BYTES // 2, told))
        finally:
            server.go.release()
        with future.result() as weights:
            assert weights.stats.network_bytes == 0
    holder.result()
    assert reports[-1].bytes_per_second > 0


# --- who takes which shard


@pytest.mark.parametrize("verb", [load_and_count, pytest.param(fetch_and_count, marks=pytest.mark.once)])
@pytest.mark.parametrize("md5", [True, False])
def test_row_65_no_process_waits_while_there_are_shards_that_nobody_has_begun(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path, md5: bool, verb: Callable[..., Any]
) -> None:
    """Four processes of four workers request 16 different shards before any of them is answered."""
    arrays = models.simple_model(model, shards=24, shard_bytes=SHARD_BYTES)
    models.write_model(model, [{name: array} for name, array in arrays.items()], md5=md5)
    server = counting(model)
    server.gate.clear()
    options = {"cache_dir": cache_dir, "max_workers": 4, "memory_limit": 8 * SHARD_BYTES}
    children = [zygote.start(verb, server.url, **options) for _ in range(4)]
    wait_until(lambda: len(server.shard_requests()) >= 16)
    assert sorted(requested(server)) == list(range(16))
    server.gate.set()
    loads = [child.result() for child in children]
    assert {digest for digest, _ in loads} == {digest_of(arrays)}
    assert sorted(requested(server)) == list(range(24))
    assert server.sent_bytes == 24 * SHARD_BYTES
    stats = [stats for _, stats in loads]
    assert all(one.peak_bytes_in_flight <= 8 * SHARD_BYTES for one in stats)
    if verb is load_and_count:  # each shard counts as fetched by one process, and as cached in the others
        assert sum(one.network_bytes for one in stats) == 24 * SHARD_BYTES
        assert sum(one.nbytes - one.cache_bytes for one in stats) == 24 * SHARD_BYTES
        assert sum(one.requests for one in stats) == 24 + 4
    assert left_behind(model_directory(cache_dir, server.url)) == []


def test_row_65_a_memory_limit_below_one_shard_does_not_limit_what_is_fetched_ahead(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    """One process downloads the first shard, alone in its memory. The other one fetches four others to the disk."""
    arrays = models.simple_model(model, shards=8, shard_bytes=SHARD_BYTES)
    server = counting(model)
    server.gate.clear()
    options = {"cache_dir": cache_dir, "max_workers": 4, "memory_limit": 1}
    children = [zygote.start(load_and_count, server.url, **options) for _ in range(2)]
    wait_until(lambda: len(server.shard_requests()) >= 5)
    assert sorted(requested(server)) == list(range(5))
    server.gate.set()
    for child in children:
        digest, stats = child.result()
        assert digest == digest_of(arrays)
        assert stats.peak_bytes_in_flight == SHARD_BYTES
    assert sorted(requested(server)) == list(range(8))


def test_row_65_threads_of_one_process_share_as_processes_do(model: Path, counting: Serve) -> None:
    arrays = models.simple_model(model, shards=12, shard_bytes=SHARD_BYTES)
    server = counting(model)
    server.gate.clear()
    with ndcache.Loader(max_workers=4) as loader, ThreadPoolExecutor(2) as threads:
        loads = [threads.submit(loader.load, server.url) for _ in range(2)]
        wait_until(lambda: len(server.shard_requests()) >= 8)
        assert sorted(requested(server)) == list(range(8))
        server.gate.set()
        for each in loads:
            models.assert_same(each.result(), arrays)
    assert sorted(requested(server)) == list(range(12))


def test_row_65_slow_streams_of_several_processes_stay_in_order(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    """The shards are of very different sizes."""
    arrays = {f"layer.{index}": models.random_array((MIB >> (index % 9),), seed=index) for index in range(18)}
    models.write_model(model, [{name: array} for name, array in arrays.items()])
    server = counting(model)
    options = {"cache_dir": cache_dir, "max_workers": 2, "memory_limit": 4 * MIB}
    children = [zygote.start(stream_and_count, server.url, **options) for _ in range(4)]
    assert {child.result()[0] for child in children} == {digest_of(arrays)}
    assert sorted(requested(server)) == list(range(18))


def test_row_65_ranges_of_shards_are_shared_too(model: Path, counting: Serve, zygote: Zygote, cache_dir: Path) -> None:
    shards = [
        {f"layer.{index}": models.random_array((1 << 14,), seed=index), f"rest.{index}": np.zeros(3 * MIB, np.uint8)}
        for index in range(6)
    ]
    models.write_model(model, shards)
    wanted = {f"layer.{index}": shard[f"layer.{index}"] for index, shard in enumerate(shards)}
    server = counting(model)
    server.gate.clear()
    options = {"cache_dir": cache_dir, "max_workers": 2, "names": "layer.*"}
    children = [zygote.start(load, server.url, **options) for _ in range(2)]
    wait_until(lambda: len(server.shard_requests()) >= 4)
    assert sorted(requested(server)) == list(range(4))
    server.gate.set()
    assert {child.result() for child in children} == {digest_of(wanted)}
    assert sorted(requested(server)) == list(range(6))
    assert server.sent_bytes == 6 * (1 << 16)


def test_a_shard_is_delivered_while_all_workers_fetch_others(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    models.simple_model(model, shards=4, shard_bytes=SHARD_BYTES)
    server = counting(model)
    server.stalled = {f"/params_shard_{index}.bin" for index in (1, 2, 3)}
    holder = hold_first(server, zygote, cache_dir)
    other = zygote.start(first_tensor, server.url, cache_dir=cache_dir, max_workers=2, timeout=300)
    wait_until(lambda: len(server.shard_requests()) == 3)  # both workers of the other one are busy
    server.go.release()
    assert other.result() == "layer.0"
    assert not holder.kill()


def test_a_load_that_is_alone_looks_for_no_other_work(
    model: Path, counting: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ndcache.store.directory import ModelDirectory

    monkeypatch.setattr(ModelDirectory, "try_lock", lambda *_: pytest.fail("another lock was tried"))
    arrays = models.simple_model(model, shards=12)
    models.assert_same(ndcache.load(counting(model).url), arrays)


def test_only_waiting_counts_as_waiting(model: Path, counting: Serve, zygote: Zygote, cache_dir: Path) -> None:
    models.simple_model(model, shards=3, shard_bytes=SHARD_BYTES)
    server = counting(model)
    holder = hold_first(server, zygote, cache_dir)
    other = zygote.start(load_and_count, server.url, cache_dir=cache_dir, max_workers=1, memory_limit=1)
    wait_until(lambda: len(server.shard_requests()) == 3)
    server.go.release()
    _, stats = other.result()
    holder.result()
    assert stats.seconds["lock"] <= stats.seconds["total"]
    assert stats.network_bytes == 2 * SHARD_BYTES


# --- faults


def test_row_66_a_failure_ahead_of_its_turn_is_raised_in_turn_and_not_requested_again(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    models.simple_model(model, shards=6, shard_bytes=SHARD_BYTES)
    server = counting(model)
    server.status["/params_shard_3.bin"] = 404
    holder = hold_first(server, zygote, cache_dir)
    other = zygote.start(stream_until_error, server.url, cache_dir=cache_dir, max_workers=1, memory_limit=1)
    wait_until(lambda: sorted(requested(server)) == list(range(6)))  # the other one goes on after the failure
    assert other.is_running
    server.go.release()
    assert other.result() == ([f"layer.{index}" for index in range(3)], "NotFoundError params_shard_3.bin")
    with pytest.raises(ndcache.NotFoundError, match="params_shard_3"):
        holder.result()
    assert sorted(requested(server)) == [0, 1, 2, 3, 3, 4, 5]  # each process asked once for what is missing


def test_row_66_after_a_failure_that_may_pass_the_shard_is_tried_again_in_its_turn(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    arrays = models.simple_model(model, shards=4, shard_bytes=SHARD_BYTES)
    server = counting(model)
    server.status["/params_shard_1.bin"] = 500
    holder = hold_first(server, zygote, cache_dir)
    options = {"cache_dir": cache_dir, "max_workers": 1, "memory_limit": 1, "retries": 0}
    other = zygote.start(load, server.url, **options)
    wait_until(lambda: sorted(requested(server)) == list(range(4)))
    del server.status["/params_shard_1.bin"]
    server.go.release()
    assert other.result() == holder.result() == digest_of(arrays)
    assert sorted(requested(server)) == [0, 1, 1, 2, 3]


def test_row_66_a_full_disk_is_reported_for_the_shard_in_its_turn(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    arrays = models.simple_model(model, shards=4, shard_bytes=SHARD_BYTES)
    server = counting(model)
    holder = hold_first(server, zygote, cache_dir)
    options = {"cache_dir": cache_dir, "max_workers": 1, "memory_limit": 1}
    other = zygote.start(load_on_full_disk, server.url, "params_shard_1.bin", **options)
    wait_until(lambda: len(server.shard_requests()) == 2)
    assert not holder.kill()
    assert other.result() == (["layer.0"], "DiskFullError params_shard_1.bin")
    assert requested(server) == [0, 1, 0, 1]  # nothing else is fetched ahead to a full disk
    assert load(server.url, cache_dir=cache_dir) == digest_of(arrays)


def test_row_66_the_shards_of_a_killed_process_are_taken_by_another(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    arrays = models.simple_model(model, shards=6, shard_bytes=SHARD_BYTES)
    server = counting(model)
    holder = hold_first(server, zygote, cache_dir)
    other = zygote.start(load, server.url, cache_dir=cache_dir, max_workers=2)
    wait_until(lambda: sorted(requested(server)) == list(range(6)))
    assert not holder.kill()
    assert other.result() == digest_of(arrays)
    assert sorted(requested(server)) == [0, *range(6)]
    assert server.shard_requests()[-1].headers["range"] == f"bytes={SHARD_BYTES // 2}-{SHARD_BYTES - 1}"
    assert left_behind(model_directory(cache_dir, server.url)) == []


def test_row_36_ctrl_c_ends_what_is_fetched_ahead(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    arrays = models.simple_model(model, shards=4, shard_bytes=SHARD_BYTES)
    server = counting(model)
    holder = hold_first(server, zygote, cache_dir)
    server.stalled = {f"/params_shard_{index}.bin" for index in (1, 2, 3)}
    other = zygote.start(load_until_interrupt, server.url, cache_dir=cache_dir, max_workers=2, memory_limit=1)
    wait_until(lambda: len(server.shard_requests()) == 3)
    other.signal(signal.SIGINT)
    assert other.result() == 1
    server.stalled.clear()
    server.go.release()
    assert holder.result() == digest_of(arrays)


# --- time


@pytest.mark.once
def test_four_processes_load_a_model_in_a_third_of_the_time_of_one(
    model: Path, counting: Serve, zygote: Zygote, tmp_path: Path
) -> None:
    """Each shard takes two seconds: 8 workers need 16 of them, and 32 workers need 4."""
    arrays = models.simple_model(model, shards=64, shard_bytes=SHARD_BYTES)
    server = counting(model, rate=SHARD_BYTES // 2)

    def seconds(processes: int, cache_dir: Path) -> float:
        server.gated_manifest = True
        server.gate.clear()
        before = len(server.requests)
        children = [zygote.start(load, server.url, cache_dir=cache_dir) for _ in range(processes)]
        wait_until(lambda: len(server.requests) == before + processes)
        start = time.monotonic()
        server.gate.set()
        assert {child.result() for child in children} == {digest_of(arrays)}
        return time.monotonic() - start

    alone = seconds(1, tmp_path / "alone")
    ratios = []
    for attempt in range(3):  # the machine may be busy
        sent, asked = server.sent_bytes, len(server.shard_requests())
        ratios.append(seconds(4, tmp_path / f"shared{attempt}") / alone)
        assert server.sent_bytes - sent <= 1.05 * 64 * SHARD_BYTES
        assert len(server.shard_requests()) - asked == 64
        if ratios[-1] <= 0.3:
            return
    pytest.fail(f"four processes took {ratios} times as long as one")
