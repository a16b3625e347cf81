"""The whole way, from a server to arrays: what is fetched, when, and what is left."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import requests
from servers import FileServer, ScriptedServer, reply, then_close

import ndcache
from ndcache.devices.cpu import CpuDevice
from ndcache.remote import RemoteModel

Serve = Callable[..., FileServer]
QUICK = ndcache.RetryPolicy(retries=1, backoff=0.001)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


def assert_same(weights: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    assert list(weights) == list(arrays)
    for name, array in arrays.items():
        loaded = np.asarray(weights[name])
        assert loaded.dtype == array.dtype, name
        assert loaded.shape == array.shape, name
        assert loaded.tobytes() == array.tobytes(), name


def published(cache_dir: Path) -> list[str]:
    """The files in the cache that have a real name."""
    return sorted(path.name for path in cache_dir.rglob("*") if path.is_file() and ".ndcache" not in path.parts)


def parts(cache_dir: Path) -> list[Path]:
    return list(cache_dir.rglob(".ndcache/parts/*"))


# --- the main job -------------------------------------------------------------------------------------


def test_load_over_http_then_from_cache(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model, shards=5)
    server = serve(model)
    weights = ndcache.load(server.url)
    assert_same(weights, arrays)
    assert weights.device == "cpu"
    assert weights.nbytes == sum(array.nbytes for array in arrays.values())
    stats = weights.stats
    assert (stats.network_bytes, stats.cache_bytes, stats.shards, stats.tensors) == (5 << 16, 0, 5, 5)
    assert (stats.requests, stats.retries, stats.integrity) == (6, 0, {"md5": 5})

    server.requests.clear()
    again = ndcache.load(server.url)
    assert_same(again, arrays)
    # One conditional request for the manifest, none for shards.
    assert [request.path for request in server.requests] == ["/tensor-cache.json"]
    assert "if-none-match" in server.requests[0].headers
    assert (again.stats.network_bytes, again.stats.cache_bytes) == (0, 5 << 16)


def test_raw_records_are_read_only_views_of_the_cached_file(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=1)
    weights = ndcache.load(serve(model).url)
    array = weights["layer.0"]
    assert type(array) is np.ndarray
    assert not array.flags.writeable
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    weights.close()
    assert array.sum() == array.copy().sum()  # what is still referred to stays valid


@pytest.mark.parametrize("as_url", [True, False])
def test_a_local_directory_is_read_in_place(model: Path, cache_dir: Path, as_url: bool) -> None:
    arrays = models.simple_model(model)
    before = sorted(path.name for path in model.iterdir())
    weights = ndcache.load(model.as_uri() if as_url else model)
    assert_same(weights, arrays)
    assert weights.stats.integrity == {"size": 4}
    assert ndcache.fetch(model) == model
    assert ndcache.is_cached(model)
    assert sorted(path.name for path in model.iterdir()) == before
    assert not cache_dir.exists()


def test_what_fetch_leaves_is_a_model_directory(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    directory = ndcache.fetch(serve(model).url)
    assert_same(ndcache.load(directory), arrays)
    for path in model.iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("manifest_name", ["ndarray-cache.json", "tensor-cache-b16.json"])
def test_manifests_by_other_names(model: Path, serve: Serve, manifest_name: str) -> None:
    array = models.random_array((10,))
    models.write_model(model, [{"a": array}], manifest_name=manifest_name)
    url = serve(model).url
    weights = ndcache.load(url if manifest_name == "ndarray-cache.json" else url + manifest_name)
    assert_same(weights, {"a": array})
    assert weights.manifest.name == manifest_name


def test_the_newest_manifest_name_is_tried_first(model: Path, serve: Serve) -> None:
    models.write_model(model, [{"old": models.random_array((1,))}], manifest_name="ndarray-cache.json")
    models.write_model(model, [{"new": models.random_array((1,))}], manifest_name="tensor-cache.json")
    assert list(ndcache.load(serve(model).url)) == ["new"]


def test_hugging_face_sources(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = models.simple_model(tmp_path / "owner" / "name" / "resolve" / "v1")
    server = serve(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert_same(ndcache.load("hf://owner/name@v1"), arrays)
    assert_same(ndcache.load(f"{server.url}owner/name/tree/v1"), arrays)
    assert {request.headers.get("authorization") for request in server.requests} == {"Bearer hf_secret"}


def test_the_token_goes_nowhere_else(model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    models.simple_model(model)
    server = serve(model)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ndcache.load(server.url)
    assert not [request for request in server.requests if "authorization" in request.headers]


def test_a_query_goes_with_every_request_and_not_into_the_cache(model: Path, serve: Serve, cache_dir: Path) -> None:
    models.simple_model(model)
    server = serve(model)
    ndcache.load(f"{server.url}?sig=secret")
    assert {request.target.partition("?")[2] for request in server.requests} == {"sig=secret"}
    for path in cache_dir.rglob("*"):
        assert "secret" not in path.name
        assert not path.is_file() or b"secret" not in path.read_bytes()


# --- order, parallelism, look-ahead -------------------------------------------------------------------


def test_never_more_bodies_than_workers(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=12)
    server = serve(model)
    server.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(ndcache.load, server.url, max_workers=3)
        wait_until(lambda: server.peak_bodies == 3)
        server.gate.set()
        loading.result(60)
    assert server.peak_bodies == 3


def test_one_worker_fetches_one_after_another_in_order(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=12)
    server = serve(model)
    ndcache.load(server.url, max_workers=1)
    assert server.peak_bodies == 1
    assert [request.path for request in server.shard_requests()] == [f"/params_shard_{n}.bin" for n in range(12)]


def test_streamed_tensors_come_before_later_shards_do(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model, shards=6)
    server = serve(model)
    seen: dict[str, np.ndarray[Any, Any]] = {}
    for name, tensor in ndcache.stream(server.url, max_workers=1, memory_limit=1 << 16):
        seen[name] = tensor
        # The look-ahead is one shard: no later one has been asked for.
        assert len(server.shard_requests()) == len(seen)
    assert_same(seen, arrays)


def test_a_stream_that_is_left_stops_fetching(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=50)
    server = serve(model)
    stream = ndcache.stream(server.url, max_workers=1, memory_limit=1)
    next(stream)
    del stream
    assert len(server.shard_requests()) == 1


def test_a_stream_says_at_once_what_it_can_know(tmp_path: Path) -> None:
    with pytest.raises(ndcache.NotFoundError):
        ndcache.stream(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="device is"):
        ndcache.stream(tmp_path, device="gpuu")


def test_names_choose_tensors_and_shards(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model, shards=12)
    server = serve(model)
    weights = ndcache.load(server.url, names=["layer.3", "layer.1?"])
    assert list(weights) == ["layer.3", "layer.10", "layer.11"]
    assert sorted(request.path for request in server.shard_requests()) == [
        f"/params_shard_{n}.bin" for n in (10, 11, 3)
    ]
    assert not ndcache.is_cached(server.url)
    assert list(ndcache.load(server.url, names=lambda name: name.endswith("7"))) == ["layer.7"]
    with pytest.raises(KeyError, match=r"matches 'layer\.99'"):
        ndcache.load(server.url, names="layer.99")
    assert_same(ndcache.load(server.url), arrays)
    assert len(server.shard_requests()) == 12


# --- reports ------------------------------------------------------------------------------------------


def test_reports_are_those_of_web_llm(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=3, shard_bytes=1 << 20)
    server = serve(model)
    reports: list[ndcache.ProgressReport] = []
    threads: set[threading.Thread] = set()

    def callback(report: ndcache.ProgressReport) -> None:
        reports.append(report)
        threads.add(threading.current_thread())

    ndcache.load(server.url, progress=callback)
    assert threads == {threading.current_thread()}
    assert [report.text.partition(" secs")[0].rpartition(",")[0] for report in reports] == [
        "",
        "Fetching param cache[0/3]: 0MB fetched. 0% completed",
        "Fetching param cache[1/3]: 1MB fetched. 33% completed",
        "Fetching param cache[2/3]: 2MB fetched. 66% completed",
        "Fetching param cache[3/3]: 3MB fetched. 100% completed",
    ]
    assert reports[0].text == "Start to fetch params"
    assert [report.progress for report in reports] == [0, 0, 1 / 3, 2 / 3, 1]
    assert not any(report.cache_only for report in reports)

    reports.clear()
    ndcache.load(server.url, progress=callback)
    assert reports[-1].text.startswith("Loading model from cache[3/3]: 3MB loaded. 100% completed, ")
    assert all(report.cache_only for report in reports)


def test_row_39_an_error_of_a_callback_is_the_one_raised(model: Path, serve: Serve, cache_dir: Path) -> None:
    models.simple_model(model, shards=4)
    server = serve(model)

    def callback(report: ndcache.ProgressReport) -> None:
        if report.shards_done == 2:
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        ndcache.load(server.url, progress=callback, max_workers=1)
    assert parts(cache_dir) == []
    assert "params_shard_1.bin" in published(cache_dir)


# --- the cache ----------------------------------------------------------------------------------------


def test_row_31_a_cached_shard_of_the_wrong_size_is_fetched_again(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    os.truncate(directory / "params_shard_1.bin", 100)
    with open(directory / "params_shard_2.bin", "ab") as file:
        file.write(b"more")
    assert not ndcache.is_cached(server.url)
    server.requests.clear()
    assert_same(ndcache.load(server.url), arrays)
    assert len(server.shard_requests()) == 2
    aside = sorted((directory / ".ndcache" / "aside").iterdir())
    assert [path.name for path in aside] == ["params_shard_1.bin", "params_shard_2.bin"]


def flip(path: Path) -> None:
    """Change a bit behind the back of whoever looks at size and time only."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


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


