"""Digests that the caller demands, of manifests and shards, on servers and in directories."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import ndcache

from ..helpers import models
from ..helpers.servers import FileServer, ScriptedServer, reply

Serve = Callable[..., FileServer]
QUICK = ndcache.RetryPolicy(retries=1, backoff=0.001)
SHARD = "params_shard_0.bin"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


def pin(path: Path, algorithm: str = "sha256") -> dict[str, str]:
    """What web-llm takes as ``integrity``."""
    digest = hashlib.new(algorithm, path.read_bytes()).digest()
    return {path.name: f"{algorithm}-{base64.b64encode(digest).decode()}"}


def flip(path: Path) -> None:
    """Another byte, and nothing else: the same inode, size and time."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[100] ^= 1
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_files_that_are_what_was_pinned(model: Path, serve: Serve, algorithm: str) -> None:
    arrays = models.simple_model(model)
    integrity = {**pin(model / "tensor-cache.json", algorithm), **pin(model / SHARD, algorithm)}
    server = serve(model)
    for _ in ("over the network", "from the cache"):
        weights = ndcache.load(server.url, integrity=integrity)
        models.assert_same(weights, arrays)
        assert weights.stats.integrity == {algorithm: 1, "md5": 3}
    assert ndcache.verify(server.url, integrity=integrity).checked[SHARD] == algorithm
    models.assert_same(ndcache.load(model, integrity=integrity), arrays)


def test_a_manifest_that_is_not_what_was_pinned(model: Path, serve: Serve, cache_dir: Path) -> None:
    arrays = models.simple_model(model)
    integrity = pin(model / "tensor-cache.json")
    models.write_model(model, [{name: array} for name, array in arrays.items()], metadata={"version": 2})
    server = serve(model)
    for source in (server.url, model):
        with pytest.raises(ndcache.ChecksumError, match="not the version that the integrity option names") as caught:
            ndcache.load(source, integrity=integrity, retries=QUICK)
        assert caught.value.shard == "tensor-cache.json"
    assert server.shard_requests() == []
    assert list(cache_dir.rglob("*.json")) == []


def test_a_shard_that_is_not_what_was_pinned(model: Path, serve: Serve) -> None:
    """The manifest says that all is well: it came with the wrong shard."""
    models.simple_model(model)
    integrity = pin(model / SHARD)
    models.write_model(model, [{"layer.0": models.random_array((1 << 14,), seed=5)}])
    server = serve(model)
    for source in (server.url, model):
        with pytest.raises(ndcache.ChecksumError, match="sha256") as caught:
            ndcache.load(source, integrity=integrity, retries=QUICK)
        assert caught.value.shard == SHARD
    assert not ndcache.is_cached(server.url)
    assert len(ndcache.load(model, integrity=integrity, verify="never")) == 1


