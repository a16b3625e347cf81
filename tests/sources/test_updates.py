"""Models on servers that are updated: which cached shards are used, requested again, or fetched."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import ndcache
from ndcache.store.directory import ModelDirectory
from ndcache.store.metadata import FileMetadata

from ..helpers import models
from ..helpers.servers import FileServer

Serve = Callable[..., FileServer]
Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


def write(model: Path, arrays: Arrays, **options: Any) -> None:
    """Write a model with one shard for each array."""
    models.write_model(model, [{name: array} for name, array in arrays.items()], **options)


def asked(server: FileServer) -> list[str]:
    return [request.path for request in server.shard_requests()]


def test_row_11_without_digests_the_server_says_what_changed(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    write(model, arrays, md5=False)
    server = serve(model)
    ndcache.fetch(server.url)
    arrays["layer.2"] = arrays["layer.2"] + 1
    write(model, arrays, md5=False, metadata={"version": 2})
    server.requests.clear()
    weights = ndcache.load(server.url)
    models.assert_same(weights, arrays)
    assert len(asked(server)) == 4
    assert all("if-none-match" in request.headers for request in server.requests)
    assert (weights.stats.network_bytes, weights.stats.cache_bytes) == (1 << 16, 3 << 16)
    server.requests.clear()
    models.assert_same(ndcache.load(server.url), arrays)
    assert asked(server) == []  # and that was noted


def test_an_unchanged_shard_may_vanish_before_it_is_opened(
    model: Path, serve: Serve, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = models.simple_model(model, shards=1)
    write(model, arrays, md5=False)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    write(model, arrays, md5=False, metadata={"version": 2})
    from ndcache.sources.downloads.download import Downloader

    download, vanished = Downloader.download_shard, []

    def vanish(self: Downloader, *args: Any, **options: Any) -> Any:
        result = download(self, *args, **options)
        if result.file is None:
            os.unlink(directory / "params_shard_0.bin")
            vanished.append(True)
        return result

    monkeypatch.setattr(Downloader, "download_shard", vanish)
    models.assert_same(ndcache.load(server.url), arrays)
    assert vanished


def two_versions(model: Path, manifest_name: str = "tensor-cache.json") -> tuple[Arrays, Arrays]:
    """Write the first of two versions, without digests, and return both."""
    old = models.simple_model(model, shards=4)
    for path in model.glob("*.json"):
        path.unlink()
    write(model, old, md5=False, manifest_name=manifest_name)
    return old, {name: array + 1 for name, array in old.items()}


def test_row_11_shards_of_an_interrupted_update_are_not_mixed(model: Path, serve: Serve) -> None:
    _, new = two_versions(model)
    server = serve(model)
    ndcache.fetch(server.url)
    write(model, new, md5=False, metadata={"version": 2})
    server.status["/params_shard_2.bin"] = 404
    with pytest.raises(ndcache.NotFoundError):
        ndcache.load(server.url, max_workers=1)
    report = ndcache.verify(server.url)
    assert set(report.missing) >= {"params_shard_2.bin", "params_shard_3.bin"}
    assert report.bad == ()
    server.status.clear()
    models.assert_same(ndcache.load(server.url), new)


@pytest.mark.parametrize("second", ["tensor-cache.json", "tensor-cache-b16.json"])
def test_row_11_shards_of_another_manifest_are_requested(model: Path, serve: Serve, second: str) -> None:
    old, new = two_versions(model, "ndarray-cache.json")
    server = serve(model)
    models.assert_same(ndcache.load(server.url), old)
    write(model, new, md5=False, manifest_name=second)
    (model / "ndarray-cache.json").unlink()
    models.assert_same(ndcache.load(server.url + second), new)


def test_two_manifests_can_share_cached_shards(model: Path, serve: Serve) -> None:
    old, _ = two_versions(model)
    write(model, old, md5=False, manifest_name="tensor-cache-b16.json", metadata={"version": "b16"})
    server = serve(model)
    for name in ("tensor-cache.json", "tensor-cache-b16.json"):
        ndcache.fetch(server.url + name)
    server.requests.clear()
    for name in ("tensor-cache.json", "tensor-cache-b16.json") * 2:
        models.assert_same(ndcache.load(server.url + name), old)
        models.assert_same(ndcache.load(server.url + name, offline=True), old)
    assert asked(server) == []


@pytest.mark.parametrize("damage", ["touched", "forgotten"])
def test_row_11_shards_of_an_unknown_version_are_not_mixed(model: Path, serve: Serve, damage: str) -> None:
    """The cache was copied without its times, or lost its notes in a crash."""
    old, new = two_versions(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    for path in directory.glob("*.bin"):
        if damage == "touched":
            os.utime(path)
        else:
            (directory / ".ndcache" / "validators" / f"{path.name}.json").unlink()
    models.assert_same(ndcache.load(server.url, offline=True), old)
    write(model, new, md5=False, metadata={"version": 2})
    models.assert_same(ndcache.load(server.url), new)


def test_a_touched_shard_of_the_same_manifest_is_used(model: Path, serve: Serve) -> None:
    old, _ = two_versions(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    for path in directory.glob("*.bin"):
        os.utime(path)
    server.requests.clear()
    models.assert_same(ndcache.load(server.url), old)
    assert asked(server) == []


def test_a_file_that_was_replaced_is_not_noted_as_the_new_one(model: Path, serve: Serve) -> None:
    """A load of the first version continues during an update to the second one; then there is a third one."""
    old, new = two_versions(model)
    server = serve(model)
    ndcache.fetch(server.url)
    stream = ndcache.stream(server.url, verify="always", max_workers=1, memory_limit=1)
    loaded = dict([next(stream)])
    write(model, new, md5=False, metadata={"version": 2})
    models.assert_same(ndcache.load(server.url), new)
    loaded.update(stream)
    models.assert_same(loaded, old)
    newest = {name: array + 1 for name, array in new.items()}
    write(model, newest, md5=False, metadata={"version": 3})
    models.assert_same(ndcache.load(server.url), newest)


def test_row_11_a_file_that_is_replaced_while_its_note_is_read_is_not_taken_for_the_new_one(
    model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load has opened the old file; another one publishes the new file and the note, which the first one reads."""
    _, new = two_versions(model)
    server = serve(model)
    ndcache.fetch(server.url)
    write(model, new, md5=False, metadata={"version": 2})
    read, begun, others = ModelDirectory.metadata, threading.Lock(), []

    def overtaken(cache: ModelDirectory, name: str) -> FileMetadata | None:
        is_looking = name == "params_shard_1.bin" and "open_cached" in callers()
        if is_looking and begun.acquire(blocking=False):
            others.append(ndcache.load(server.url))
        return read(cache, name)

    def callers() -> list[str]:
        return [frame.name for frame in traceback.extract_stack()]

    monkeypatch.setattr(ModelDirectory, "metadata", overtaken)
    for weights in ndcache.load(server.url), *others:
        models.assert_same(weights, new)
    assert others


