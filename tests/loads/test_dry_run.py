"""``fetch(…, dry_run=True)``: what would be fetched, how many bytes, and whether there is room; nothing is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import ndcache

from ..helpers.companions import mlc_model
from ..helpers.loads import Serve, scripted_model
from ..helpers.models import simple_model
from ..helpers.servers import ScriptedServer, reply, then_close

SHARD = 64 << 10


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Return the files and folders below a directory, with their times."""
    found = (path for path in sorted(directory.rglob("*")))
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def plan(source: object, **options: Any) -> ndcache.FetchPlan:
    result = ndcache.fetch(source, dry_run=True, **options)  # type: ignore[call-overload]
    assert isinstance(result, ndcache.FetchPlan)
    return result


def actions(found: ndcache.FetchPlan) -> dict[str, tuple[str, int | None]]:
    return {file.name: (file.action, file.to_fetch) for file in found.files}


def test_a_new_model_and_a_cached_one(model: Path, serve: Serve, cache_dir: Path) -> None:
    mlc_model(model, shards=3)
    server = serve(model)
    files = {path.name: path.stat().st_size for path in model.iterdir() if path.name != "tensor-cache.json"}
    found = plan(server.url)
    assert not cache_dir.exists()
    assert server.shard_requests() == []
    assert actions(found) == {name: ("fetch", nbytes) for name, nbytes in files.items()}
    assert found.bytes_to_fetch == found.bytes_to_write == found.nbytes == sum(files.values())
    assert found.has_room
    assert found.free_bytes is not None
    assert found.directory == ndcache.fetch(server.url)
    before = snapshot(cache_dir)
    found = plan(server.url)
    assert actions(found) == dict.fromkeys(files, ("keep", 0))
    assert (found.bytes_to_fetch, found.bytes_to_write, found.nbytes) == (0, 0, sum(files.values()))
    assert plan(server.url, force=True).bytes_to_fetch == sum(files.values())
    assert plan(server.url, offline=True).files == found.files
    assert snapshot(cache_dir) == before
    assert os.listdir(found.directory) != []


def test_an_updated_model(model: Path, serve: Serve, cache_dir: Path) -> None:
    mlc_model(model, shards=2)
    server = serve(model)
    ndcache.fetch(server.url)
    before = snapshot(cache_dir)
    shutil.rmtree(model)
    mlc_model(model, shards=3, version="0.2.0")
    found = actions(plan(server.url))
    assert found.pop("mlc-chat-config.json")[0] == "fetch"
    assert found.pop("params_shard_2.bin") == ("fetch", SHARD)
    assert set(found.values()) == {("keep", 0)}
    assert snapshot(cache_dir) == before


def test_an_interrupted_download(model: Path, scripted: ScriptedServer) -> None:
    scripted_model(scripted, model, shards=1)
    data, headers = (model / "params_shard_0.bin").read_bytes(), {"ETag": '"1"'}
    scripted.script["/params_shard_0.bin"] = [then_close(reply(200, data[:1000], headers, length=len(data)))]
    with pytest.raises(ndcache.TruncatedError):
        ndcache.fetch(scripted.url, retries=0)
    scripted.script["/mlc-chat-config.json"] = [reply(404)]
    found = plan(scripted.url)
    assert actions(found) == {"params_shard_0.bin": ("fetch", SHARD - 1000)}
    assert found.bytes_to_write == SHARD
    assert actions(plan(scripted.url, force=True)) == {"params_shard_0.bin": ("fetch", SHARD)}


def test_another_model_has_the_same_files(tmp_path: Path, serve: Serve) -> None:
    for name in ("one", "two"):
        simple_model(tmp_path / "www" / name, shards=1)
    server = serve(tmp_path / "www")
    ndcache.fetch(f"{server.url}one/")
    found = plan(f"{server.url}two/")
    assert actions(found) == {"params_shard_0.bin": ("copy", 0)}
    assert (found.bytes_to_fetch, found.bytes_to_write) == (0, SHARD)
    assert actions(plan(f"{server.url}two/", force=True)) == {"params_shard_0.bin": ("fetch", SHARD)}


def test_some_tensors_and_no_companion_files(model: Path, serve: Serve) -> None:
    mlc_model(model, shards=3)
    found = plan(serve(model).url, names="layer.1", files=False)
    assert actions(found) == {"params_shard_1.bin": ("fetch", SHARD)}


def test_a_directory_of_the_users(model: Path, serve: Serve, tmp_path: Path) -> None:
    simple_model(model, shards=2)
    server, target = serve(model), tmp_path / "target"
    ndcache.fetch(server.url, names="layer.0")
    found = plan(server.url, local_dir=target)
    assert found.directory == target
    assert [file.action for file in found.files] == ["copy", "fetch"]
    assert (found.bytes_to_fetch, found.bytes_to_write) == (SHARD, 2 * SHARD)
    assert not target.exists()
    ndcache.fetch(server.url, local_dir=target)
    assert [file.action for file in plan(server.url, local_dir=target).files] == ["keep", "keep"]


def test_local_sources(model: Path, tmp_path: Path) -> None:
    simple_model(model, shards=2)
    found = plan(model)
    assert [file.action for file in found.files] == ["keep", "keep"]
    assert found.directory == model
    found = plan(model, local_dir=tmp_path / "target")
    assert [file.action for file in found.files] == ["copy", "copy"]
    assert (found.bytes_to_fetch, found.bytes_to_write) == (0, 2 * SHARD)


def test_there_is_no_room(model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    simple_model(model, shards=2)
    monkeypatch.setattr("ndcache.loaders.plan.free_bytes", lambda directory: 2 * SHARD - 1)
    found = plan(serve(model).url)
    assert not found.has_room
    assert found.free_bytes == 2 * SHARD - 1


@pytest.mark.parametrize(
    ("options", "error"),
    [({"names": "none"}, KeyError), ({"include": ["*.md"]}, ValueError), ({"offline": True}, ndcache.OfflineError)],
)
def test_it_fails_as_the_fetch_would(model: Path, serve: Serve, options: Any, error: type[Exception]) -> None:
    simple_model(model, shards=2)
    with pytest.raises(error):
        plan(serve(model).url, **options)