def test_flipped_bits_in_a_local_directory(model: Path) -> None:
    models.simple_model(model)
    flip(model / "params_shard_1.bin")
    assert ndcache.verify(model).bad == ("params_shard_1.bin",)
    assert (model / "params_shard_1.bin").exists()
    with pytest.raises(ndcache.ChecksumError, match="params_shard_1"):
        ndcache.load(model, verify="always")


@pytest.mark.parametrize("damage", ["short", "long", "missing"])
def test_a_local_directory_that_is_not_whole(model: Path, damage: str) -> None:
    models.simple_model(model)
    path = model / "params_shard_1.bin"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "short" else path.read_bytes() + b"x")
    with pytest.raises((ndcache.SizeMismatchError, ndcache.NotFoundError), match="params_shard_1"):
        ndcache.load(model)
    assert not ndcache.is_cached(model)


def test_a_cache_whose_validators_are_lost_is_checked_once_and_used(model: Path, serve: Serve) -> None:
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
    ask = RemoteModel._request_manifest

    def overtaken(self: RemoteModel, *args: Any) -> ndcache.Manifest:
        monkeypatch.setattr(RemoteModel, "_request_manifest", ask)
        ndcache.fetch(server.url)  # the old manifest was read, the new one and its ETag are in the cache now
        return ask(self, *args)

    monkeypatch.setattr(RemoteModel, "_request_manifest", overtaken)
    assert_same(ndcache.load(server.url), changed)


