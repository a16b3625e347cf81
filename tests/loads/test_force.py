"""``fetch(…, force=True)``: what is cached is downloaded again, and replaced file by file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import ndcache

from ..helpers.companions import mlc_model
from ..helpers.loads import QUICK, Serve, flip, partial_files, published, scripted_model
from ..helpers.models import simple_model
from ..helpers.servers import ScriptedServer, reply, then_close


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def inodes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("processes", [1, 2])
def test_everything_is_downloaded_again_once(model: Path, serve: Serve, processes: int) -> None:
    mlc_model(model, shards=12)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    held = ndcache.load(server.url)
    before = inodes(directory)
    for number in (3, 4):
        flip(directory / f"params_shard_{number}.bin")  # of the same size and time: only reading shows it
    server.requests.clear()
    assert ndcache.fetch(server.url, force=True, processes=processes) == directory
    optional = "mlc-model-manifest.json"
    requested = sorted(request.path[1:] for request in server.requests if request.path[1:] != optional)
    assert requested == sorted(before), "each file once, by whichever process"
    assert {request.headers.get("if-none-match") for request in server.requests} == {None}
    after = inodes(directory)
    assert [name for name in before if before[name] == after[name]] == []
    assert contents(directory) == contents(model)
    assert held["layer.0"].shape, "a load that has the old files mapped keeps them"
    server.requests.clear()
    with ndcache.load(server.url) as weights:
        assert (weights.stats.network_bytes, weights.stats.integrity) == (0, {"md5": 12})
    assert [request.path for request in server.requests] == ["/tensor-cache.json"]


def test_after_a_failure_the_old_files_stay(model: Path, scripted: ScriptedServer) -> None:
    scripted_model(scripted, model, shards=3)
    directory = ndcache.fetch(scripted.url)
    before = inodes(directory)
    scripted.script["/params_shard_1.bin"] = [reply(500)]
    with pytest.raises(ndcache.ServerError):
        ndcache.fetch(scripted.url, force=True, retries=QUICK, max_workers=1)
    after = inodes(directory)
    assert after["params_shard_0.bin"] != before["params_shard_0.bin"]
    assert after["params_shard_1.bin"] == before["params_shard_1.bin"]
    assert contents(directory) == contents(model)


def test_bytes_of_an_interrupted_download_are_not_used(model: Path, scripted: ScriptedServer, cache_dir: Path) -> None:
    scripted_model(scripted, model, shards=1)
    data, headers = (model / "params_shard_0.bin").read_bytes(), {"ETag": '"1"'}
    scripted.script["/params_shard_0.bin"] = [then_close(reply(200, data[:1000], headers, length=len(data)))]
    with pytest.raises(ndcache.TruncatedError):
        ndcache.fetch(scripted.url, retries=0)
    assert partial_files(cache_dir) != []
    scripted.script["/params_shard_0.bin"] = [reply(200, data, headers)]
    scripted.requests.clear()
    ndcache.fetch(scripted.url, force=True)
    assert [request.headers.get("range") for request in scripted.requests_for("/params_shard_0.bin")] == [None]
    assert partial_files(cache_dir) == []


def test_a_part_of_a_cached_shard_brings_the_whole_shard(tmp_path: Path, serve: Serve, model: Path) -> None:
    simple_model(model, shards=2, shard_bytes=4 << 20)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    before = inodes(directory)
    ndcache.fetch(server.url, names="layer.0", force=True)
    after = inodes(directory)
    assert {name for name in before if before[name] != after[name]} == {"tensor-cache.json", "params_shard_0.bin"}


def test_no_file_comes_from_another_model(tmp_path: Path, serve: Serve) -> None:
    for name in ("one", "two"):
        simple_model(tmp_path / "www" / name)
    server = serve(tmp_path / "www")
    for name in ("one", "two"):
        ndcache.fetch(f"{server.url}{name}/")
    assert len(server.shard_requests()) == 4
    ndcache.fetch(f"{server.url}two/", force=True)
    assert len(server.shard_requests()) == 8


def test_a_directory_of_the_users_gets_nothing_from_the_cache(model: Path, serve: Serve, tmp_path: Path) -> None:
    simple_model(model)
    server, target = serve(model), tmp_path / "target"
    ndcache.fetch(server.url)
    server.requests.clear()
    ndcache.fetch(server.url, local_dir=target, force=True)
    assert len(server.shard_requests()) == 4
    before = inodes(target)
    ndcache.fetch(server.url, local_dir=target, force=True)
    assert len(server.shard_requests()) == 8
    assert set(before.items()).isdisjoint(inodes(target).items())
    assert contents(target) == contents(model)


def test_a_copy_of_a_local_model_is_made_again(model: Path, tmp_path: Path) -> None:
    simple_model(model)
    target = ndcache.fetch(model, local_dir=tmp_path / "target")
    flip(target / "params_shard_1.bin")
    assert contents(ndcache.fetch(model, local_dir=target)) != contents(model)
    assert contents(ndcache.fetch(model, local_dir=target, force=True)) == contents(model)


def test_a_file_of_the_users_is_never_replaced(model: Path, serve: Serve, tmp_path: Path) -> None:
    simple_model(model)
    target = tmp_path / "target"
    target.mkdir()
    (target / "params_shard_1.bin").write_text("mine")
    with pytest.raises(ndcache.UnsafeCacheError):
        ndcache.fetch(serve(model).url, local_dir=target, force=True)
    assert (target / "params_shard_1.bin").read_text() == "mine"


def test_offline_it_is_refused(model: Path, serve: Serve, cache_dir: Path) -> None:
    simple_model(model)
    server = serve(model)
    ndcache.fetch(server.url)
    files = published(cache_dir)
    with pytest.raises(ndcache.OfflineError, match="force downloads again"):
        ndcache.fetch(server.url, force=True, offline=True)
    assert published(cache_dir) == files
    assert os.listdir(ndcache.fetch(model, force=True, offline=True)) != []