def test_row_32_an_old_load_does_not_remove_files_of_a_new_version(model: Path, serve: Serve) -> None:
    old = models.simple_model(model, shards=2)
    server = serve(model)
    ndcache.fetch(server.url)
    stream = ndcache.stream(server.url, max_workers=1, memory_limit=1)
    next(stream)
    write(model, {**old, "new": np.ones(4)})
    directory = ndcache.fetch(server.url)
    for _ in stream:
        pass
    assert (directory / "params_shard_2.bin").exists()
    assert ndcache.is_cached(server.url)


@pytest.mark.parametrize("md5", [True, False])
def test_row_26_loads_that_waited_for_another_version_download_once(model: Path, serve: Serve, md5: bool) -> None:
    """One load still downloads the old version when the others begin with the new manifest."""
    old = models.simple_model(model, shards=1)
    write(model, old, md5=md5)
    server = serve(model)
    server.gate.clear()
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(ndcache.load, server.url)
        while not server.peak_bodies:  # the server has read the file that it will send
            time.sleep(0.01)
        new = {name: array + 1 for name, array in old.items()}
        write(model, new, md5=md5, metadata={"version": 2})
        others = [pool.submit(ndcache.load, server.url) for _ in range(5)]
        while len(server.requests) < 2 + 5:
            time.sleep(0.01)
        server.gate.set()
        models.assert_same(first.result(60), old)
        for other in others:
            models.assert_same(other.result(60), new)
    assert len(asked(server)) == 2