@pytest.mark.parametrize(("old", "new"), [("ndarray", "tensor"), ("tensor", "ndarray")])
def test_a_manifest_that_was_renamed_is_found(model: Path, serve: Serve, old: str, new: str) -> None:
    models.write_model(model, [{"old": models.random_array((4,))}], manifest_name=f"{old}-cache.json")
    server = serve(model)
    ndcache.load(server.url)
    (model / f"{old}-cache.json").unlink()
    models.write_model(model, [{"new": models.random_array((4,), seed=1)}], manifest_name=f"{new}-cache.json")
    assert list(ndcache.load(server.url)) == ["new"]
    server.requests.clear()
    assert list(ndcache.load(server.url)) == ["new"]
    assert [request.path for request in server.requests] == [f"/{new}-cache.json"]


def test_the_file_that_was_checked_is_the_one_that_is_read(
    model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = models.simple_model(model, shards=1)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    stage = CpuDevice.stage

    def too_late(self: CpuDevice, file: Any, shard: ndcache.Shard) -> Any:
        (directory / "new").write_bytes(bytes(1 << 16))
        os.replace(directory / "new", directory / "params_shard_0.bin")
        return stage(self, file, shard)

    monkeypatch.setattr(CpuDevice, "stage", too_late)
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

        def load(start: threading.Barrier = start) -> ndcache.Weights:
            start.wait(30)
            return ndcache.load(server.url)

        with ThreadPoolExecutor(4) as pool:
            for loading in [pool.submit(load) for _ in range(4)]:
                assert_same(loading.result(60), arrays)


def test_row_34_without_the_server_the_cache_serves_with_a_warning(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    ndcache.load(server.url)
    server.close()
    with pytest.warns(RuntimeWarning, match="using the cached manifest"):
        assert_same(ndcache.load(server.url), arrays)


@pytest.mark.parametrize("how", ["option", "NDCACHE_OFFLINE", "HF_HUB_OFFLINE"])
def test_row_33_offline(model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    server.requests.clear()
    if how != "option":
        monkeypatch.setenv(how, "1")
    options = {"offline": True} if how == "option" else {}
    assert_same(ndcache.load(server.url, **options), arrays)
    (directory / "params_shard_1.bin").unlink()
    (directory / "params_shard_3.bin").unlink()
    with pytest.raises(ndcache.OfflineError, match=r"params_shard_1\.bin") as caught:
        ndcache.load(server.url, **options)
    assert caught.value.missing == ("params_shard_1.bin", "params_shard_3.bin")
    with pytest.raises(ndcache.OfflineError):
        ndcache.load("http://nowhere.invalid/", **options)
    assert server.requests == []


def test_row_30_a_read_only_cache_still_serves(model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    ndcache.fetch(server.url)

    def refuse(*_: object, **__: object) -> Any:
        raise PermissionError(30, "Read-only file system")

    # Root may write anywhere, so the system call itself must refuse.
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    assert_same(ndcache.load(server.url), arrays)


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


def test_connections_are_reused(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=6)
    server = serve(model)
    with ndcache.Loader(max_workers=1) as loader:
        loader.load(server.url)
        loader.delete(server.url)
        loader.load(server.url)
    assert len({request.headers["x-test-peer"] for request in server.requests}) == 1


def test_a_session_of_the_callers_is_used(model: Path, serve: Serve) -> None:
    models.simple_model(model)
    server = serve(model)
    with requests.Session() as session:
        session.headers["X-Api-Key"] = "mine"
        ndcache.load(server.url, session=session)
        assert session.get(server.url + "tensor-cache.json").ok  # it was not closed
    assert {request.headers.get("x-api-key") for request in server.requests} == {"mine"}


def test_loads_from_many_threads_at_once(tmp_path: Path, serve: Serve) -> None:
    arrays = [models.simple_model(tmp_path / "www" / str(n), shards=3) for n in range(3)]
    server = serve(tmp_path / "www")
    with ndcache.Loader(max_workers=4) as loader, ThreadPoolExecutor(9) as pool:
        loads = [pool.submit(loader.load, f"{server.url}{n % 3}/") for n in range(9)]
        for n, load in enumerate(loads):
            assert_same(load.result(60), arrays[n % 3])


# --- failures -----------------------------------------------------------------------------------------


def test_a_missing_model_names_what_was_looked_for(scripted: ScriptedServer) -> None:
    with pytest.raises(ndcache.NotFoundError, match=r"tensor-cache\.json or ndarray-cache\.json") as caught:
        ndcache.load(scripted.url)
    assert caught.value.status == 404
    assert [request.path for request in scripted.requests] == ["/tensor-cache.json", "/ndarray-cache.json"]


@pytest.mark.parametrize("status", [401, 403])
def test_row_16_one_request_and_no_more(scripted: ScriptedServer, status: int) -> None:
    scripted.script["/tensor-cache.json"] = [reply(status)]
    with pytest.raises(ndcache.AuthError):
        ndcache.load(scripted.url)
    assert len(scripted.requests) == 1


@pytest.mark.parametrize(
    ("manifest", "error"),
    [
        (b"<!doctype html><p>Sign in", ndcache.ManifestSyntaxError),
        (b'{"records": [{"dataPath": "../../x", "nbytes": 0, "records": []}]}', ndcache.UnsafePathError),
        (b'{"records": [{"dataPath": "x", "nbytes": -1, "records": []}]}', ndcache.ManifestLayoutError),
    ],
)
def test_a_bad_manifest_is_not_kept_and_no_shard_asked_for(
    scripted: ScriptedServer, cache_dir: Path, manifest: bytes, error: type[ndcache.ManifestError]
) -> None:
    scripted.script["/tensor-cache.json"] = [reply(200, manifest)]
    with pytest.raises(error):
        ndcache.load(scripted.url)
    assert len(scripted.requests) == 1
    assert published(cache_dir) == []


def test_row_22_an_endless_manifest(scripted: ScriptedServer) -> None:
    def endless(connection: Any, request: Any) -> None:
        connection.send(reply(200, b'{"records": [', length=None))
        while True:
            connection.send(b" " * (1 << 20))

    scripted.script["/tensor-cache.json"] = [endless]
    with pytest.raises(ndcache.ManifestLimitError, match="64 MiB"):
        ndcache.load(scripted.url)


def test_a_manifest_cut_short_is_asked_for_again(model: Path, scripted: ScriptedServer) -> None:
    manifest = json.dumps(models.write_model(model, [])).encode()
    scripted.script["/tensor-cache.json"] = [
        then_close(reply(200, manifest[:5], length=len(manifest))),
        reply(200, manifest),
    ]
    assert len(ndcache.load(scripted.url, retries=QUICK)) == 0


def test_row_24_unknown_dtypes_matter_when_they_are_asked_for(model: Path, serve: Serve) -> None:
    array = models.random_array((8,))
    manifest = models.write_model(model, [{"good": array, "odd": array}])
    manifest["records"][0]["records"][1]["dtype"] = "int3"
    (model / "tensor-cache.json").write_text(json.dumps(manifest))
    server = serve(model)
    with pytest.raises(ndcache.UnsupportedDtypeError, match="'odd'"):
        ndcache.load(server.url)
    assert server.shard_requests() == []
    assert_same(ndcache.load(server.url, names="good"), {"good": array})


def test_one_shard_that_fails_stops_the_rest(model: Path, serve: Serve, cache_dir: Path) -> None:
    models.simple_model(model, shards=40)
    server = serve(model)
    server.status["/params_shard_5.bin"] = 404
    with pytest.raises(ndcache.NotFoundError) as caught:
        ndcache.load(server.url, max_workers=2)
    assert caught.value.shard == "params_shard_5.bin"
    assert len(server.shard_requests()) < 20
    assert parts(cache_dir) == []
    del server.status["/params_shard_5.bin"]
    kept = len([name for name in published(cache_dir) if name.endswith(".bin")])
    weights = ndcache.load(server.url)
    assert len(weights) == 40
    assert weights.stats.cache_bytes == kept << 16


def test_a_mirror_is_told_nothing_of_the_session(tmp_path: Path, serve: Serve) -> None:
    arrays = models.simple_model(tmp_path / "www")
    origin, mirror = serve(tmp_path / "www"), serve(tmp_path / "www")
    origin.status |= {f"/params_shard_{n}.bin": 404 for n in range(4)}
    with requests.Session() as session:
        session.headers.update({"Authorization": "Bearer secret", "X-Key": "secret"})
        url = mirror.url.replace("//", "//user:own@")
        assert_same(ndcache.load(origin.url, session=session, mirrors=[url]), arrays)
    assert {request.headers["authorization"] for request in origin.requests} == {"Bearer secret"}
    assert {request.headers["authorization"] for request in mirror.requests} == {"Basic dXNlcjpvd24="}
    assert not any("x-key" in request.headers for request in mirror.requests)


def test_a_stream_left_open_at_exit(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=3)
    server = serve(model)
    server.stalled = {"/params_shard_1.bin", "/params_shard_2.bin"}
    script = f"import ndcache\ns = ndcache.stream({server.url!r}, timeout=600)\nprint(next(s)[0])"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (child.returncode, child.stdout) == (0, "layer.0\n")


def test_a_failing_origin_and_a_mirror(tmp_path: Path, serve: Serve) -> None:
    arrays = models.simple_model(tmp_path / "www")
    origin, mirror = serve(tmp_path / "www"), serve(tmp_path / "www")
    origin.status["/params_shard_2.bin"] = 404
    assert_same(ndcache.load(origin.url, mirrors=[mirror.url]), arrays)
    assert [request.path for request in mirror.requests] == ["/params_shard_2.bin"]


HEADERS = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("where", ["/tensor-cache.json", "/params_shard_0.bin"])
@pytest.mark.parametrize("begun", [b"", HEADERS, reply(200, length=1 << 16)], ids=["status", "headers", "body"])
def test_row_13_a_server_that_drips(model: Path, scripted: ScriptedServer, where: str, begun: bytes) -> None:
    manifest = models.simple_model(model, shards=1) and (model / "tensor-cache.json").read_bytes()
    scripted.script["/tensor-cache.json"] = [reply(200, manifest)]

    def drip(connection: Any, request: Any) -> None:
        connection.send(begun)
        while True:  # more often than any timeout between two bytes could notice
            connection.send(b"x")
            time.sleep(0.05)

    scripted.script[where] = [drip]
    with pytest.raises(ndcache.StallError) as caught:
        ndcache.load(scripted.url, retries=0, timeout=(5, 0.5))
    assert caught.value.retryable


@pytest.mark.parametrize("phase", ["manifest", "silence", "shards"])
def test_row_36_cancel(model: Path, serve: Serve, cache_dir: Path, phase: str) -> None:
    models.simple_model(model, shards=12)
    server = serve(model)
    cancel = threading.Event()
    if phase == "manifest":
        cancel.set()
    server.gate.clear()
    server.gated_manifest = phase == "silence"
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(ndcache.load, server.url, max_workers=3, cancel=cancel)
        if phase != "manifest":
            wait_until(lambda: len(server.requests) == (1 if phase == "silence" else 4))
            cancel.set()
        with pytest.raises(ndcache.CancelledError):
            loading.result(60)
    assert parts(cache_dir) == []
    assert not [name for name in published(cache_dir) if name.endswith(".bin")]


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_row_36_ctrl_c_in_a_script(model: Path, serve: Serve, cache_dir: Path) -> None:
    models.simple_model(model, shards=12)
    server = serve(model)
    server.gate.clear()
    script = f"import ndcache\ntry:\n    ndcache.load({server.url!r})\nfinally:\n    print('cleaned up')"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(server.shard_requests()) == 8)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert output == "cleaned up\n"
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert child.returncode != 0
    assert parts(cache_dir) == []
    assert [name for name in published(cache_dir) if name.endswith(".bin")] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_workers": 0}, "max_workers"),
        ({"memory_limit": 0}, "memory_limit"),
        ({"verify": "sometimes"}, "verify"),
        ({"scope": ""}, "scope"),
        ({"scope": "../x"}, "scope"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": (1, 2, 3)}, "timeout"),
        ({"timeout": (1, "2")}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"cache_dir": ""}, "cache_dir"),
    ],
)
def test_options_have_values_that_make_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ndcache.Loader(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_workers": "3"},
        {"max_workers": True},
        {"memory_limit": "1G"},
        {"verify": None},
        {"scope": 3},
        {"timeout": "3"},
        {"timeout": None},
        {"retries": "3"},
        {"retries": 1.5},
        {"offline": "no"},
        {"session": "x"},
        {"cancel": True},
        {"cache_dir": 3},
    ],
    ids=str,
)
def test_options_have_types(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        ndcache.Loader(**options)


def test_a_mirror_is_a_server(model: Path, serve: Serve) -> None:
    models.simple_model(model)
    with pytest.raises(ValueError, match="mirror"):
        ndcache.load(serve(model).url, mirrors=[str(model)])


def test_names_that_are_nearly_right(model: Path) -> None:
    models.simple_model(model)
    with pytest.raises(KeyError, match=r"did you mean 'layer\.1'"):
        ndcache.load(model, names="layers.1")


def test_weights_are_compared_by_identity_and_not_pickled(model: Path) -> None:
    models.simple_model(model)
    one, other = ndcache.load(model), ndcache.load(model)
    assert one == one
    assert one != other
    assert len({one, other}) == 2
    with pytest.raises(TypeError, match="load them in each process"):
        pickle.dumps(one)


def test_warnings_name_the_callers_line(model: Path, serve: Serve) -> None:
    models.simple_model(model)
    server = serve(model)
    ndcache.load(server.url)
    server.close()
    for load in (ndcache.load, ndcache.Loader().load):
        with pytest.warns(RuntimeWarning) as caught:
            load(server.url)
        assert [warning.filename for warning in caught] == [__file__]


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_worker"):
        ndcache.load("http://host/", max_worker=3)  # type: ignore[call-arg]


def test_scopes_are_apart(model: Path, serve: Serve, cache_dir: Path) -> None:
    models.simple_model(model, shards=1)
    server = serve(model)
    for scope in ("a", "webllm/model"):
        ndcache.fetch(server.url, scope=scope)
    assert sorted(path.name for path in cache_dir.iterdir()) == ["a", "webllm%2Fmodel"]


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that another thread or process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)
