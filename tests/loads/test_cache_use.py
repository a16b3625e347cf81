"""Loads with a cache: which files are trusted, set aside, or fetched again."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.devices.cpu import CpuUpload
from ndcache.devices.segments import Segment
from ndcache.sources.manifests.manifest import ManifestSource

from ..helpers import models
from ..helpers.loads import Serve, assert_same, flip, published, truncate, wait_until


def extend(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def notices_by_verify(url: str) -> None:
    assert ndcache.verify(url).bad == ("params_shard_1.bin",)
    ndcache.load(url)


@pytest.mark.parametrize(
    ("damage", "look"),
    [
        *((size, ndcache.load) for size in (truncate, extend)),
        *((size, lambda url: ndcache.load(url, verify="never")) for size in (truncate, extend)),
        *((size, ndcache.fetch) for size in (truncate, extend)),
        *((any_, lambda url: ndcache.load(url, verify="always")) for any_ in (truncate, extend, flip)),
        *((any_, notices_by_verify) for any_ in (truncate, extend, flip)),
    ],
    ids=lambda value: value.__name__,
)
def test_row_31_a_damaged_shard_is_set_aside_and_fetched_again(
    model: Path, serve: Serve, damage: Callable[[Path], None], look: Callable[[str], Any]
) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    for _ in range(2):  # at every load, and not at the first one only
        damage(directory / "params_shard_1.bin")
        damaged = (directory / "params_shard_1.bin").read_bytes()
        server.requests.clear()
        look(server.url)
        assert [request.path for request in server.shard_requests()] == ["/params_shard_1.bin"]
        assert (directory / ".ndcache" / "aside" / "params_shard_1.bin").read_bytes() == damaged
        assert_same(ndcache.load(server.url, verify="always", offline=True), arrays)


@pytest.mark.parametrize("damage", [truncate, extend])
def test_row_31_a_shard_of_the_wrong_size_is_missing_and_not_loaded_offline(
    model: Path, serve: Serve, damage: Callable[[Path], None]
) -> None:
    models.simple_model(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    damage(directory / "params_shard_1.bin")
    assert not ndcache.is_cached(server.url)
    with pytest.raises(ndcache.OfflineError) as caught:
        ndcache.load(server.url, offline=True)
    assert caught.value.missing == ("params_shard_1.bin",)


def test_row_31_flipped_bits(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    flip(directory / "params_shard_1.bin")
    report = ndcache.verify(server.url)
    assert not report.ok
    assert (report.bad, report.missing) == (("params_shard_1.bin",), ())
    assert report.checked == {f"params_shard_{n}.bin": "md5" for n in (0, 2, 3)}
    assert ndcache.verify(server.url).missing == ("params_shard_1.bin",)
    assert_same(ndcache.load(server.url), arrays)
    assert ndcache.verify(server.url).ok

    flip(directory / "params_shard_3.bin")
    server.requests.clear()
    assert_same(ndcache.load(server.url, verify="always"), arrays)
    assert [request.path for request in server.shard_requests()] == ["/params_shard_3.bin"]


def test_a_cache_whose_metadata_is_lost_is_checked_once_and_used(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    shutil.rmtree(directory / ".ndcache")
    flip(directory / "params_shard_2.bin")
    server.requests.clear()
    assert_same(ndcache.load(server.url), arrays)
    assert [request.path for request in server.shard_requests()] == ["/params_shard_2.bin"]


def test_row_11_only_what_changed_is_fetched_again(model: Path, serve: Serve) -> None:
    models.simple_model(model)
    server = serve(model)
    ndcache.load(server.url)
    arrays = models.simple_model(model)
    arrays["layer.2"] = models.random_array(arrays["layer.2"].shape, seed=99)
    models.write_model(model, [{name: array} for name, array in arrays.items()])
    server.requests.clear()
    assert_same(ndcache.load(server.url), arrays)
    assert [request.path for request in server.shard_requests()] == ["/params_shard_2.bin"]


def test_row_11_without_digests_a_changed_manifest_fetches_all_again(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    models.write_model(model, [{name: array} for name, array in arrays.items()], md5=False)
    server = serve(model)
    assert ndcache.load(server.url).stats.integrity == {"size": 4}
    changed = {name: array + 1 for name, array in arrays.items()}
    models.write_model(model, [{name: array} for name, array in changed.items()], md5=False, metadata={"version": 2})
    assert_same(ndcache.load(server.url), changed)
    server.requests.clear()
    assert_same(ndcache.load(server.url), changed)
    assert server.shard_requests() == []


def test_row_11_without_digests_size_and_etag_tell_what_changed(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    models.write_model(model, [{name: array} for name, array in arrays.items()], md5=False)
    server = serve(model)
    ndcache.load(server.url)
    arrays["layer.1"] = arrays["layer.1"] + 1  # the same size, another ETag
    arrays["layer.2"] = arrays["layer.2"][:100]  # another size
    models.write_model(model, [{name: array} for name, array in arrays.items()], md5=False, metadata={"version": 2})
    server.requests.clear()
    weights = ndcache.load(server.url)
    assert_same(weights, arrays)
    assert weights.stats.network_bytes == arrays["layer.1"].nbytes + arrays["layer.2"].nbytes
    asked = {request.path: request.headers.get("if-none-match") for request in server.shard_requests()}
    assert len(server.shard_requests()) == 4
    assert all(etag for path, etag in asked.items() if path != "/params_shard_2.bin")


def test_row_11_a_changed_digest_counts_with_verify_never_too(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    ndcache.load(server.url, verify="never")
    changed = {name: array + 1 for name, array in arrays.items()}
    models.write_model(model, [{name: array} for name, array in changed.items()])
    reports: list[ndcache.ProgressReport] = []
    assert_same(ndcache.load(server.url, verify="never", progress=reports.append), changed)
    assert not reports[0].cache_only


def test_a_manifest_that_was_edited_here_is_asked_for_anew(model: Path, serve: Serve) -> None:
    models.write_model(model, [{"a": models.random_array((4,))}], metadata={"version": 1})
    server = serve(model)
    path = ndcache.fetch(server.url) / "tensor-cache.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 666'))
    assert ndcache.load(server.url).metadata == {"version": 1}


def test_a_manifest_that_another_process_replaces_meanwhile(
    model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    ndcache.fetch(server.url)
    changed = {name: array + 1 for name, array in arrays.items()}
    models.write_model(model, [{name: array} for name, array in changed.items()], metadata={"version": 2})
    ask = ManifestSource._request

    def overtaken(self: ManifestSource, *args: Any) -> Any:
        monkeypatch.setattr(ManifestSource, "_request", ask)
        ndcache.fetch(server.url)  # the old manifest was read, the new one and its ETag are in the cache now
        return ask(self, *args)

    monkeypatch.setattr(ManifestSource, "_request", overtaken)
    assert_same(ndcache.load(server.url), changed)


def test_the_file_that_was_checked_is_the_one_that_is_read(
    model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = models.simple_model(model, shards=1)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    stage = CpuUpload.stage

    def too_late(self: CpuUpload, file: Any, segment: Segment) -> Any:
        (directory / "new").write_bytes(bytes(1 << 16))
        os.replace(directory / "new", directory / "params_shard_0.bin")
        return stage(self, file, segment)

    monkeypatch.setattr(CpuUpload, "stage", too_late)
    assert_same(ndcache.load(server.url, verify="always"), arrays)


def test_row_32_deleting_while_another_loads(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model, shards=8)
    server = serve(model)
    server.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(ndcache.load, server.url, max_workers=2)
        wait_until(lambda: len(server.shard_requests()) == 2)
        ndcache.delete(server.url)
        server.gate.set()
        assert_same(loading.result(60), arrays)


def test_an_update_while_many_load(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model, shards=10, shard_bytes=4096)
    server = serve(model)
    ndcache.fetch(server.url)
    for version in range(4):
        arrays = {name: array + 1 for name, array in arrays.items()}
        models.write_model(model, [{name: array} for name, array in arrays.items()], metadata={"version": version})
        start = threading.Barrier(4)

        def load(start: threading.Barrier = start) -> ndcache.Weights[Any]:
            start.wait(30)
            return ndcache.load(server.url)

        with ThreadPoolExecutor(4) as pool:
            for loading in [pool.submit(load) for _ in range(4)]:
                assert_same(loading.result(60), arrays)


def test_is_cached_and_delete(model: Path, serve: Serve, cache_dir: Path) -> None:
    models.simple_model(model)
    server = serve(model)
    assert not ndcache.is_cached(server.url)
    ndcache.read_manifest(server.url)
    assert not ndcache.is_cached(server.url)
    directory = ndcache.fetch(server.url)
    assert ndcache.is_cached(server.url)
    assert not ndcache.is_cached(server.url, scope="other")
    assert ndcache.delete(server.url) > 4 << 16
    assert not directory.exists()
    assert ndcache.delete(server.url) == 0
    with pytest.raises(ndcache.NotFoundError, match="not in the cache"):
        ndcache.verify(server.url)
    with pytest.raises(ndcache.UnsafeCacheError):
        ndcache.delete(model)
    assert model.exists()
    assert ndcache.delete(ndcache.fetch(server.url)) > 4 << 16
    assert published(cache_dir) == []


def test_a_manifest_that_changes_while_cached_models_are_read(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    before = ndcache.load(server.url)
    models.write_model(model, [{name: array + 1} for name, array in arrays.items()])
    after = ndcache.load(server.url)
    assert_same(before, arrays)  # its maps are of the old files
    assert_same(after, {name: array + 1 for name, array in arrays.items()})


def test_scopes_are_apart(model: Path, serve: Serve, cache_dir: Path) -> None:
    models.simple_model(model, shards=1)
    server = serve(model)
    for scope in ("a", "webllm/model"):
        ndcache.fetch(server.url, scope=scope)
    assert sorted(path.name for path in cache_dir.glob("[!.]*")) == ["CACHEDIR.TAG", "a", "webllm%2Fmodel"]
