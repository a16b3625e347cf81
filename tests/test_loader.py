"""The whole way, from a server to arrays: what is fetched, when, and what is left."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import errno
import functools
import hashlib
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import requests

import ndcache
from ndcache.devices.cpu import CpuUpload
from ndcache.format.integrity import find_mismatch
from ndcache.sources import verifier
from ndcache.sources.manifest import ManifestSource
from ndcache.workers.cancellation import Cancellation

from .helpers import models
from .helpers.servers import (
    Connection,
    FileServer,
    Request,
    ScriptedServer,
    Step,
    reply,
    then_close,
    then_reset,
    then_stall,
)

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


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def loading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ndcache")]


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


def test_row_40_the_token_goes_nowhere_else(model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    models.simple_model(model)
    server = serve(model)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ndcache.load(server.url)
    assert not [request for request in server.requests if "authorization" in request.headers]


def test_row_40_a_query_goes_along_and_not_into_the_cache(model: Path, serve: Serve, cache_dir: Path) -> None:
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
    with pytest.raises(ValueError, match="device must be"):
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


KINDS_OF_REPORTS: dict[str, Callable[[ndcache.ProgressReport], bool]] = {
    "start": lambda report: report.phase == "start",
    "none done": lambda report: report.phase != "start" and report.shards_done == 0,
    "some done": lambda report: report.shards_done == 2,
    "all done": lambda report: report.shards_done == 4,
}


@pytest.mark.parametrize("kind", KINDS_OF_REPORTS)
@pytest.mark.parametrize("is_cached", [False, True], ids=["fetched", "cached"])
@pytest.mark.parametrize("raised", [LookupError, ndcache.ConnectError, SystemExit, StopIteration, GeneratorExit])
def test_row_39_an_error_of_a_callback_is_the_one_raised(
    model: Path, serve: Serve, cache_dir: Path, kind: str, is_cached: bool, raised: type[BaseException]
) -> None:
    models.simple_model(model, shards=4)
    error = raised("mine")
    server = serve(model)
    if is_cached:
        ndcache.fetch(server.url)
    told: list[ndcache.ProgressReport] = []

    def callback(report: ndcache.ProgressReport) -> None:
        told.append(report)
        if KINDS_OF_REPORTS[kind](report):
            raise error

    with pytest.raises(type(error)) as caught:
        ndcache.load(server.url, progress=callback, max_workers=1)
    assert caught.value is error
    assert KINDS_OF_REPORTS[kind](told[-1])  # it is told nothing more
    assert told[-1].cache_only == is_cached
    assert not loading_threads()
    assert {f"params_shard_{n}.bin" for n in range(told[-1].shards_done)} <= set(published(cache_dir))


def test_row_39_a_predicate_of_the_callers_that_raises(model: Path, serve: Serve) -> None:
    models.simple_model(model)
    server = serve(model)
    error = LookupError("mine")

    def names(name: str) -> bool:
        raise error

    with pytest.raises(LookupError) as caught:
        ndcache.load(server.url, names=names)
    assert caught.value is error
    assert server.shard_requests() == []


@pytest.mark.parametrize("where", ["progress", "names", "cancel"])
@pytest.mark.parametrize("verb", ["load", "fetch"])
def test_row_39_a_stop_iteration_is_the_exception_raised(model: Path, serve: Serve, where: str, verb: str) -> None:
    models.simple_model(model)
    server, error = serve(model), StopIteration("mine")

    def fail(*_: Any, **__: Any) -> bool:
        raise error

    option: Any = fail
    if where == "cancel":
        option = threading.Event()
        option.is_set = fail
    with pytest.raises(StopIteration) as caught:
        getattr(ndcache, verb)(server.url, **{where: option})
    assert caught.value is error
    assert not loading_threads()


def test_row_39_a_stop_iteration_does_not_end_a_stream_silently(model: Path, serve: Serve) -> None:
    models.simple_model(model)
    error = StopIteration("mine")

    def fail(report: ndcache.ProgressReport) -> None:
        if report.shards_done:
            raise error

    with pytest.raises(RuntimeError) as caught:
        list(ndcache.stream(serve(model).url, progress=fail))
    assert caught.value.__cause__ is error


# --- the cache ----------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Change a bit behind the back of whoever looks at size and time only."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncate(path: Path) -> None:
    os.truncate(path, 100)


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
def test_row_31_damage_is_noticed_set_aside_and_fetched_again(
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


def test_row_31_flipped_bits_in_a_local_directory(model: Path) -> None:
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


@pytest.mark.parametrize(("old", "new"), [("ndarray", "tensor"), ("tensor", "ndarray")])
def test_row_34_a_manifest_that_was_renamed_is_found(model: Path, serve: Serve, old: str, new: str) -> None:
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
    stage = CpuUpload.stage

    def too_late(self: CpuUpload, file: Any, shard: ndcache.Shard) -> Any:
        (directory / "new").write_bytes(bytes(1 << 16))
        os.replace(directory / "new", directory / "params_shard_0.bin")
        return stage(self, file, shard)

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


def test_row_34_without_the_server_the_cache_serves_with_a_warning(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    ndcache.load(server.url)
    server.close()
    with pytest.warns(RuntimeWarning, match="using the cached manifest"):
        assert_same(ndcache.load(server.url), arrays)


VERBS: dict[str, Callable[..., Any]] = {
    "load": ndcache.load,
    "stream": lambda url, **options: dict(ndcache.stream(url, **options)),
    "fetch": ndcache.fetch,
    "read_manifest": ndcache.read_manifest,
}


@pytest.mark.parametrize("verb", VERBS)
def test_row_34_everything_cached(model: Path, serve: Serve, verb: str) -> None:
    models.simple_model(model)
    server = serve(model)
    ndcache.fetch(server.url)
    etag = f'"{hashlib.md5((model / "tensor-cache.json").read_bytes()).hexdigest()}"'
    server.requests.clear()
    VERBS[verb](server.url)
    assert [(request.path, request.headers.get("if-none-match")) for request in server.requests] == [
        ("/tensor-cache.json", etag)
    ]
    server.requests.clear()
    VERBS[verb](server.url, offline=True)
    assert ndcache.is_cached(server.url)
    assert ndcache.verify(server.url).ok
    assert server.requests == []


@pytest.mark.parametrize("verb", ["load", "fetch"])
@pytest.mark.parametrize(
    "step",
    [
        reply(401),
        reply(429, headers={"Retry-After": "100"}),
        reply(500),
        reply(302, headers={"Location": "/tensor-cache.json"}),
        then_close(b""),
        then_close(reply(200, b'{"records": [', length=1000)),
        then_reset(b""),
        then_stall(b""),
    ],
)
def test_row_34_one_request_that_fails_and_the_cache_serves(
    model: Path, scripted: ScriptedServer, verb: str, step: Any
) -> None:
    arrays = models.simple_model(model)
    scripted.script = {f"/{path.name}": [reply(200, path.read_bytes())] for path in model.iterdir()}
    ndcache.fetch(scripted.url)
    scripted.requests.clear()
    scripted.script = {"/tensor-cache.json": [step]}
    with pytest.warns(RuntimeWarning, match="using the cached manifest"):
        result = VERBS[verb](scripted.url, timeout=(30, 0.3))
    assert [request.path for request in scripted.requests] == ["/tensor-cache.json"]
    assert_same(result if verb == "load" else ndcache.load(result), arrays)


@pytest.mark.parametrize("how", ["option", "NDCACHE_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("verb", VERBS)
def test_row_33_offline(model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, how: str, verb: str) -> None:
    models.simple_model(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    server.requests.clear()
    touched: list[str] = []
    for of, name in ((socket, "getaddrinfo"), (socket, "create_connection"), (socket.socket, "connect")):
        monkeypatch.setattr(of, name, lambda *args, name=name, **_: touched.append(name))
    if how != "option":
        monkeypatch.setenv(how, "1")
    options = {"offline": True} if how == "option" else {}
    VERBS[verb](server.url, **options)
    (directory / "params_shard_1.bin").unlink()
    os.truncate(directory / "params_shard_3.bin", 100)
    if verb == "read_manifest":
        VERBS[verb](server.url, **options)
    else:
        with pytest.raises(ndcache.OfflineError, match=r"params_shard_1\.bin, params_shard_3\.bin") as caught:
            VERBS[verb](server.url, **options)
        assert caught.value.missing == ("params_shard_1.bin", "params_shard_3.bin")
    for source in ("http://nowhere.invalid/", "hf://owner/name"):
        with pytest.raises(ndcache.OfflineError) as caught:
            VERBS[verb](source, **options)
        assert caught.value.missing == ("tensor-cache.json",)
    assert touched == []
    assert server.requests == []


def test_row_30_a_read_only_cache_still_serves(model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    ndcache.fetch(server.url)

    def refuse(*_: object, **__: object) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    def read_only(path: Any, flags: int, *others: Any, **folder: Any) -> int:
        return refuse() if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else open_file(path, flags, *others, **folder)

    # Root may write anywhere, so the system call itself must refuse.
    open_file = os.open
    monkeypatch.setattr(os, "open", read_only)
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


def scripted_model(scripted: ScriptedServer, model: Path, shards: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """Have the server give every file of a model; some will get another script."""
    arrays = models.simple_model(model, shards=shards)
    scripted.script = {
        f"/{path.name}": [reply(200, path.read_bytes(), {"ETag": f'"{path.name}"'})] for path in model.iterdir()
    }
    return arrays


WHERE = ["/tensor-cache.json", "/params_shard_0.bin"]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, ndcache.AuthError),
        (403, ndcache.AuthError),
        (404, ndcache.NotFoundError),
        (410, ndcache.NotFoundError),
    ],
)
def test_row_16_one_request_and_no_more(
    model: Path, scripted: ScriptedServer, where: str, status: int, error: type[ndcache.TransferError]
) -> None:
    scripted_model(scripted, model)
    scripted.script[where] = [reply(status)]
    with pytest.raises(error) as caught:
        ndcache.load(scripted.url)
    assert type(caught.value) is error
    assert (caught.value.status, caught.value.retryable) == (status, False)
    assert len(scripted.requests_for(where)) == 1
    # The manifest may be there under its other name, unless it is not said who may ask at all.
    other_name = scripted.requests_for("/ndarray-cache.json")
    assert len(other_name) == (where == WHERE[0] and status != 401)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("status", [408, 500, 502, 504])
def test_row_15_a_server_that_fails_is_asked_again(
    model: Path, scripted: ScriptedServer, where: str, status: int
) -> None:
    assert_is_asked_again(model, scripted, where, status)


@pytest.mark.parametrize("where", WHERE)
def test_row_14_so_is_one_that_has_too_much_to_do(model: Path, scripted: ScriptedServer, where: str) -> None:
    assert_is_asked_again(model, scripted, where, 503)


def assert_is_asked_again(model: Path, scripted: ScriptedServer, where: str, status: int) -> None:
    arrays = scripted_model(scripted, model)
    good = scripted.script[where]
    scripted.script[where] = [reply(status), then_close(reply(status)), *good]
    policy = ndcache.RetryPolicy(retries=2, backoff=0.001)
    with ndcache.load(scripted.url, retries=policy) as weights:
        assert_same(weights, arrays)
        assert weights.stats.retries == 2
    ndcache.delete(scripted.url)
    scripted.requests.clear()
    scripted.script[where] = [reply(status)]
    with pytest.raises(ndcache.ServerError) as caught:
        ndcache.load(scripted.url, retries=policy)
    asked = len(scripted.requests_for(where))
    assert (caught.value.status, caught.value.attempts) == (status, asked)
    # What is refused is not counted while the server gives others something.
    assert asked == 3 or (status == 503 and where == WHERE[1] and 3 < asked <= 6)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how many seconds was slept between tries; it takes no time, but the servers' limits know of it."""
    seconds: list[float] = []
    monkeypatch.setattr(Cancellation, "sleep", lambda self, wanted: seconds.append(wanted))
    monkeypatch.setattr("ndcache.http.rate_limits.monotonic", lambda: time.monotonic() + sum(seconds))
    return seconds


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_row_14_retry_after_is_waited_for(
    model: Path, scripted: ScriptedServer, slept: list[float], where: str, status: int, kind: str
) -> None:
    arrays = scripted_model(scripted, model)
    date = int(time.time()) + 120
    value = "120" if kind == "seconds" else email.utils.formatdate(date, usegmt=True)
    scripted.script[where].insert(0, reply(status, headers={"Retry-After": value}))
    assert_same(ndcache.load(scripted.url), arrays)
    (wait,) = slept
    if kind == "seconds":
        assert wait == 120
    else:
        assert date - time.time() <= wait <= 120
    assert len(scripted.requests_for(where)) == 2


