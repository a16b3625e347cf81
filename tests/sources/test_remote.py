"""Models on servers, and their cache: mirrors, updates, files that are held, and files that are removed."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import ndcache
from ndcache.store.directory import ModelDirectory

from ..helpers import models
from ..helpers.servers import Connection, FileServer, Request, ScriptedServer, reply

Serve = Callable[..., FileServer]
QUICK = ndcache.RetryPolicy(retries=1, backoff=0.001)
Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


def write(model: Path, arrays: Arrays, **options: Any) -> None:
    """Write a model with one shard for each array."""
    models.write_model(model, [{name: array} for name, array in arrays.items()], **options)


def asked(server: FileServer) -> list[str]:
    return [request.path for request in server.shard_requests()]


def state(directory: Path) -> list[str]:
    """Return the files in ndcache's own folder, without those about the source and the use of the model."""
    ignored = ("source.json", "used")
    found = [path for path in (directory / ".ndcache").rglob("*") if path.is_file() and path.name not in ignored]
    return sorted(str(path.relative_to(directory / ".ndcache")) for path in found)


# --- mirrors ------------------------------------------------------------------------------------------


def test_a_mirrors_shards_must_match_the_sources_manifest(model: Path, tmp_path: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    shutil.copytree(model, tmp_path / "mirror")
    shutil.copytree(model, tmp_path / "bad")
    for path in (tmp_path / "bad").glob("*.bin"):
        path.write_bytes(bytes(path.stat().st_size))
    models.write_model(tmp_path / "bad", [{"evil": np.zeros(4)}], manifest_name="tensor-cache.json")
    server, bad, good = serve(model), serve(tmp_path / "bad"), serve(tmp_path / "mirror")
    for index in range(4):
        server.status[f"/params_shard_{index}.bin"] = 404
    weights = ndcache.load(server.url, mirrors=[bad.url, good.url], retries=QUICK)
    models.assert_same(weights, arrays)
    assert sorted(asked(good)) == sorted(f"/params_shard_{index}.bin" for index in range(4))
    assert [request.path for request in [*bad.requests, *good.requests] if request.path.endswith(".json")] == []


def test_a_source_that_keeps_failing_is_tried_after_the_mirror(model: Path, tmp_path: Path, serve: Serve) -> None:
    arrays = models.simple_model(model, shards=12)
    shutil.copytree(model, tmp_path / "mirror")
    server, mirror = serve(model), serve(tmp_path / "mirror")
    server.status.update({f"/params_shard_{index}.bin": 503 for index in range(12)})
    models.assert_same(ndcache.load(server.url, mirrors=mirror.url, retries=QUICK, max_workers=2), arrays)
    assert len(asked(mirror)) == 12
    assert len(asked(server)) <= 6  # less than two attempts for each shard


def test_the_error_has_those_of_the_mirrors(model: Path, tmp_path: Path, serve: Serve) -> None:
    models.simple_model(model, shards=1)
    shutil.copytree(model, tmp_path / "mirror")
    server, mirror = serve(model), serve(tmp_path / "mirror")
    server.status["/params_shard_0.bin"] = 500
    mirror.status["/params_shard_0.bin"] = 403
    with pytest.raises(ndcache.ServerError) as caught:
        ndcache.load(server.url, mirrors=[mirror.url], retries=QUICK)
    assert [type(error) for error in caught.value.others] == [ndcache.AuthError]


def test_hf_endpoint_is_a_mirror_of_the_hub(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = models.simple_model(tmp_path / "owner" / "name" / "resolve" / "main")
    server = serve(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    models.assert_same(ndcache.load("hf://owner/name"), arrays)
    first = serve(tmp_path / "owner" / "name" / "resolve" / "main")
    first.status["/params_shard_2.bin"] = 410
    models.assert_same(ndcache.load(first.url, mirrors=["hf://owner/name"]), arrays)


def sri(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}-{base64.b64encode(hashlib.new(algorithm, data).digest()).decode()}"


def test_a_manifest_with_a_required_digest_may_come_from_a_mirror(model: Path, tmp_path: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    server, mirror, other = serve(tmp_path / "nothing"), serve(model), serve(tmp_path / "other")
    write(tmp_path / "other", {"evil": np.zeros(4)})
    integrity = {"tensor-cache.json": sri((model / "tensor-cache.json").read_bytes())}
    with pytest.raises(ndcache.NotFoundError):
        ndcache.load(server.url, mirrors=[mirror.url])
    mirrors = [other.url, mirror.url]
    models.assert_same(ndcache.load(server.url, mirrors=mirrors, integrity=integrity, retries=QUICK), arrays)


# --- files that nobody needs any more -----------------------------------------------------------------


def test_shards_of_former_versions_are_removed(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model, shards=4)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    (directory / "mine.txt").write_text("not ndcache's")
    kept = dict(list(arrays.items())[:2])
    write(model, kept)
    models.assert_same(ndcache.load(server.url), kept)
    names = ["mine.txt", "params_shard_0.bin", "params_shard_1.bin", "tensor-cache.json"]
    assert sorted(path.name for path in directory.iterdir() if path.is_file()) == names
    assert state(directory) == ["companions.json", *(f"validators/{name}.json" for name in names[1:])]


def test_a_load_that_fails_removes_nothing(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model, shards=4)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    write(model, {"new": np.ones(4), **dict(list(arrays.items())[:2])})
    server.status["/params_shard_0.bin"] = 404
    with pytest.raises(ndcache.NotFoundError):
        ndcache.load(server.url)
    assert len(list(directory.glob("*.bin"))) == 4


def test_shards_of_another_manifest_are_kept(model: Path, serve: Serve) -> None:
    """Two manifests lie in one directory and share some shards."""
    arrays = models.simple_model(model, shards=4)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    write(model, dict(list(arrays.items())[:2]), manifest_name="tensor-cache-b16.json")
    ndcache.fetch(server.url + "tensor-cache-b16.json")
    assert len(list(directory.glob("*.bin"))) == 4
    server.requests.clear()
    models.assert_same(ndcache.load(server.url), arrays)
    assert asked(server) == []


def test_files_that_were_added_are_kept(model: Path, serve: Serve) -> None:
    from ndcache.tvm import ArtifactCache

    models.simple_model(model)
    (model / "tokenizer.model").write_bytes(b"words")
    server = serve(model)
    directory = ndcache.fetch(server.url)
    ArtifactCache().add_to_cache(server.url + "tokenizer.model")
    write(model, {"new": np.ones(4)})
    ndcache.fetch(server.url)
    assert ArtifactCache().has_all_keys([server.url + "tokenizer.model"])
    assert [path.name for path in directory.glob("*.bin")] == ["params_shard_0.bin"]


@pytest.mark.parametrize("idle", [False, True])
def test_row_25_files_of_interrupted_loads_are_removed(model: Path, serve: Serve, idle: bool) -> None:
    """Those of complete shards are removed at once; others, which may have a writer, when they have been idle."""
    models.simple_model(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    before = state(directory)
    content_id = hashlib.md5((model / "params_shard_0.bin").read_bytes()).hexdigest()
    note = f'{{"url": "", "etag": "", "claim": "{content_id}", "sha256": null, "boot": ""}}'
    partials, locks = directory / ".ndcache" / "parts", directory / ".ndcache" / "locks"
    mine = [partials / "params_shard_0.bin.0123456789abcdef", partials / "params_shard_0.bin.0123456789abcdef.json"]
    others = [partials / "params_shard_9.bin.0123456789abcdef", partials / "params_shard_1.bin.0123456789abcdef"]
    for path in [*mine, *others, locks / "params_shard_0.bin"]:
        path.write_text(note if path.suffix == ".json" else "leftover")
    if idle:
        for path in others:
            os.utime(path, (time.time() - 7200, time.time() - 7200))
    ndcache.load(server.url)
    assert set(state(directory)) - set(before) == (set() if idle else {f"parts/{path.name}" for path in others})


# --- files that are there when a load begins ----------------------------------------------------------


def test_row_32_a_load_keeps_the_cached_files_of_a_deleted_model(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model, shards=6)
    server = serve(model)
    ndcache.fetch(server.url)
    stream = ndcache.stream(server.url, offline=True, max_workers=1, memory_limit=1)
    loaded = dict([next(stream)])
    assert ndcache.delete(server.url) > 0
    loaded.update(stream)
    models.assert_same(loaded, arrays)


def test_row_32_an_update_does_not_disturb_a_load_of_the_old_version(model: Path, serve: Serve) -> None:
    old = models.simple_model(model, shards=6)
    server = serve(model)
    ndcache.fetch(server.url)
    stream = ndcache.stream(server.url, max_workers=1, memory_limit=1)
    loaded = dict([next(stream)])
    new = {name: array + 1 for name, array in list(old.items())[:3]}
    write(model, new)
    models.assert_same(ndcache.load(server.url), new)
    loaded.update(stream)
    models.assert_same(loaded, old)


def test_nothing_is_held_after_a_load(model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from ndcache.sources import cached_files

    models.simple_model(model, shards=6)
    server = serve(model)
    ndcache.fetch(server.url)
    ndcache.load(server.url, names="layer.3")
    with pytest.raises(ZeroDivisionError):
        ndcache.load(server.url, progress=lambda report: 1 / report.shards_done)
    stream = ndcache.stream(server.url)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    os.unlink(model / "params_shard_0.bin")
    assert cached_files._all_held == set()
    monkeypatch.setattr(cached_files, "_MAX_HELD", 2)
    assert len(ndcache.load(server.url)) == 6
    assert cached_files._all_held == set()


# --- resumed loads ------------------------------------------------------------------------------------


def test_a_resumed_load_counts_the_bytes_that_were_there(model: Path, scripted: ScriptedServer) -> None:
    arrays = models.simple_model(model, shards=1, shard_bytes=1 << 20)
    data = (model / "params_shard_0.bin").read_bytes()

    def answer(connection: Connection, request: Request) -> None:
        if "range" not in request.headers:
            connection.send(reply(200, data[: 1 << 19], {"ETag": '"1"'}, length=len(data)))
            return
        assert request.headers["range"] == f"bytes={1 << 19}-{len(data) - 1}"
        content_range = f"bytes {1 << 19}-{len(data) - 1}/{len(data)}"
        connection.send(reply(206, data[1 << 19 :], {"ETag": '"1"', "Content-Range": content_range}))

    scripted.script["/tensor-cache.json"] = [reply(200, (model / "tensor-cache.json").read_bytes())]
    scripted.script["/params_shard_0.bin"] = [answer]
    with pytest.raises(ndcache.TruncatedError, match="524,288 of 1,048,576"):
        ndcache.load(scripted.url, retries=0)
    reports: list[ndcache.ProgressReport] = []
    weights = ndcache.load(scripted.url, progress=reports.append)
    models.assert_same(weights, arrays)
    assert (weights.stats.resumed_bytes, weights.stats.network_bytes) == (1 << 19, 1 << 19)
    assert reports[-1].progress == 1.0


@pytest.mark.parametrize("verb", ["load", "verify"])
def test_row_26_a_shard_published_between_two_looks_is_not_quarantined(
    model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The first look does not find it, and the second one does."""
    arrays = models.simple_model(model, shards=1)
    server = serve(model)
    directory = ndcache.fetch(server.url, names=[] if verb == "load" else None)
    (good, late) = (model / "params_shard_0.bin", directory / "params_shard_0.bin")
    open_shard, looks = ModelDirectory.open_shard, []

    def not_yet(self: ModelDirectory, shard: ndcache.Shard) -> Any:
        looks.append(shard)
        if len(looks) > 1:
            return open_shard(self, shard)
        shutil.copyfile(good, late.with_suffix(".new"))
        late.with_suffix(".new").replace(late)
        return None

    monkeypatch.setattr(ModelDirectory, "open_shard", not_yet)
    if verb == "load":
        models.assert_same(ndcache.load(server.url), arrays)
    else:
        ndcache.verify(server.url)
    assert looks
    assert late.read_bytes() == good.read_bytes()
    assert not (directory / ".ndcache" / "aside").exists()


# --- faults of files ----------------------------------------------------------------------------------


def test_row_25_partial_files_are_removed_if_the_next_load_needs_room(
    model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = models.simple_model(model, shards=1, shard_bytes=1 << 20)
    server = serve(model)
    directory = ndcache.fetch(server.url, names=[])
    left = directory / ".ndcache" / "parts" / "params_shard_0.bin.0123456789abcdef"
    left.write_bytes(bytes(1 << 19))

    def free(folder: Path) -> Any:
        return type("usage", (), {"free": (1 << 19) - 1 if left.exists() else 1 << 20})

    monkeypatch.setattr(shutil, "disk_usage", free)
    models.assert_same(ndcache.load(server.url), arrays)


def test_row_30_a_note_with_a_crafted_name_removes_nothing(model: Path, tmp_path: Path, serve: Serve) -> None:
    models.simple_model(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    victim = directory.parent / "victim.txt"
    victim.write_text("precious")
    note = '{"nbytes": 8, "mtime_ns": 0, "claim": "x"}'
    (directory / ".ndcache" / "validators" / "..%2Fvictim.txt.json").write_text(note)
    models.simple_model(model, shards=3)
    ndcache.load(server.url)
    assert victim.read_text() == "precious"
    assert not (directory / "params_shard_3.bin").exists()  # the cache is pruned all the same


def test_a_cached_shard_that_cannot_be_read_is_an_error(
    model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ndcache.sources import verifier

    models.simple_model(model)
    server = serve(model)
    ndcache.fetch(server.url)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verifier, "find_mismatch", fail)
    with pytest.raises(ndcache.CacheUnavailableError, match="Input/output error"):
        ndcache.load(server.url, verify="always")
