"""Digests that the caller requires, of manifests and shards, on servers and in directories."""

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


def sri_of(path: Path, algorithm: str = "sha256") -> dict[str, str]:
    """Return the ``integrity`` option for one file, in the form that web-llm uses."""
    digest = hashlib.new(algorithm, path.read_bytes()).digest()
    return {path.name: f"{algorithm}-{base64.b64encode(digest).decode()}"}


def flip(path: Path) -> None:
    """Change one byte, but not the inode, size and time."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[100] ^= 1
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_files_with_their_required_digests_are_loaded(model: Path, serve: Serve, algorithm: str) -> None:
    arrays = models.simple_model(model)
    integrity = {**sri_of(model / "tensor-cache.json", algorithm), **sri_of(model / SHARD, algorithm)}
    server = serve(model)
    for _ in ("over the network", "from the cache"):
        weights = ndcache.load(server.url, integrity=integrity)
        models.assert_same(weights, arrays)
        assert weights.stats.integrity == {algorithm: 1, "md5": 3}
    assert ndcache.verify(server.url, integrity=integrity).checked[SHARD] == algorithm
    models.assert_same(ndcache.load(model, integrity=integrity), arrays)


def test_a_manifest_without_its_required_digest_is_refused(model: Path, serve: Serve, cache_dir: Path) -> None:
    arrays = models.simple_model(model)
    integrity = sri_of(model / "tensor-cache.json")
    models.write_model(model, [{name: array} for name, array in arrays.items()], metadata={"version": 2})
    server = serve(model)
    for source in (server.url, model):
        with pytest.raises(ndcache.ChecksumError, match="not the version that the integrity option names") as caught:
            ndcache.load(source, integrity=integrity, retries=QUICK)
        assert caught.value.shard == "tensor-cache.json"
    assert server.shard_requests() == []
    assert list(cache_dir.rglob("*.json")) == []


def test_a_shard_without_its_required_digest_is_refused(model: Path, serve: Serve) -> None:
    """The manifest has the digest of the wrong shard, so it does not help."""
    models.simple_model(model)
    integrity = sri_of(model / SHARD)
    models.write_model(model, [{"layer.0": models.random_array((1 << 14,), seed=5)}])
    server = serve(model)
    for source in (server.url, model):
        with pytest.raises(ndcache.ChecksumError, match="sha256") as caught:
            ndcache.load(source, integrity=integrity, retries=QUICK)
        assert caught.value.shard == SHARD
    assert not ndcache.is_cached(server.url)
    assert len(ndcache.load(model, integrity=integrity, verify="never")) == 1


def test_a_cached_manifest_is_used_only_with_its_required_digest(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    old = sri_of(model / "tensor-cache.json")
    server = serve(model)
    ndcache.load(server.url)
    models.write_model(model, [{name: array} for name, array in arrays.items()], metadata={"version": 2})
    new = sri_of(model / "tensor-cache.json")
    with pytest.warns(RuntimeWarning, match="using the cached manifest"):
        assert "version" not in ndcache.load(server.url, integrity=old).metadata
    with pytest.raises(ndcache.OfflineError):
        ndcache.load(server.url, integrity=new, offline=True)
    assert ndcache.load(server.url, integrity=new).metadata == {"version": 2}
    models.assert_same(ndcache.load(server.url, integrity=new, offline=True), arrays)


def test_a_new_required_digest_is_checked_once_for_a_cached_shard(model: Path, serve: Serve) -> None:
    models.simple_model(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    integrity = sri_of(model / SHARD)
    server.requests.clear()
    stats = ndcache.load(server.url, integrity=integrity).stats
    assert stats.seconds["hash"] > 0
    assert ndcache.load(server.url, integrity=integrity).stats.seconds["hash"] == 0
    assert server.shard_requests() == []
    flip(directory / SHARD)
    assert ndcache.load(server.url, integrity=sri_of(model / SHARD, "sha512")).stats.network_bytes == 1 << 16


def test_row_31_a_flipped_bit_of_a_local_shard_with_a_required_digest_is_found(model: Path) -> None:
    """Files that are read in place are checked each time."""
    models.simple_model(model)
    integrity = sri_of(model / SHARD)
    flip(model / SHARD)
    assert len(ndcache.load(model)) == 4
    with pytest.raises(ndcache.ChecksumError):
        ndcache.load(model, integrity=integrity)


def test_only_the_manifest_with_a_required_digest_is_requested(model: Path, tmp_path: Path, serve: Serve) -> None:
    """If that manifest is hidden, the other one, which has no required digest, must not be used."""
    models.simple_model(model)
    integrity = sri_of(model / "tensor-cache.json")
    os.rename(model / "tensor-cache.json", model / "ndarray-cache.json")
    server = serve(model)
    with pytest.raises(ndcache.NotFoundError):
        ndcache.load(server.url, integrity=integrity)
    assert [request.path for request in server.requests] == ["/tensor-cache.json"]
    with pytest.raises(ValueError, match=r"for tensor-cache\.json, and not for ndarray-cache\.json"):
        ndcache.load(server.url + "ndarray-cache.json", integrity=integrity)


def test_a_required_digest_of_no_file_is_refused(model: Path, serve: Serve) -> None:
    models.simple_model(model)
    integrity = {"params_shard_O.bin": sri_of(model / SHARD)[SHARD]}
    for source in (serve(model).url, model):
        with pytest.raises(ndcache.ManifestLayoutError, match=r"'params_shard_O\.bin', which is not a file of"):
            ndcache.load(source, integrity=integrity)


def test_a_required_digest_of_a_file_that_only_one_version_has(model: Path, serve: Serve) -> None:
    """The manifest that has the file is used, whether it is the server's or the cached one."""
    old = models.simple_model(model, shards=2)
    one = sri_of(model / "params_shard_1.bin")
    server = serve(model)
    ndcache.fetch(server.url)
    models.write_model(model, [{"layer.0": old["layer.0"]}])  # the server's manifest no longer has it
    with pytest.warns(RuntimeWarning, match="which is not a file of this manifest"):
        models.assert_same(ndcache.load(server.url, integrity=one), old)
    ndcache.fetch(server.url)
    new = models.simple_model(model, shards=3)
    three = sri_of(model / "params_shard_2.bin")  # the cached manifest does not have it yet
    models.assert_same(ndcache.load(server.url, integrity=three), new)


def test_a_required_local_manifest_vouches_for_its_shards(model: Path) -> None:
    models.simple_model(model)
    integrity = sri_of(model / "tensor-cache.json")
    assert ndcache.load(model, integrity=integrity).stats.integrity == {"md5": 4}
    flip(model / "params_shard_2.bin")
    with pytest.raises(ndcache.ChecksumError):
        ndcache.load(model, integrity=integrity)


@pytest.mark.parametrize("text", ["", "sha256", "sha256-AAAA", "md5-" + "A" * 22 + "=="])
def test_a_malformed_digest_is_refused_by_the_loader(text: str) -> None:
    with pytest.raises(ValueError, match="digest"):
        ndcache.Loader(integrity={SHARD: text})


# --- what the server says of the content --------------------------------------------------------------


def test_digests_from_hugging_face_are_kept_and_reported(model: Path, scripted: ScriptedServer) -> None:
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
    flip(directory / "params_shard_1.bin")  # the manifest has no digest that would tell
    assert ndcache.verify(scripted.url).bad == ("params_shard_1.bin",)