def test_row_14_it_is_really_waited_for(model: Path, scripted: ScriptedServer) -> None:
    scripted_model(scripted, model)
    asked: list[float] = []
    good = scripted.script["/params_shard_0.bin"][0]
    assert isinstance(good, bytes)

    def later(connection: Connection, request: Request) -> None:
        asked.append(time.monotonic())
        connection.send(reply(429, headers={"Retry-After": "1"}) if len(asked) == 1 else good)

    scripted.script["/params_shard_0.bin"] = [later]
    ndcache.load(scripted.url)
    first, second = asked
    assert second - first >= 0.99  # the clock of the server is not the one that was slept by


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    "value",
    ["301", "99999999999", "9" * 400, email.utils.formatdate(4e9, usegmt=True), "Fri, 31 Dec 9999 23:59:59 GMT"],
)
def test_row_14_beyond_the_budget_it_is_given_up_at_once(
    model: Path, scripted: ScriptedServer, slept: list[float], where: str, status: int, value: str
) -> None:
    scripted_model(scripted, model)
    scripted.script[where] = [reply(status, headers={"Retry-After": value})]
    with pytest.raises(ndcache.RateLimitedError) as caught:
        ndcache.load(scripted.url)
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 300
    assert len(scripted.requests_for(where)) == 1
    assert slept == []


