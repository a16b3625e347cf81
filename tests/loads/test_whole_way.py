"""The whole way, from a source to arrays: what is fetched, in which order, and what is left."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

import ndcache

from ..helpers import models
from ..helpers.loads import Serve, assert_same, wait_until


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


def test_a_failing_origin_and_a_mirror(tmp_path: Path, serve: Serve) -> None:
    arrays = models.simple_model(tmp_path / "www")
    origin, mirror = serve(tmp_path / "www"), serve(tmp_path / "www")
    origin.status["/params_shard_2.bin"] = 404
    assert_same(ndcache.load(origin.url, mirrors=[mirror.url]), arrays)
    assert [request.path for request in mirror.requests] == ["/params_shard_2.bin"]


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
