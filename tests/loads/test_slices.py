"""``names={"w": slice(0, 512)}``: only the bytes of these rows are fetched, by loads, streams and `fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache

from ..helpers import models
from ..helpers.loads import Serve, assert_same
from ..helpers.served_manifests import sri
from ..helpers.servers import FileServer

ROW = 64
#: Several tensors of a file, of which many rows may be wanted, and a file with another one.
ARRAYS = {
    "first": models.random_array((5, 3), seed=1),
    "w": models.random_array((1000, ROW // 4), seed=2),
    "far": models.random_array((100_000,), seed=3),
    "scale": models.random_array((), seed=4),
    "v": models.random_array((1000, ROW // 4), seed=5),
}
OTHER = models.random_array((8, 8), seed=6)
NAMES = {"v": slice(-10, None), "w": slice(None, 990)}
EXPECTED = {"w": ARRAYS["w"][:990], "v": ARRAYS["v"][-10:]}
WANTED = 1000 * ROW


@pytest.fixture
def server(model: Path, serve: Serve) -> FileServer:
    models.write_model(model, [ARRAYS, {"other": OTHER}])
    return serve(model)


def requested(server: FileServer) -> list[tuple[str, str]]:
    return sorted((request.path, request.headers.get("range", "")) for request in server.shard_requests())


def byte_range(name: str, start: int, stop: int) -> tuple[str, str]:
    names = list(ARRAYS)
    at = sum(ARRAYS[each].nbytes for each in names[: names.index(name)])
    return "/params_shard_0.bin", f"bytes={at + start * ROW}-{at + stop * ROW - 1}"


@pytest.mark.parametrize("verb", ["load", "stream", "fetch"])
def test_only_these_bytes_are_fetched(server: FileServer, verb: str) -> None:
    """Even of a small file, of which a load by names would fetch everything."""
    if verb == "fetch":
        ndcache.fetch(server.url, names=NAMES)
    elif verb == "stream":
        assert_same(dict(ndcache.stream(server.url, names=NAMES)), EXPECTED)
    else:
        weights = ndcache.load(server.url, names=NAMES)
        assert_same(weights, EXPECTED)
        assert weights.stats.network_bytes == weights.stats.nbytes == WANTED
        assert weights.stats.integrity == {"size": 1}
    assert requested(server) == sorted([byte_range("w", 0, 990), byte_range("v", 990, 1000)])
    # They are all that is there, for other loads too.
    assert_same(ndcache.load(server.url, names={"w": slice(5, 10)}, offline=True), {"w": ARRAYS["w"][5:10]})
    with pytest.raises(ndcache.OfflineError):
        ndcache.load(server.url, names={"w": slice(5, 991)}, offline=True)
    assert not ndcache.is_cached(server.url)


def test_slices_near_each_other_are_one_request(server: FileServer) -> None:
    names = {"w": slice(10, 20), "first": slice(1, 2)}
    assert_same(ndcache.load(server.url, names=names), {"first": ARRAYS["first"][1:2], "w": ARRAYS["w"][10:20]})
    assert requested(server) == [("/params_shard_0.bin", f"bytes=12-{60 + 20 * ROW - 1}")]


def test_what_is_fetched_is_kept_for_the_whole_model(server: FileServer) -> None:
    ndcache.fetch(server.url, names={"w": slice(0, 100)})
    weights = ndcache.load(server.url, names={"w": slice(50, 200)})
    assert_same(weights, {"w": ARRAYS["w"][50:200]})
    assert (weights.stats.network_bytes, weights.stats.resumed_bytes) == (100 * ROW, 50 * ROW)
    weights = ndcache.load(server.url)
    assert_same(weights, {**ARRAYS, "other": OTHER})
    assert weights.stats.resumed_bytes == 200 * ROW
    assert weights.stats.network_bytes == weights.stats.nbytes - 200 * ROW
    assert ndcache.verify(server.url).checked == {"params_shard_0.bin": "md5", "params_shard_1.bin": "md5"}
    server.requests.clear()
    assert_same(ndcache.load(server.url, names=NAMES), EXPECTED)
    assert requested(server) == []


def test_all_rows_of_all_tensors_are_the_whole_file(server: FileServer) -> None:
    weights = ndcache.load(server.url, names={"other": slice(0, 8)})
    assert_same(weights, {"other": OTHER})
    assert requested(server) == [("/params_shard_1.bin", "")]
    assert weights.stats.integrity == {"md5": 1}


@pytest.mark.parametrize("options", [{"verify": "always"}, {"integrity": True}])
def test_a_demanded_digest_needs_the_whole_file(server: FileServer, model: Path, options: dict[str, Any]) -> None:
    if "integrity" in options:
        options = {"integrity": {"params_shard_0.bin": sri((model / "params_shard_0.bin").read_bytes())}}
    weights = ndcache.load(server.url, names=NAMES, **options)
    assert_same(weights, EXPECTED)
    assert requested(server) == [("/params_shard_0.bin", "")]
    assert list(weights.stats.integrity) != ["size"]


def test_slices_of_a_local_model_and_of_a_cache_in_memory(server: FileServer, model: Path) -> None:
    assert_same(ndcache.load(model, names=NAMES), EXPECTED)
    with pytest.warns(RuntimeWarning, match="stays in memory"):
        weights = ndcache.load(server.url, names=NAMES, cache_dir="/dev/null/cache")
    assert_same(weights, EXPECTED)
    assert weights.stats.network_bytes == WANTED


def test_slices_of_no_rows(server: FileServer) -> None:
    names = {"w": slice(5, 5), "other": slice(100, None)}
    assert_same(ndcache.load(server.url, names=names), {"w": ARRAYS["w"][:0], "other": OTHER[:0]})


@pytest.mark.parametrize("verb", [ndcache.load, ndcache.stream, ndcache.fetch])
def test_row_106_bad_slices_are_refused_before_any_request(server: FileServer, verb: Any) -> None:
    for rows, error in [(slice(0, 9, 2), ValueError), (7, TypeError), ((0, 7), TypeError), (slice("7"), TypeError)]:
        with pytest.raises(error, match="'w'"):
            verb(server.url, names={"w": rows})
    assert server.requests == []
    with pytest.raises(ValueError, match=r"'scale'.* scalar"):
        verb(server.url, names={"w": slice(2), "scale": slice(None)})
    with pytest.raises(KeyError, match=r"is called 'w\*'"):
        verb(server.url, names={"w*": slice(2)})
    assert server.shard_requests() == []


def test_memory_of_the_callers_has_the_shape_of_the_slice(server: FileServer) -> None:
    into = {name: np.empty_like(array) for name, array in EXPECTED.items()}
    weights = ndcache.load(server.url, names=NAMES, into=into)
    assert_same(weights, EXPECTED)
    assert all(weights[name] is into[name] for name in into)
    with pytest.raises(ValueError, match=r"into\['w'\] has the shape \(1000, 16\), but the tensor has \(990, 16\)"):
        ndcache.load(server.url, names=NAMES, into={"w": np.empty_like(ARRAYS["w"])})