@pytest.mark.parametrize(
    "value", ["", "soon", "-5", "1e9", "inf", "0x10", "9" * 5000, "Fri, 99 Foo 2026 99:99:99 GMT", "\u0664\u0662"]
)
def test_row_14_garbage_is_no_more_than_the_usual_wait(
    model: Path, scripted: ScriptedServer, slept: list[float], value: str
) -> None:
    arrays = scripted_model(scripted, model)
    answer = reply(429, headers={"Retry-After": value.encode().decode("latin-1")})
    scripted.script["/params_shard_0.bin"][:0] = [answer] * 3
    assert_same(ndcache.load(scripted.url), arrays)
    assert len(slept) == 3
    assert all(0 <= wait <= longest for wait, longest in zip(slept, (0.5, 1, 2), strict=True))


@pytest.mark.parametrize(
    ("manifest", "error"),
    [
        (b'{"records": [{}]}', ndcache.ManifestSyntaxError),
        (b'{"records": [{"dataPath": "../../x", "nbytes": 0, "records": []}]}', ndcache.UnsafePathError),
        (b'{"records": [{"dataPath": "x", "nbytes": -1, "records": []}]}', ndcache.ManifestLayoutError),
    ],
)
def test_row_23_a_bad_manifest_is_not_kept_and_no_shard_asked_for(
    scripted: ScriptedServer, cache_dir: Path, manifest: bytes, error: type[ndcache.ManifestError]
) -> None:
    scripted.script["/tensor-cache.json"] = [reply(200, manifest)]
    with pytest.raises(error):
        ndcache.load(scripted.url)
    assert len(scripted.requests) == 1
    assert published(cache_dir) == []


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "http://host.example/x.bin",
        "//host.example/x.bin",
        "a/../../x.bin",
        "%2e%2e/x.bin",
        "a\\x.bin",
        "C:x.bin",
        "x\0.bin",
        "x\n.bin",
        "\ud800.bin",
        "nul.bin",
        ".ndcache/x.bin",
    ],
    ids=ascii,
)
def test_row_20_no_shard_is_asked_for(model: Path, scripted: ScriptedServer, cache_dir: Path, path: str) -> None:
    array = models.random_array((8,))
    manifest = models.write_model(model, [{"good": array}, {"bad": array}])
    manifest["records"][1]["dataPath"] = path
    scripted.script["/tensor-cache.json"] = [reply(200, json.dumps(manifest).encode())]
    for verb in (ndcache.load, ndcache.fetch, ndcache.read_manifest):
        scripted.requests.clear()
        with pytest.raises(ndcache.UnsafePathError):
            verb(scripted.url)
        assert [request.path for request in scripted.requests] == ["/tensor-cache.json"]
    with pytest.raises(ndcache.UnsafePathError):
        ndcache.load(scripted.url, names="good")
    assert not [entry for entry in cache_dir.rglob("*") if entry.is_file() and entry.name != "source.json"]


