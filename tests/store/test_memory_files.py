"""Files that are held in memory: everything that is promised of files in the cache holds for them, too."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ndcache

from ..helpers import models
from ..helpers.models import assert_same
from ..helpers.processes import run_script
from ..helpers.servers import FileServer, Request, ScriptedServer, reply, then_close

Serve = Callable[..., FileServer]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture
def in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("NDCACHE_HOME", str(tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("in_memory")
def test_a_transfer_resumes_where_it_broke_off(model: Path, scripted: ScriptedServer) -> None:
    arrays = models.simple_model(model, shards=1)
    data = (model / "params_shard_0.bin").read_bytes()
    tag = {"ETag": '"1"'}
    rest = {**tag, "Content-Range": f"bytes 1000-{len(data) - 1}/{len(data)}"}
    scripted.script["/tensor-cache.json"] = [reply(200, (model / "tensor-cache.json").read_bytes())]
    scripted.script["/params_shard_0.bin"] = [
        then_close(reply(200, data[:1000], tag, length=len(data))),
        reply(206, data[1000:], rest),
    ]
    assert_same(ndcache.load(scripted.url), arrays)
    assert [r.headers.get("range") for r in scripted.requests_for("/params_shard_0.bin")] == [None, "bytes=1000-65535"]


@pytest.mark.usefixtures("in_memory")
def test_wrong_bytes_in_memory_are_noticed(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=2)
    (model / "params_shard_1.bin").write_bytes(bytes(1 << 16))
    with pytest.raises(ndcache.ChecksumError, match="params_shard_1"):
        ndcache.load(serve(model).url)


@pytest.mark.usefixtures("in_memory")
def test_ranges_of_a_large_shard_come_from_several_workers(
    model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ndcache.sources.downloads.download.RANGE_THRESHOLD", 1 << 16)
    monkeypatch.setattr("ndcache.sources.downloads.download.RANGE_BYTES", (1 << 16, 1 << 17))
    arrays = models.simple_model(model, shards=2, shard_bytes=1 << 20)
    server = serve(model)
    assert_same(ndcache.load(server.url), arrays)
    assert len(server.shard_requests()) > 2
    assert all("range" in request.headers for request in server.shard_requests())


@pytest.mark.usefixtures("in_memory")
def test_only_the_ranges_of_the_named_tensors_are_fetched(model: Path, serve: Serve) -> None:
    arrays = {f"t{n}": models.random_array((1 << 19,), seed=n) for n in range(6)}
    models.write_model(model, [arrays])
    server = serve(model)
    with ndcache.load(server.url, names=["t1", "t4"]) as weights:
        assert_same(weights, {name: arrays[name] for name in ("t1", "t4")})
        assert weights.stats.network_bytes == 4 << 20

    def ranges(request: Request) -> str | None:
        return request.headers.get("range")

    assert sorted(map(str, map(ranges, server.shard_requests()))) == [
        f"bytes={n << 21}-{(n + 1 << 21) - 1}" for n in (1, 4)
    ]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system has no files in memory")
@pytest.mark.usefixtures("in_memory")
def test_arrays_are_views_of_the_received_bytes(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=3)
    gc.collect()  # errors of other tests may still hold files
    with ndcache.load(serve(model).url) as weights, open("/proc/self/maps") as maps:
        assert sum("memfd:ndcache" in line for line in maps) == 3
        array = weights["layer.1"]
    assert array.sum() == models.random_array((1 << 14,), seed=1).sum()
    del array, weights
    with open("/proc/self/maps") as maps:
        assert not any("memfd:ndcache" in line for line in maps)


@pytest.mark.usefixtures("in_memory")
def test_without_files_in_memory_the_temporary_directory_is_used(
    model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    arrays = models.simple_model(model)
    assert_same(ndcache.load(serve(model).url), arrays)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce this limit")
@pytest.mark.usefixtures("in_memory")
def test_a_lack_of_memory_is_a_memory_error(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=1, shard_bytes=1 << 20)
    script = """
        import ndcache, resource, sys, warnings
        warnings.simplefilter("ignore")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            ndcache.load(sys.argv[1])
        except MemoryError as error:
            print(error)
    """
    assert "no memory for params_shard_0.bin" in run_script(script, serve(model).url)
