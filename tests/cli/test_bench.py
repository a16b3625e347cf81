"""``ndcache bench``: a load, and what the network, the disk and the device give beside it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
import ndcache.cache
from ndcache.cli.bench.device import device_rate
from ndcache.cli.bench.disk import disk_rates, part_in_memory
from ndcache.cli.bench.rates import Used
from ndcache.cli.bench.temporary import temporary_cache
from ndcache.loaders.probe import NetworkRate, measure_network

from ..helpers.requirements import need_cuda
from ..helpers.servers import FileServer
from .test_commands import invoke

pytestmark = pytest.mark.once

NAMES = ["network", "disk, write", "disk, read", "device"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    params = {f"layer.{index}": np.arange(50_000, dtype=np.uint32) for index in range(3)}
    ndcache.dump(params, tmp_path / "model", shard_bytes=1 << 17)
    return tmp_path / "model"


def test_it_measures_beside_a_load_and_leaves_nothing(
    model: Path, tmp_path: Path, serve: Callable[..., FileServer]
) -> None:
    server, cache, page = serve(model), tmp_path / "cache", tmp_path / "page.html"
    cache.mkdir()
    result = invoke("bench", server.url, "--cache-dir", cache, "--report", page, "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    header, *rows = result.stdout.partition("\n\n")[0].splitlines()
    assert re.split("  +", header) == ["measured", "MiB/s", "load used", "how"]
    assert [re.split("  +", row)[0] for row in rows] == ["load", *NAMES]
    assert "the load used" in result.stdout.splitlines()[-1]
    shards = [path.name for path in model.glob("*.bin")]
    received = [request.path.rpartition("/")[2] for request in server.requests]
    assert [received.count(name) for name in shards] == [2] * 3  # for the load, and for the network alone
    (data,) = re.findall(r'<script[^>]* id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    assert [row[0] for row in json.loads(data)["rates"]] == NAMES
    assert json.loads(data)["remark"] in result.stdout
    assert list(cache.iterdir()) == []


def test_a_local_source_needs_no_network(model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    value = json.loads(invoke("bench", model, "--cache-dir", tmp_path / "cache", "--json", "-q").stdout)
    network, *others = value["rates"]
    assert (network["bytes_per_second"], network["share"]) == (None, None)
    assert all(rate["bytes_per_second"] > 0 for rate in others)
    assert [rate["share"] for rate in others] == [None] * 3  # it maps the files: it writes, reads and copies nothing
    assert value["nbytes"] == 3 * 200_000
    assert sorted(tmp_path.rglob("*")) == before


def test_the_connections_of_all_processes_count(model: Path, tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    options = ("--processes", "2", "--max-workers", "1", "--limit-rate", "100MB/s", "--json", "-q")
    value = json.loads(invoke("bench", serve(model).url, "--cache-dir", tmp_path / "cache", *options).stdout)
    how = "585.9 KiB over 2 connections, neither checked nor kept, within --limit-rate"
    assert value["rates"][0]["how"].startswith(how)


def probes(monkeypatch: pytest.MonkeyPatch, first: NetworkRate, more: NetworkRate | Exception) -> list[Any]:
    """Let the network be measured as these two rates; return the connections that are asked for."""
    asked: list[Any] = []

    def measure(*args: Any, connections: int | None, **options: Any) -> NetworkRate:
        asked.append(connections)
        found = first if len(asked) == 1 else more
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr("ndcache.cli.bench.network.measure_network", measure)
    return asked


@pytest.mark.parametrize(
    ("more", "row", "sentence"),
    [
        (NetworkRate(400, 1.0, 3, 0.1), "400 B over 3 connections: 4.0 times as much", "try --max-workers 3."),
        (NetworkRate(110, 1.0, 3, 0.1), "110 B over 3 connections: 1.1 times as much", "is at its limit."),
        (ndcache.ServerError("429"), "not measured: 429", "of what the network gives."),
    ],
)
def test_more_connections_are_tried(
    model: Path,
    tmp_path: Path,
    serve: Callable[..., FileServer],
    monkeypatch: pytest.MonkeyPatch,
    more: NetworkRate | Exception,
    row: str,
    sentence: str,
) -> None:
    asked = probes(monkeypatch, NetworkRate(100, 1.0, 2, 0.1), more)
    result = invoke("bench", serve(model).url, "--cache-dir", tmp_path / "cache", "--max-workers", "2", "-q")
    assert asked == [None, 3]  # as many as there are files
    assert re.search(rf"^network, more +\S+ +{re.escape(row)}$|^network, more +none +{row}$", result.stdout, re.M)
    assert result.stdout.startswith("measured")
    assert result.stdout.rstrip().endswith(sentence)


def test_a_busy_process_is_not_taken_for_the_network(
    model: Path, tmp_path: Path, serve: Callable[..., FileServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = probes(monkeypatch, NetworkRate(100, 1.0, 8, 0.9), ndcache.ServerError("not asked for"))
    value = json.loads(invoke("bench", serve(model).url, "--cache-dir", tmp_path / "cache", "--json", "-q").stdout)
    assert asked == [None]
    assert value["limit"] != "network"
    assert value["rates"][0]["how"].endswith("; this process used 0.9 cores for it: the network may give more")


def test_more_connections_receive_what_fewer_did(model: Path, tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    server = serve(model, rate=2 << 20)
    with ndcache.Loader(cache_dir=tmp_path / "cache", max_workers=1) as loader:
        found = [
            measure_network(loader, server.url, None, connections=count, max_bytes=1 << 20, max_seconds=60)
            for count in (None, 4)
        ]
    assert [(rate.nbytes, rate.connections) for rate in found if rate] == [(600_000, 1), (600_000, 3)]


def test_the_disk_is_met_as_a_load_meets_it(tmp_path: Path) -> None:
    used = Used(ndcache.LoadStats(), read=0, moved=0)
    write, read = disk_rates(tmp_path, [40 << 20, 10 << 20], None, 2, used, None)
    assert write.how == "64.0 MiB in 3 files by 2 threads, each synced"
    assert read.how.startswith("64.0 MiB of those files by 2 threads, ")
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_memory_is_known(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    assert part_in_memory([path]) == 1
    assert part_in_memory([]) is None


def test_a_load_from_memory_says_so(tmp_path: Path) -> None:
    values = np.zeros(100_000, np.float32)
    ndcache.dump({"a": values}, tmp_path / "model")
    value = json.loads(invoke("bench", tmp_path / "model", "--cache-dir", tmp_path / "cache", "--json", "-q").stdout)
    assert value["rates"][2]["how"].endswith("; the load found 100 % in memory")


def test_a_device_that_cannot_be_measured_is_no_error(tmp_path: Path) -> None:
    used = Used(ndcache.LoadStats(), read=0, moved=0)
    (tmp_path / "model").write_text("in the way")
    rate = device_rate(tmp_path, "gpu", object(), used)
    assert (rate.bytes_per_second, rate.share) == (None, None)
    assert rate.how.startswith("not measured: ")


@pytest.mark.parametrize("device", ["gpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_it_measures_a_device(
    device: str, model: Path, tmp_path: Path, serve: Callable[..., FileServer], request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("gpu") if device == "gpu" else need_cuda()
    for source in (model, serve(model).url):
        options = ("--device", device, "--cache-dir", tmp_path / "cache", "--json", "-q")
        value = json.loads(invoke("bench", source, *options).stdout)
        assert value["device"] != "cpu"
        measured = value["rates"][-1]
        how = {
            "gpu": "64.0 MiB loaded onto it from the page cache: it may take more",
            "cuda": "256.0 MiB copied to it from pinned memory",
        }
        assert (measured["name"], measured["how"]) == ("device", how[device])
        assert measured["bytes_per_second"] > 0
        assert measured["share"] > 0


def test_a_network_that_cannot_be_measured_is_no_error(
    model: Path, tmp_path: Path, serve: Callable[..., FileServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(model)

    def refuse(*args: Any, **options: Any) -> NetworkRate | None:
        server.status["/params_shard_0.bin"] = 404
        return measure_network(*args, **options)

    monkeypatch.setattr("ndcache.cli.bench.network.measure_network", refuse)
    result = invoke("bench", server.url, "--cache-dir", tmp_path / "cache", "-q")
    assert result.exit_code == 0
    assert "not measured: the server has no such file" in result.stdout


def test_a_failed_load_is_an_error_and_leaves_nothing(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    result = invoke("bench", serve(tmp_path / "empty").url, "--cache-dir", tmp_path / "cache", "-q")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_next_one_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    left = tmp_path / ".ndcache-bench-1"
    with temporary_cache(tmp_path) as used:
        (left / "bench" / "cache").mkdir(parents=True)
        for path in (left, used.parent):
            os.utime(path, (0, 0))
        with temporary_cache(tmp_path):
            assert not left.exists()
            assert used.exists()


def test_an_interrupted_one_does_not_say_that_it_kept_something(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, temporary_cache(tmp_path):
        raise KeyboardInterrupt("1 MiB kept; run it again to go on")
    assert caught.value.args == ()
    assert list(tmp_path.iterdir()) == []


def test_no_command_takes_the_temporary_cache_for_a_model(
    model: Path, tmp_path: Path, serve: Callable[..., FileServer]
) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    with temporary_cache(root) as folder:
        ndcache.fetch(serve(model).url, cache_dir=folder / "cache")
        files = sorted(folder.rglob("*"))
        assert ndcache.cache.models(cache_dir=root) == []
        invoke("rm", "--all", "--cache-dir", root)
        assert sorted(folder.rglob("*")) == files != []