LIMIT = 64 << 20


def peak_memory(call: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [None, 1 << 40])
def test_row_22_an_endless_manifest(scripted: ScriptedServer, length: int | None) -> None:
    sent = 0

    def endless(connection: Connection, request: Request) -> None:
        nonlocal sent
        connection.send(reply(200, b'{"records": [', length=length))
        while True:
            connection.send(b" " * (1 << 20))
            sent += 1 << 20

    def load() -> None:
        with pytest.raises(ndcache.ManifestLimitError, match="64 MiB"):
            ndcache.load(scripted.url)

    scripted.script["/tensor-cache.json"] = [endless]
    assert peak_memory(load) < 4 * LIMIT
    assert sent < 2 * LIMIT  # what the sockets hold is no more than some MiB


def test_row_22_an_endless_local_manifest(model: Path) -> None:
    models.simple_model(model)
    os.truncate(model / "tensor-cache.json", 1 << 36)  # a sparse file

    def load() -> None:
        with pytest.raises(ndcache.ManifestLimitError, match="64 MiB"):
            ndcache.load(model)

    assert peak_memory(load) < 4 * LIMIT


def test_a_manifest_cut_short_is_asked_for_again(model: Path, scripted: ScriptedServer) -> None:
    manifest = json.dumps(models.write_model(model, [])).encode()
    scripted.script["/tensor-cache.json"] = [
        then_close(reply(200, manifest[:5], length=len(manifest))),
        reply(200, manifest),
    ]
    assert len(ndcache.load(scripted.url, retries=QUICK)) == 0


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [("dtype", "int3", ndcache.UnsupportedDtypeError), ("format", "zstd", ndcache.UnsupportedFormatError)],
)
def test_row_24_what_is_unknown_matters_when_it_is_asked_for(
    model: Path, serve: Serve, field: str, value: str, error: type[ndcache.DecodeError]
) -> None:
    array = models.random_array((8,))
    manifest = models.write_model(model, [{"good": array, "odd": array}])
    manifest["records"][0]["records"][1][field] = value
    (model / "tensor-cache.json").write_text(json.dumps(manifest))
    server = serve(model)
    with pytest.raises(error, match="'odd'"):
        ndcache.load(server.url)
    assert server.shard_requests() == []
    assert_same(ndcache.load(server.url, names="good"), {"good": array})


