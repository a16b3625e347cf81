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
from ndcache.cli.bench import temporary_cache
from ndcache.loaders.probe import NetworkRate, measure_network

from ..helpers.servers import FileServer
from .test_commands import invoke

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
    assert value["rates"][0]["how"] == "0.6 MiB over 2 connections, neither checked nor kept, within --limit-rate"


def test_a_network_that_cannot_be_measured_is_no_error(
    model: Path, tmp_path: Path, serve: Callable[..., FileServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(model)

    def refuse(*args: Any, **options: Any) -> NetworkRate | None:
        server.status["/params_shard_0.bin"] = 404
        return measure_network(*args, **options)

    monkeypatch.setattr("ndcache.cli.bench.measure_network", refuse)
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