def test_a_cached_manifest_serves_only_if_it_is_what_was_pinned(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    old = pin(model / "tensor-cache.json")
    server = serve(model)
    ndcache.load(server.url)
    models.write_model(model, [{name: array} for name, array in arrays.items()], metadata={"version": 2})
    new = pin(model / "tensor-cache.json")
    with pytest.warns(RuntimeWarning, match="using the cached manifest"):
        assert "version" not in ndcache.load(server.url, integrity=old).metadata
    with pytest.raises(ndcache.OfflineError):
        ndcache.load(server.url, integrity=new, offline=True)
    assert ndcache.load(server.url, integrity=new).metadata == {"version": 2}
    models.assert_same(ndcache.load(server.url, integrity=new, offline=True), arrays)


def test_a_pin_that_is_new_is_checked_once_for_what_is_cached(model: Path, serve: Serve) -> None:
    models.simple_model(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    integrity = pin(model / SHARD)
    server.requests.clear()
    stats = ndcache.load(server.url, integrity=integrity).stats
    assert stats.seconds["hash"] > 0
    assert ndcache.load(server.url, integrity=integrity).stats.seconds["hash"] == 0
    assert server.shard_requests() == []
    flip(directory / SHARD)
    assert ndcache.load(server.url, integrity=pin(model / SHARD, "sha512")).stats.network_bytes == 1 << 16


def test_row_31_flipped_bits_of_a_pinned_local_shard(model: Path) -> None:
    """In place there is no memory of what was checked: what is pinned is read each time."""
    models.simple_model(model)
    integrity = pin(model / SHARD)
    flip(model / SHARD)
    assert len(ndcache.load(model)) == 4
    with pytest.raises(ndcache.ChecksumError):
        ndcache.load(model, integrity=integrity)


def test_only_the_pinned_manifest_is_asked_for(model: Path, tmp_path: Path, serve: Serve) -> None:
    """Hiding it must not lead to the other name, which nobody vouches for."""
    models.simple_model(model)
    integrity = pin(model / "tensor-cache.json")
    os.rename(model / "tensor-cache.json", model / "ndarray-cache.json")
    server = serve(model)
    with pytest.raises(ndcache.NotFoundError):
        ndcache.load(server.url, integrity=integrity)
    assert [request.path for request in server.requests] == ["/tensor-cache.json"]
    with pytest.raises(ValueError, match=r"for tensor-cache\.json, and not for ndarray-cache\.json"):
        ndcache.load(server.url + "ndarray-cache.json", integrity=integrity)


def test_a_pin_of_no_file(model: Path, serve: Serve) -> None:
    models.simple_model(model)
    integrity = {"params_shard_O.bin": pin(model / SHARD)[SHARD]}
    for source in (serve(model).url, model):
        with pytest.raises(ndcache.ManifestLayoutError, match=r"'params_shard_O\.bin', which is no file of"):
            ndcache.load(source, integrity=integrity)


def test_a_pin_of_a_file_of_another_version(model: Path, serve: Serve) -> None:
    """The manifest that has it is used, be it the server's or the cached one."""
    old = models.simple_model(model, shards=2)
    one = pin(model / "params_shard_1.bin")
    server = serve(model)
    ndcache.fetch(server.url)
    models.write_model(model, [{"layer.0": old["layer.0"]}])  # the server's has it no more
    with pytest.warns(RuntimeWarning, match="which is no file of this manifest"):
        models.assert_same(ndcache.load(server.url, integrity=one), old)
    ndcache.fetch(server.url)
    new = models.simple_model(model, shards=3)
    three = pin(model / "params_shard_2.bin")  # the cached one has not had it so far
    models.assert_same(ndcache.load(server.url, integrity=three), new)


def test_a_pinned_local_manifest_vouches_for_its_shards(model: Path) -> None:
    models.simple_model(model)
    integrity = pin(model / "tensor-cache.json")
    assert ndcache.load(model, integrity=integrity).stats.integrity == {"md5": 4}
    flip(model / "params_shard_2.bin")
    with pytest.raises(ndcache.ChecksumError):
        ndcache.load(model, integrity=integrity)


@pytest.mark.parametrize("text", ["", "sha256", "sha256-AAAA", "md5-" + "A" * 22 + "=="])
def test_what_is_not_a_digest_is_found_at_the_start(text: str) -> None:
    with pytest.raises(ValueError, match="digest"):
        ndcache.Loader(integrity={SHARD: text})


# --- what the server says of the content --------------------------------------------------------------


def test_hugging_faces_digests_are_kept_and_shown(model: Path, scripted: ScriptedServer) -> None:
    arrays = models.simple_model(model, shards=2)
    models.write_model(model, [{name: array} for name, array in arrays.items()], md5=False)
    scripted.script["/tensor-cache.json"] = [reply(200, (model / "tensor-cache.json").read_bytes())]
    for index in range(2):
        data = (model / f"params_shard_{index}.bin").read_bytes()
        linked = {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "Location": f"/storage/{index}"}
        scripted.script[f"/params_shard_{index}.bin"] = [
            reply(302, headers=linked if index else {"Location": "/storage/0"})
        ]
        scripted.script[f"/storage/{index}"] = [reply(200, data)]
    for _ in ("over the network", "from the cache"):
        weights = ndcache.load(scripted.url)
        models.assert_same(weights, arrays)
        assert weights.stats.integrity == {"size": 1, "sha256": 1}
    directory = ndcache.fetch(scripted.url)
    assert ndcache.verify(scripted.url).checked == {"params_shard_0.bin": "size", "params_shard_1.bin": "sha256"}
    flip(directory / "params_shard_1.bin")  # nothing in the manifest would tell
    assert ndcache.verify(scripted.url).bad == ("params_shard_1.bin",)