def test_row_35_one_shard_that_fails_stops_the_rest(model: Path, serve: Serve, cache_dir: Path) -> None:
    models.simple_model(model, shards=40)
    server = serve(model)
    server.status["/params_shard_5.bin"] = 404
    with pytest.raises(ndcache.NotFoundError) as caught:
        ndcache.load(server.url, max_workers=2)
    assert caught.value.shard == "params_shard_5.bin"
    assert len(server.shard_requests()) < 20
    # Nothing of the shard that failed, and of one that was stopped only what a load can go on from.
    kept_parts = {path.name for path in parts(cache_dir)}
    assert not [name for name in kept_parts if name.startswith("params_shard_5.bin")]
    assert all(
        name.removesuffix(".json") in kept_parts and f"{name.removesuffix('.json')}.json" in kept_parts
        for name in kept_parts
    )
    del server.status["/params_shard_5.bin"]
    kept = len([name for name in published(cache_dir) if name.endswith(".bin")])
    weights = ndcache.load(server.url)
    assert len(weights) == 40
    assert weights.stats.cache_bytes == kept << 16


@pytest.mark.parametrize(("status", "error"), [(404, ndcache.NotFoundError), (500, ndcache.ServerError)])
def test_row_35_what_is_under_way_is_cancelled(
    model: Path, scripted: ScriptedServer, status: int, error: type[ndcache.TransferError]
) -> None:
    scripted_model(scripted, model, shards=20)
    bad, slow = {f"/params_shard_{n}.bin" for n in (1, 2)}, {f"/params_shard_{n}.bin" for n in (3, 4)}
    first_is_done = threading.Event()
    gone: set[str] = set()

    def fail(connection: Connection, request: Request) -> None:
        first_is_done.wait(60)
        connection.send(reply(status))

    def hang(connection: Connection, request: Request) -> None:
        connection.send(reply(200, b"begun", length=1 << 16))
        connection.stall()
        gone.add(request.path)

    scripted.script |= {path: [fail if path in bad else hang] for path in (*bad, *slow)}
    failed_at: list[float] = []

    def callback(report: ndcache.ProgressReport) -> None:
        if report.shards_done == 1:
            # The worker that is free goes on with the fourth; none is free for the fifth before the two have failed.
            wait_until(lambda: bad | slow <= {request.path for request in scripted.requests})
            first_is_done.set()
            failed_at.append(time.monotonic())

    with pytest.raises(error) as caught:
        ndcache.load(scripted.url, progress=callback, max_workers=4, retries=QUICK, timeout=600)
    assert time.monotonic() - failed_at[0] < 20  # and not 600
    assert loading_threads() == []
    wait_until(lambda: gone == slow and scripted.open_connections == 0)
    failed = {caught.value.shard, *(other.shard for other in caught.value.others)}  # the other one, unless cancelled
    assert failed <= {"params_shard_1.bin", "params_shard_2.bin"}
    asked = {request.path for request in scripted.requests}
    assert asked == {"/tensor-cache.json", "/params_shard_0.bin"} | bad | slow


