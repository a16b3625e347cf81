"""The coordinator, with real caches and a real server, on an engine in this process."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

import ndcache
from ndcache.cluster import members
from ndcache.cluster.coordinator import fetch_to_nodes

from ..helpers.companions import mlc_model
from ..helpers.engines import LocalEngine
from ..helpers.loads import assert_same, partial_files
from ..helpers.models import random_array, simple_model, write_model
from ..helpers.servers import FileServer

Serve = Callable[..., FileServer]
KIB = 1 << 10

NO_RETRY: dict[str, Any] = {"retries": 0}


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_LOOK_SECONDS", 0.0)


def engine_of(tmp_path: Path, *workers: str) -> LocalEngine:
    """Return an engine whose workers have a cache each, named after their first letter."""
    return LocalEngine({worker: tmp_path / f"home-{worker[0]}" for worker in workers})


def requested(server: FileServer) -> Counter[str]:
    return Counter(request.path for request in server.requests)


def bodies(server: FileServer) -> Counter[str]:
    return Counter({path: count for path, count in requested(server).items() if path.endswith(".bin")})


def keep_times(path: Path, change: Callable[[Path], Any]) -> None:
    """Change a file, and give it its old times, as a failing disk does."""
    status = path.stat()
    change(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_each_shard_leaves_the_origin_once(tmp_path: Path, serve: Serve) -> None:
    arrays = simple_model(tmp_path / "model", shards=7)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b", "c")
    directories = fetch_to_nodes(engine, server.url, {})
    assert set(directories) == {"a", "b", "c"}
    assert set(requested(server).values()) == {1}
    assert len(server.requests) == 8
    assert engine.left == 0
    for worker, directory in directories.items():
        assert directory.is_relative_to(tmp_path / f"home-{worker}")
        with ndcache.load(directory) as weights:
            assert_same(weights, arrays)
        with ndcache.load(server.url, cache_dir=tmp_path / f"home-{worker}", offline=True) as weights:
            assert_same(weights, arrays)
            assert weights.stats.integrity == {"md5": 7}
        report = ndcache.verify(server.url, cache_dir=tmp_path / f"home-{worker}")
        assert report.ok
        assert report.checked == dict.fromkeys(report.checked, "md5")
    assert len(server.requests) == 8
    for worker in directories:
        ndcache.load(server.url, cache_dir=tmp_path / f"home-{worker}")
    assert set(bodies(server).values()) == {1}
    assert [request.headers.get("if-none-match") is None for request in server.requests[8:]] == [False] * 3


def test_workers_of_one_cache_are_one_node(tmp_path: Path, serve: Serve) -> None:
    simple_model(tmp_path / "model")
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a1", "a2", "b1", "a3")
    directories = fetch_to_nodes(engine, server.url, {})
    assert len(directories) == 2
    assert engine.counts["write"] + engine.counts["obtain"] > 0
    assert engine.counts["survey"] == 2
    assert set(requested(server).values()) == {1}


def test_without_a_digest_sha256_is_passed_on(tmp_path: Path, serve: Serve) -> None:
    write_model(tmp_path / "model", [{"x": random_array((999,), seed=1)}, {"y": random_array((5,))}], md5=False)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")
    fetch_to_nodes(engine, server.url, {})
    for home in engine.homes.values():
        report = ndcache.verify(server.url, cache_dir=home)
        assert set(report.checked.values()) == {"sha256"}
    assert set(requested(server).values()) == {1}


def test_digests_of_what_an_ordinary_fetch_left_are_computed_first(tmp_path: Path, serve: Serve) -> None:
    write_model(tmp_path / "model", [{"x": random_array((999,), seed=1)}], md5=False)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")
    ndcache.fetch(server.url, cache_dir=engine.homes["a"])
    fetch_to_nodes(engine, server.url, {})
    assert bodies(server) == {"/params_shard_0.bin": 1}
    assert set(ndcache.verify(server.url, cache_dir=engine.homes["b"]).checked.values()) == {"sha256"}


def test_a_large_shard_travels_in_pieces(tmp_path: Path, serve: Serve) -> None:
    arrays = simple_model(tmp_path / "model", shards=3, shard_bytes=64 * KIB)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b", "c")
    largest = 0

    def note(worker: str, name: str, args: tuple[Any, ...]) -> None:
        nonlocal largest
        if name == "write":
            largest = max(largest, args[3].nbytes)

    engine.before.append(note)
    fetch_to_nodes(engine, server.url, {"memory_limit": 4 * 10 * KIB})
    assert largest == 10 * KIB
    assert engine.counts["write"] == 3 * 2 * 7
    for home in engine.homes.values():
        assert_same(ndcache.load(server.url, cache_dir=home, offline=True), arrays)
        assert partial_files(home) == []


def test_small_shards_travel_together(tmp_path: Path, serve: Serve) -> None:
    simple_model(tmp_path / "model", shards=50, shard_bytes=64)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")
    fetch_to_nodes(engine, server.url, {"max_workers": 1})
    assert engine.counts["write"] < 25
    assert set(bodies(server).values()) == {1}


def test_names_and_empty_shards(tmp_path: Path, serve: Serve) -> None:
    shards = [{"a": random_array((4,))}, {"b": random_array((0,))}, {"c": random_array((4,))}]
    write_model(tmp_path / "model", shards)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "x", "y")
    fetch_to_nodes(engine, server.url, {}, names=["a", "b"])
    assert sorted(bodies(server)) == ["/params_shard_0.bin", "/params_shard_1.bin"]
    for home in engine.homes.values():
        loaded = ndcache.load(server.url, names=["a", "b"], cache_dir=home, offline=True)
        assert {name: np.asarray(array).size for name, array in loaded.items()} == {"a": 4, "b": 0}
    with pytest.raises(KeyError):
        fetch_to_nodes(engine, server.url, {}, names="nothing")
    assert engine.left == 0


def test_progress_counts_shards_that_are_everywhere(tmp_path: Path, serve: Serve) -> None:
    simple_model(tmp_path / "model", shards=3)
    reports: list[ndcache.ProgressReport] = []
    server = serve(tmp_path / "model")
    fetch_to_nodes(engine_of(tmp_path, "a", "b"), server.url, {}, progress=reports.append)
    assert [report.shards_done for report in reports] == [0, 0, 1, 2, 3]
    assert reports[-1].progress == 1.0


# --- companion files ----------------------------------------------------------------------------------

COMPANIONS = ["mlc-chat-config.json", "tokenizer.json", "tokenizer_config.json"]


def same_files(model: Path, directory: Path) -> set[str]:
    files = {path.name for path in model.iterdir() if (directory / path.name).is_file()}
    return {name for name in files if (directory / name).read_bytes() == (model / name).read_bytes()}


def test_companion_files_leave_the_origin_once(tmp_path: Path, serve: Serve) -> None:
    mlc_model(tmp_path / "model")
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b", "c")
    directories = fetch_to_nodes(engine, server.url, {})
    assert set(requested(server).values()) == {1}
    assert (engine.counts["fetch_files"], engine.counts["keep_files"]) == (1, 2)
    for directory in directories.values():
        assert same_files(tmp_path / "model", directory) == {path.name for path in (tmp_path / "model").iterdir()}
    for home in engine.homes.values():
        assert ndcache.verify(server.url, cache_dir=home).files == tuple(COMPANIONS)
    before, ran = len(server.requests), engine.counts["keep_files"]
    for home in engine.homes.values():
        ndcache.fetch(server.url, cache_dir=home, offline=True)
    fetch_to_nodes(engine, server.url, {})
    assert (len(server.requests), engine.counts["keep_files"]) == (before + 1, ran), "the manifest alone"
    (directories["b"] / "tokenizer.json").write_text("edited")
    fetch_to_nodes(engine, server.url, {})
    assert "tokenizer.json" in same_files(tmp_path / "model", directories["b"])
    assert engine.left == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"files": False}, []),
        ({"exclude": "tokenizer*"}, COMPANIONS[:1]),
        ({"include": ["a.md"]}, [*COMPANIONS, "a.md"]),
    ],
    ids=str,
)
def test_companion_files_that_are_wanted(
    tmp_path: Path, serve: Serve, files: dict[str, Any], expected: list[str]
) -> None:
    mlc_model(tmp_path / "model")
    (tmp_path / "model" / "a.md").write_text("more")
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")
    for directory in fetch_to_nodes(engine, server.url, {}, files=files).values():
        names = same_files(tmp_path / "model", directory)
        assert {name for name in names if name != "tensor-cache.json" and not name.endswith(".bin")} == set(expected)


@pytest.mark.once
@pytest.mark.parametrize("memory_limit", [512 << 20, 1000], ids=["sent", "each for itself"])
def test_row_73_wrong_bytes_of_companion_files_are_refused(tmp_path: Path, serve: Serve, memory_limit: int) -> None:
    mlc_model(tmp_path / "model")
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")

    def damage(worker: str, name: str, result: Any) -> Any:
        if name == "read_files":
            file = result.files["tokenizer.json"]
            return dataclasses.replace(
                result, files={**result.files, "tokenizer.json": dataclasses.replace(file, data=file.data[::-1])}
            )
        return result

    engine.change = damage
    directories = fetch_to_nodes(engine, server.url, {"memory_limit": memory_limit})
    for directory in directories.values():
        assert set(COMPANIONS) <= same_files(tmp_path / "model", directory)
    assert requested(server)["/tokenizer.json"] == 2, "the other node asks the origin itself"


def test_row_92_a_companion_file_that_fails_is_the_error_when_the_shards_are_there(
    tmp_path: Path, serve: Serve
) -> None:
    arrays = mlc_model(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")
    with pytest.raises(ndcache.NotFoundError, match=r"tokenizer\.json") as caught:
        fetch_to_nodes(engine, server.url, NO_RETRY)
    assert caught.value.node in ("a", "b")
    for home in engine.homes.values():
        assert_same(ndcache.load(server.url, cache_dir=home, offline=True), arrays)
    fetch_to_nodes(engine, server.url, {}, files={"exclude": "tokenizer.json"})


@pytest.mark.parametrize("name", ["fetch_files", "read_files", "keep_files"])
def test_row_74_a_worker_that_is_lost_with_companion_files(tmp_path: Path, serve: Serve, name: str) -> None:
    mlc_model(tmp_path / "model")
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b", "c")
    killed = kill_at(engine, name, 1)
    directories = fetch_to_nodes(engine, server.url, {})
    assert len(killed) == 1
    assert set(directories) == {"a", "b", "c"} - set(killed)
    for directory in directories.values():
        assert set(COMPANIONS) <= same_files(tmp_path / "model", directory)
    assert engine.left == 0


# --- wrong bytes --------------------------------------------------------------------------------------


def test_row_73_wrong_bytes_of_a_damaged_cache_are_refused(tmp_path: Path, serve: Serve) -> None:
    arrays = simple_model(tmp_path / "model", shards=3)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b", "c")
    directory = ndcache.fetch(server.url, cache_dir=engine.homes["a"])
    keep_times(directory / "params_shard_1.bin", flip)
    fetch_to_nodes(engine, server.url, {})
    for home in engine.homes.values():
        assert_same(ndcache.load(server.url, cache_dir=home, offline=True, verify="always"), arrays)
    assert bodies(server) == {"/params_shard_0.bin": 1, "/params_shard_1.bin": 2, "/params_shard_2.bin": 1}
    assert len(list(engine.homes["a"].rglob("aside/*"))) == 1


def test_row_73_a_refusal_does_not_count_against_the_file_that_replaced_the_bad_one(
    tmp_path: Path, serve: Serve
) -> None:
    """Two nodes are sent the bad file, and the second refuses it when the first refusal has had its effect."""
    arrays = simple_model(tmp_path / "model", shards=1)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b", "c")
    directory = ndcache.fetch(server.url, cache_dir=engine.homes["a"])
    keep_times(directory / "params_shard_0.bin", flip)
    engine.is_last = lambda worker, name, others: worker == "c" and name == "write" and others > 0
    fetch_to_nodes(engine, server.url, {})
    assert bodies(server) == {"/params_shard_0.bin": 2}
    assert engine.counts["survey"] == 3 + 1  # the bad file is looked at again only once
    for home in engine.homes.values():
        assert_same(ndcache.load(server.url, cache_dir=home, offline=True, verify="always"), arrays)


@pytest.mark.parametrize("memory_limit", [1 << 20, 4 * 10 * KIB], ids=["whole", "in pieces"])
@pytest.mark.parametrize("md5", [True, False], ids=["md5", "no digest"])
def test_row_73_bytes_that_change_on_the_way_come_from_the_origin(
    tmp_path: Path, serve: Serve, memory_limit: int, md5: bool
) -> None:
    arrays = {"x": random_array((8 * KIB,))}
    write_model(tmp_path / "model", [arrays], md5=md5)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")

    def damage(worker: str, name: str, result: Any) -> Any:
        if name == "read":
            result[-1] ^= 1
        return result

    engine.change = damage
    fetch_to_nodes(engine, server.url, {"memory_limit": memory_limit})
    assert bodies(server) == {"/params_shard_0.bin": 2}
    for home in engine.homes.values():
        assert_same(ndcache.load(server.url, cache_dir=home, offline=True, verify="always"), arrays)
        assert partial_files(home) == []


def test_row_73_the_error_names_shard_and_node_if_the_origin_sends_other_bytes_to_each(
    tmp_path: Path, serve: Serve
) -> None:
    write_model(tmp_path / "model", [{"x": random_array((8,))}], md5=False)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")

    def damage(worker: str, name: str, result: Any) -> Any:
        if name == "read":
            flip(tmp_path / "model" / "params_shard_0.bin")  # what the server sends from now on
            result[-1] ^= 1
        return result

    engine.change = damage
    with pytest.raises(ndcache.ChecksumError, match=r"params_shard_0\.bin, on [ab]") as caught:
        fetch_to_nodes(engine, server.url, {})
    assert caught.value.shard == "params_shard_0.bin"
    assert caught.value.node in ("a", "b")
    assert engine.left == 0


def test_row_73_wrong_bytes_of_the_manifest_are_refused(tmp_path: Path, serve: Serve) -> None:
    arrays = simple_model(tmp_path / "model")
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b", "c")

    def damage(worker: str, name: str, result: Any) -> Any:
        return dataclasses.replace(result, data=result.data + b" ") if name == "cached_manifest" else result

    engine.change = damage
    fetch_to_nodes(engine, server.url, {})
    assert requested(server)["/tensor-cache.json"] == 1
    for home in engine.homes.values():
        assert_same(ndcache.load(server.url, cache_dir=home, offline=True), arrays)


def test_without_digests_if_none_are_wanted(tmp_path: Path, serve: Serve) -> None:
    arrays = simple_model(tmp_path / "model")
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")
    fetch_to_nodes(engine, server.url, {"verify": "never"})
    assert set(requested(server).values()) == {1}
    for home in engine.homes.values():
        assert_same(ndcache.load(server.url, cache_dir=home, offline=True, verify="always"), arrays)


# --- workers that come and go -------------------------------------------------------------------------


def kill_at(engine: LocalEngine, name: str, at: int) -> list[str]:
    """Kill the worker that runs the `at`-th task of this name; return a list with its name, once that has happened."""
    seen: list[str] = []
    killed: list[str] = []

    def hook(worker: str, function: str, args: tuple[Any, ...]) -> None:
        if function == name:
            seen.append(worker)
            if len(seen) == at:
                killed.append(worker)
                engine.kill(worker)

    engine.before.append(hook)
    return killed


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "at"),
    [
        *(("open_manifest", 1), ("cached_manifest", 1)),
        *((name, at) for name in ("identify", "survey", "obtain", "begin", "read", "write", "finish") for at in (1, 2)),
    ],
)
def test_row_74_a_lost_worker_costs_only_its_share(tmp_path: Path, serve: Serve, name: str, at: int) -> None:
    arrays = simple_model(tmp_path / "model", shards=6, shard_bytes=16 * KIB)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b", "c")
    killed = kill_at(engine, name, at)
    options = {"max_workers": 1, "memory_limit": 4 * 10 * KIB}
    directories = fetch_to_nodes(engine, server.url, options)
    assert len(killed) == 1
    assert set(directories) == {"a", "b", "c"} - set(killed)
    assert sum(bodies(server).values()) <= 6 + 2
    for worker in directories:
        assert_same(ndcache.load(server.url, cache_dir=engine.homes[worker], offline=True), arrays)
    assert engine.left == 0
    for worker in killed:
        engine.start(f"{worker}2", engine.homes[worker])
    before = sum(bodies(server).values())
    assert len(fetch_to_nodes(engine, server.url, options)) == 3
    assert sum(bodies(server).values()) == before
    for home in engine.homes.values():
        assert_same(ndcache.load(server.url, cache_dir=home, offline=True), arrays)


@pytest.mark.once
@pytest.mark.parametrize("name", ["survey", "obtain", "read", "write", "begin", "finish"])
def test_row_74_another_worker_of_the_node_takes_over(tmp_path: Path, serve: Serve, name: str) -> None:
    arrays = simple_model(tmp_path / "model", shards=6, shard_bytes=16 * KIB)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a1", "b1", "a2", "b2")
    killed = kill_at(engine, name, 2)
    directories = fetch_to_nodes(engine, server.url, {"max_workers": 1, "memory_limit": 4 * 10 * KIB})
    assert len(killed) == 1
    assert killed[0] not in directories
    assert {worker[0] for worker in directories} == {"a", "b"}
    for home in set(engine.homes.values()):
        assert_same(ndcache.load(server.url, cache_dir=home, offline=True), arrays)
    assert engine.left == 0


@pytest.mark.parametrize("name", ["identify", "survey", "obtain", "write", "finish"])
def test_row_75_a_late_worker_catches_up(tmp_path: Path, serve: Serve, name: str) -> None:
    arrays = simple_model(tmp_path / "model", shards=6)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")

    def hook(worker: str, function: str, args: tuple[Any, ...]) -> None:
        if function == name:
            engine.start("c", tmp_path / "home-c")

    engine.before.append(hook)
    assert set(fetch_to_nodes(engine, server.url, {})) == {"a", "b", "c"}
    assert set(requested(server).values()) == {1}
    assert_same(ndcache.load(server.url, cache_dir=tmp_path / "home-c", offline=True), arrays)


def test_row_74_a_half_received_file_continues_on_another_worker_of_the_node(tmp_path: Path, serve: Serve) -> None:
    arrays = simple_model(tmp_path / "model", shards=1, shard_bytes=100 * KIB)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a1", "b1", "b2", "a2")
    killed = kill_at(engine, "write", 7)
    starts: list[int] = []

    def note(worker: str, name: str, args: tuple[Any, ...]) -> None:
        if name == "write" and worker in engine.workers():
            starts.append(args[1][0].start)

    engine.before.append(note)
    fetch_to_nodes(engine, server.url, {"memory_limit": 4 * 10 * KIB})
    assert len(killed) == 1
    assert starts == [10 * KIB * piece for piece in range(10)]
    for home in set(engine.homes.values()):
        assert_same(ndcache.load(server.url, cache_dir=home, offline=True, verify="always"), arrays)
        assert partial_files(home) == []


def test_row_74_no_worker_at_all(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_PATIENCE_SECONDS", 0.0)
    simple_model(tmp_path / "model")
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a")
    engine.kill("a")
    with pytest.raises(ndcache.NdcacheError, match="no worker"):
        fetch_to_nodes(engine, server.url, {})


# --- the origin fails ---------------------------------------------------------------------------------


def test_row_76_the_error_of_a_missing_shard_names_shard_and_node(tmp_path: Path, serve: Serve) -> None:
    simple_model(tmp_path / "model", shards=4)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")
    server.status["/params_shard_2.bin"] = 404
    with pytest.raises(ndcache.NotFoundError, match=r"params_shard_2\.bin.*, on [ab]") as caught:
        fetch_to_nodes(engine, server.url, {})
    assert caught.value.shard == "params_shard_2.bin"
    assert caught.value.node in ("a", "b")
    assert bodies(server)["/params_shard_2.bin"] == 1
    assert engine.left == 0


def test_row_76_a_shard_that_one_node_cannot_get_is_tried_by_another(tmp_path: Path, serve: Serve) -> None:
    simple_model(tmp_path / "model", shards=4)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b", "c")
    server.status["/params_shard_2.bin"] = 502
    with pytest.raises(ndcache.ServerError, match=r"params_shard_2\.bin") as caught:
        fetch_to_nodes(engine, server.url, NO_RETRY)
    assert bodies(server)["/params_shard_2.bin"] == 2
    assert len({error.node for error in (caught.value, *caught.value.others)}) == 2


def test_row_76_a_manifest_that_is_not_there(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "model").mkdir()
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")
    with pytest.raises(ndcache.NotFoundError) as caught:
        fetch_to_nodes(engine, server.url, NO_RETRY)
    assert caught.value.node in ("a", "b")
    assert len(server.requests) == 4  # one for each name


def test_row_76_offline_nodes_share_what_one_of_them_has(tmp_path: Path, serve: Serve) -> None:
    arrays = simple_model(tmp_path / "model")
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b", "c")
    with pytest.raises(ndcache.OfflineError):
        fetch_to_nodes(engine, server.url, {"offline": True})
    ndcache.fetch(server.url, cache_dir=engine.homes["c"])
    before = len(server.requests)
    fetch_to_nodes(engine, server.url, {"offline": True})
    assert len(server.requests) == before
    for home in engine.homes.values():
        assert_same(ndcache.load(server.url, cache_dir=home, offline=True), arrays)


# --- the call itself ----------------------------------------------------------------------------------


def test_a_callback_that_raises_ends_the_call_and_leaves_nothing(tmp_path: Path, serve: Serve) -> None:
    simple_model(tmp_path / "model")
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")

    def stop(report: ndcache.ProgressReport) -> None:
        if report.shards_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_to_nodes(engine, server.url, {}, progress=stop)
    assert engine.left == 0


def test_row_77_cancel(tmp_path: Path, serve: Serve) -> None:
    simple_model(tmp_path / "model")
    server, engine, cancel = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b"), threading.Event()
    engine.before.append(lambda worker, name, args: cancel.set() if name == "obtain" else None)
    with pytest.raises(ndcache.CancelledError):
        fetch_to_nodes(engine, server.url, {"cancel": cancel})
    assert engine.left == 0


def test_an_update_replaces_what_changed_on_every_node(tmp_path: Path, serve: Serve) -> None:
    simple_model(tmp_path / "model", shards=3)
    server, engine = serve(tmp_path / "model"), engine_of(tmp_path, "a", "b")
    fetch_to_nodes(engine, server.url, {})
    arrays = {"layer.0": random_array((16 * KIB,), seed=0), "new": random_array((7,))}
    shutil.rmtree(tmp_path / "model")
    write_model(tmp_path / "model", [{name: array} for name, array in arrays.items()])
    fetch_to_nodes(engine, server.url, {})
    assert bodies(server) == {"/params_shard_0.bin": 1, "/params_shard_1.bin": 2, "/params_shard_2.bin": 1}
    for home in engine.homes.values():
        assert_same(ndcache.load(server.url, cache_dir=home, offline=True), arrays)
        assert list(home.rglob("params_shard_2.bin")) == []  # no manifest mentions it any more


@pytest.mark.parametrize(
    ("options", "message"),
    [({"session": ...}, "session"), ({"max_workers": 0}, "max_workers"), ({"processes": 2}, "processes")],
)
def test_options_that_cannot_travel(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    options = {name: requests.Session() if value is ... else value for name, value in options.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        fetch_to_nodes(engine_of(tmp_path, "a"), "http://127.0.0.1:1/", options)


def test_local_sources_are_refused(tmp_path: Path) -> None:
    simple_model(tmp_path / "model")
    with pytest.raises(ValueError, match="not a local path"):
        fetch_to_nodes(engine_of(tmp_path, "a"), str(tmp_path / "model"), {})