def test_row_19_a_mirror_is_told_nothing_of_the_session(tmp_path: Path, serve: Serve) -> None:
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
    arrays = scripted_model(scripted, model)
    good = scripted.script[where]

    def drip(connection: Any, request: Any) -> None:
        connection.send(begun)
        while True:  # more often than any timeout between two bytes could notice
            connection.send(b"x")
            time.sleep(0.05)

    scripted.script[where] = [drip]
    with pytest.raises(ndcache.StallError) as caught:
        ndcache.load(scripted.url, retries=0, timeout=(5, 0.5))
    assert caught.value.attempts == 1
    scripted.script[where] = [drip, drip, *good]  # the first of them has been
    assert_same(ndcache.load(scripted.url, retries=QUICK, timeout=(5, 0.5)), arrays)
    assert len(scripted.requests_for(where)) == 3


@pytest.fixture
def stop_when(monkeypatch: pytest.MonkeyPatch) -> Callable[..., BaseException | None]:
    """Have a load stopped while the caller's thread waits for its workers; what it raised."""
    looked, look = threading.Event(), Cancellation.poll

    def tell(self: Cancellation) -> None:
        looked.set()
        look(self)

    monkeypatch.setattr(Cancellation, "poll", tell)

    def run(reached: Callable[[], bool], how: str, load: Callable[..., Any]) -> BaseException | None:
        cancel, is_over = threading.Event(), threading.Event()
        pressed: list[float] = []

        def press() -> None:
            wait_until(lambda: is_over.is_set() or reached())
            looked.clear()
            wait_until(lambda: is_over.is_set() or looked.is_set())
            pressed.append(time.monotonic())
            if how == "cancel":
                cancel.set()
            elif not is_over.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        presser = threading.Thread(target=press)
        presser.start()
        error: BaseException | None = None
        try:
            load(cancel=cancel)
        except BaseException as raised:
            error = raised
        is_over.set()
        presser.join()
        assert time.monotonic() - pressed[0] < 15  # nothing of what was waited for ends before
        return error

    return run


HALF = 1 << 15
STOPS = {"cancel": ndcache.CancelledError, "Ctrl-C": KeyboardInterrupt}


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a worker begins to sleep."""
    event, sleep = threading.Event(), Cancellation.sleep

    def tell(self: Cancellation, seconds: float) -> None:
        event.set()
        sleep(self, seconds)

    monkeypatch.setattr(Cancellation, "sleep", tell)
    return event


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize(
    "phase",
    ["the manifest's headers", "the manifest's body", "a shard's headers", "a shard's body", "a retry", "a lock"],
)
def test_row_36_while_it_waits(
    model: Path,
    scripted: ScriptedServer,
    cache_dir: Path,
    asleep: threading.Event,
    stop_when: Callable[..., Any],
    phase: str,
    how: str,
) -> None:
    arrays = scripted_model(scripted, model)
    manifest, shard = WHERE
    good, data = dict(scripted.script), (model / "params_shard_0.bin").read_bytes()
    with contextlib.ExitStack() as while_it_waits:
        if phase == "a lock":
            ndcache.read_manifest(scripted.url)
            state = next(cache_dir.rglob(".ndcache"))
            (state / "locks").mkdir()
            while_it_waits.enter_context(filelock.FileLock(state / "locks" / "params_shard_0.bin"))
        begun = reply(200, data[:HALF], {"ETag": '"params_shard_0.bin"'}, length=len(data))
        steps: dict[str, tuple[str, bytes | Step, Callable[[], bool]]] = {
            "the manifest's headers": (manifest, then_stall(b""), lambda: bool(scripted.requests)),
            "the manifest's body": (manifest, then_stall(reply(200, b"{", length=9)), lambda: bool(scripted.requests)),
            "a shard's headers": (shard, then_stall(b"HTTP/1.1 200"), lambda: bool(scripted.requests_for(shard))),
            "a shard's body": (shard, then_stall(begun), lambda: HALF in map(size_of, parts(cache_dir))),
            "a retry": (shard, reply(429, headers={"Retry-After": "200"}), asleep.is_set),
            "a lock": (shard, reply(404), asleep.is_set),
        }
        where, step, reached = steps[phase]
        scripted.script[where] = [step]
        error = stop_when(reached, how, functools.partial(ndcache.load, scripted.url, timeout=600))
    assert type(error) is STOPS[how]
    assert loading_threads() == []
    wait_until(lambda: scripted.open_connections == 0)
    kept = sorted(parts(cache_dir))
    assert published(cache_dir) == ([] if where == manifest else ["tensor-cache.json"])
    scripted.script = good
    if phase == "a shard's body":
        assert [path.suffix == ".json" for path in kept] == [False, True]
        assert kept[0].read_bytes() == data[:HALF]
    else:
        assert kept == []
    assert_same(ndcache.load(scripted.url), arrays)
    asked = scripted.requests_for(shard)[-1].headers.get("range")
    assert asked == (f"bytes={HALF}-{len(data) - 1}" if phase == "a shard's body" else None)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("verb", [ndcache.load, ndcache.verify])
def test_row_36_while_a_cached_file_is_hashed(
    model: Path,
    serve: Serve,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_when: Callable[..., Any],
    how: str,
    verb: Any,
) -> None:
    manifest = models.write_model(model, [{"a": models.random_array((8,))}])
    manifest["records"][0]["nbytes"] = 1 << 37  # it takes minutes to hash
    (model / "tensor-cache.json").write_text(json.dumps(manifest))
    server = serve(model)
    ndcache.read_manifest(server.url)
    directory = next(cache_dir.rglob("tensor-cache.json")).parent
    (directory / "params_shard_0.bin").touch()
    os.truncate(directory / "params_shard_0.bin", 1 << 37)  # sparse
    begun = threading.Event()

    def tell(*args: Any) -> Any:
        begun.set()
        return find_mismatch(*args)

    monkeypatch.setattr(verifier, "find_mismatch", tell)
    options = {"verify": "always"} if verb is ndcache.load else {}
    error = stop_when(begun.is_set, how, functools.partial(verb, server.url, **options))
    assert type(error) is STOPS[how]
    assert loading_threads() == []
    assert size_of(directory / "params_shard_0.bin") == 1 << 37  # where it was, and not set aside


@pytest.mark.parametrize("verb", [ndcache.load, ndcache.fetch, ndcache.read_manifest])
def test_row_36_cancelled_before_it_begins(model: Path, serve: Serve, verb: Any) -> None:
    models.simple_model(model)
    server = serve(model)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(ndcache.CancelledError):
        verb(server.url, cancel=cancel)
    assert server.requests == []


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.usefixtures("interruptible")
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


# --- secrets ------------------------------------------------------------------------------------------

SECRET = "hunter2"
FORMS = (SECRET.encode(), base64.b64encode(f"user:{SECRET}".encode()))


def everything_in(error: BaseException) -> bytes:
    """All that can be seen of an error: its text, traceback, causes, fields, pickle, and the errors attached."""
    seen = [str(error), repr(error), str(vars(error)), *traceback.format_exception(error)]
    texts = "".join(seen).encode() + pickle.dumps(error)
    others = getattr(error, "others", ())
    causes = [cause for cause in (error.__cause__,) if cause is not None]
    return texts + b"".join(everything_in(other) for other in (*others, *causes))


@pytest.mark.parametrize("way", ["token", "query", "user and password", "netrc", "session", "redirect"])
@pytest.mark.parametrize(
    ("broken", "answer", "error"),
    [
        (None, b"", None),
        ("tensor-cache.json", reply(401), ndcache.AuthError),
        ("params_shard_1.bin", reply(404), ndcache.NotFoundError),
        ("params_shard_1.bin", reply(500), ndcache.ServerError),
        ("params_shard_1.bin", reply(200, bytes(1 << 16)), ndcache.ChecksumError),
        ("params_shard_1.bin", reply(302, headers={"Location": f"ftp://user:{SECRET}@host/"}), ndcache.RedirectError),
        ("params_shard_1.bin", then_close(b""), ndcache.ConnectError),
        (
            "params_shard_1.bin",
            then_stall(reply(200, bytes(HALF), {"ETag": '"1"'}, length=1 << 16)),
            ndcache.StallError,
        ),
    ],
    ids=["success", "refused", "missing", "failing", "damaged", "redirected", "broken", "interrupted"],
)
def test_row_40_no_secret_is_shown_or_kept(
    model: Path,
    scripted: ScriptedServer,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    way: str,
    broken: str | None,
    answer: Any,
    error: type[ndcache.NdcacheError] | None,
) -> None:
    models.simple_model(model)
    folder = "/owner/name/resolve/main/" if way == "token" else "/"
    files = {path.name: reply(200, path.read_bytes(), {"ETag": '"1"'}) for path in model.iterdir()}
    for name, good in files.items():
        step = answer if name == broken else good
        scripted.script[folder + name] = [step]
        if way == "redirect":
            target = scripted.url.replace("//", f"//user:{SECRET}@") + f"signed/{name}?sig={SECRET}"
            scripted.script[folder + name] = [reply(302, headers={"Location": target})]
            scripted.script[f"/signed/{name}"] = [step]
    source, session = scripted.url, requests.Session()
    if way == "token":
        monkeypatch.setenv("HF_ENDPOINT", scripted.url)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        source = "hf://owner/name"
    elif way == "query":
        source = f"{source}?sig={SECRET}#{SECRET}"
    elif way == "user and password":
        source = source.replace("//", f"//user:{SECRET}@")
    elif way == "netrc":
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {SECRET}\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    elif way == "session":
        session.headers["Authorization"] = f"Bearer {SECRET}"
        session.cookies.set("id", SECRET)
    reports: list[ndcache.ProgressReport] = []
    timeout = (30, 0.3 if error is ndcache.StallError else 30)
    options = {"retries": QUICK, "timeout": timeout, "session": session if way == "session" else None}
    seen, ended_with = b"", list[type[BaseException]]()
    with caplog.at_level(logging.DEBUG, "ndcache"), ndcache.Loader(**options) as loader:  # type: ignore[arg-type]
        for _ in range(2):  # the second time from the cache, and from parts
            try:
                weights = loader.load(source, progress=[True, reports.append])
            except ndcache.NdcacheError as raised:
                ended_with.append(type(raised))
                seen += everything_in(raised)
            else:
                seen += f"{weights!r} {weights.stats!r} {weights.manifest!r}".encode()
                seen += pickle.dumps((weights.stats, weights.manifest))
        if error is None:  # the cached manifest serves
            scripted.script = {}
            with pytest.warns(RuntimeWarning) as warned:
                loader.load(source)
            seen += str([str(warning.message) for warning in warned]).encode()
    session.close()
    assert ended_with == ([] if error is None else [error, error])
    assert any(form in str(scripted.requests).encode() for form in FORMS)  # the server was told
    assert bool(caplog.records) == (error is None or bool(error.retryable))
    if error is ndcache.StallError:
        assert parts(cache_dir)
    shown = capsys.readouterr()
    seen += f"{caplog.text} {[vars(record) for record in caplog.records]} {shown.out} {shown.err}".encode()
    seen += f"{reports}".encode() + pickle.dumps(reports)
    for path in cache_dir.rglob("*"):
        seen += str(path).encode() + (path.read_bytes() if path.is_file() else b"")
    assert not any(form in seen for form in FORMS)


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
