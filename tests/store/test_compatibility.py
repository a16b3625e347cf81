"""Caches that are shared with ndcache 0.1.0 as of commit 796cd2b: names, notes and locks stay as they were.

Everything that lies in a cache is written out here as that version writes it, and not by way of ndcache's own code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import pytest

import ndcache
from ndcache.store import lock as locks
from ndcache.store.directory import ModelDirectory
from ndcache.store.metadata import FileMetadata

from ..helpers.servers import FileServer, ScriptedServer, reply, then_close

LARGE, SMALL = 1 << 21, 1 << 12
SHARDS = {
    "params_shard_0.bin": bytes(range(256)) * ((LARGE + SMALL) >> 8),
    "more/params_shard_1.bin": bytes(reversed(range(256))) * (SMALL >> 8),
}
FIRST, SECOND = SHARDS
DATA = SHARDS[FIRST]
#: The names of the shards in ndcache's own folders.
FLAT = {FIRST: "params_shard_0.bin", SECOND: "more%2Fparams_shard_1.bin"}
TENSORS = {"a": DATA[:LARGE], "b": DATA[LARGE:], "c": SHARDS[SECOND]}
MANIFEST = "tensor-cache.json"
#: When the files of the cache were published.
MTIME_NS = 1_700_000_000_123_456_789
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PARTIAL = f"{FLAT[FIRST]}.0123456789abcdef"

needs_boot_id = pytest.mark.skipif(not BOOT_ID.exists(), reason="the system does not tell when it was started")


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest(*, digests: bool) -> bytes:
    def record(name: str, nbytes: int, offset: int) -> dict[str, Any]:
        kind = {"shape": [nbytes], "dtype": "uint8", "format": "raw"}
        return {"name": name, "nbytes": nbytes, "byteOffset": offset, **kind}

    first, second = [record("a", LARGE, 0), record("b", SMALL, LARGE)], [record("c", SMALL, 0)]
    shards: list[dict[str, Any]] = [
        {"dataPath": name, "format": "raw-shard", "nbytes": len(SHARDS[name]), "records": records}
        for name, records in ((FIRST, first), (SECOND, second))
    ]
    if digests:
        for shard in shards:
            shard["md5sum"] = md5(SHARDS[shard["dataPath"]])
    return json.dumps({"metadata": {}, "records": shards}).encode()


@pytest.fixture(params=[True, False], ids=["with digests", "without digests"])
def digests(request: pytest.FixtureRequest) -> bool:
    """Return whether the manifest has digests of the shards."""
    return bool(request.param)


@pytest.fixture
def server(tmp_path: Path, serve: Callable[..., FileServer], digests: bool) -> FileServer:
    model = tmp_path / "model"
    (model / "more").mkdir(parents=True)
    (model / MANIFEST).write_bytes(manifest(digests=digests))
    for name, data in SHARDS.items():
        (model / name).write_bytes(data)
    return serve(model)


def cache_of(url: str, cache_dir: Path) -> Path:
    """Return the directory of the model at ``http://127.0.0.1:<port>/``."""
    port = url.removesuffix("/").rpartition(":")[2]
    return cache_dir / "default" / f"127.0.0.1--{port}--{sha256(url.encode())[:16]}"


def content_id(name: str, *, digests: bool) -> str:
    return md5(SHARDS[name]) if digests else f"tensor-cache.json {sha256(manifest(digests=False))}"


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(MTIME_NS, MTIME_NS))


def write_manifest(directory: Path, url: str, *, digests: bool) -> None:
    """Write the manifest, and what belongs to it."""
    data = manifest(digests=digests)
    write(directory / MANIFEST, data)
    write(directory / ".ndcache" / "source.json", f'{{"source": "{url}"}}'.encode())
    write(
        directory / ".ndcache" / "validators" / "tensor-cache.json.json",
        f'{{"nbytes": {len(data)}, "mtime_ns": 1700000000123456789, "digests": {{"sha256": "{sha256(data)}"}},'
        f' "etag": "\\"{md5(data)}\\"", "last_modified": null, "claim": null}}'.encode(),
    )


def write_shard(directory: Path, name: str, *, digests: bool, claim: str) -> None:
    """Write a shard, and what is noted of it."""
    data = SHARDS[name]
    write(directory / name, data)
    computed = f'{{"md5": "{md5(data)}"}}' if digests else "{}"
    write(
        directory / ".ndcache" / "validators" / f"{FLAT[name]}.json",
        f'{{"nbytes": {len(data)}, "mtime_ns": 1700000000123456789, "digests": {computed},'
        f' "etag": "\\"{md5(data)}\\"", "last_modified": null, "claim": {json.dumps(claim)}}}'.encode(),
    )


def write_partial(directory: Path, url: str, data: bytes, *, claim: str, boot: str, more: str = "") -> None:
    """Write a partial file of the first shard, as a load that was killed leaves it."""
    parts = directory / ".ndcache" / "parts"
    write(parts / PARTIAL, data)
    write(
        parts / f"{PARTIAL}.json",
        f'{{"url": "{url}{FIRST}", "etag": "\\"{md5(DATA)}\\"", "claim": "{claim}", "sha256": null,'
        f' "boot": "{boot}"{more}}}'.encode(),
    )


def boot_id() -> str:
    return BOOT_ID.read_text(encoding="utf-8").strip()


def ranges_asked(server: FileServer) -> list[tuple[str, str | None]]:
    return [(request.path[1:], request.headers.get("range")) for request in server.shard_requests()]


def tree(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def note(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    assert isinstance(found, dict)
    return found


# --- what 796cd2b wrote is used -----------------------------------------------------------------------


@pytest.mark.parametrize("others", ["", "tensor-cache-b16.json 0123456789abcdef\n"])
@pytest.mark.parametrize("offline", [False, True])
def test_a_whole_model_is_used_without_a_download(
    server: FileServer, cache_dir: Path, digests: bool, offline: bool, others: str
) -> None:
    directory = cache_of(server.url, cache_dir)
    write_manifest(directory, server.url, digests=digests)
    for name in SHARDS:
        claim = content_id(name, digests=digests)
        write_shard(directory, name, digests=digests, claim=claim if digests else others + claim)
    before = {name: (directory / name).read_bytes() for name in tree(directory)}
    with ndcache.load(server.url, offline=offline) as weights:
        assert {name: bytes(array) for name, array in weights.items()} == TENSORS
        assert (weights.stats.network_bytes, weights.stats.cache_bytes) == (0, sum(map(len, SHARDS.values())))
        assert weights.stats.seconds["hash"] == 0
    assert server.shard_requests() == []
    assert [request.headers.get("if-none-match") for request in server.requests] == (
        [] if offline else [f'"{md5(before[MANIFEST])}"']
    )
    after = {name: (directory / name).read_bytes() for name in tree(directory)}
    assert after == {**before, ".ndcache/used": b"\n"}
    assert ndcache.verify(server.url).ok


@needs_boot_id
def test_a_partial_file_is_resumed(server: FileServer, cache_dir: Path, digests: bool) -> None:
    directory = cache_of(server.url, cache_dir)
    write_manifest(directory, server.url, digests=digests)
    write_shard(directory, SECOND, digests=digests, claim=content_id(SECOND, digests=digests))
    write_partial(directory, server.url, DATA[:100_000], claim=content_id(FIRST, digests=digests), boot=boot_id())
    with ndcache.load(server.url) as weights:
        assert {name: bytes(array) for name, array in weights.items()} == TENSORS
        assert weights.stats.resumed_bytes == 100_000
    assert ranges_asked(server) == [(FIRST, f"bytes=100000-{len(DATA) - 1}")]
    assert [request.headers["if-range"] for request in server.shard_requests()] == [f'"{md5(DATA)}"']
    assert list((directory / ".ndcache" / "parts").iterdir()) == []


@needs_boot_id
def test_a_partial_file_with_holes_is_resumed(server: FileServer, cache_dir: Path, digests: bool) -> None:
    directory = cache_of(server.url, cache_dir)
    write_manifest(directory, server.url, digests=digests)
    write_shard(directory, SECOND, digests=digests, claim=content_id(SECOND, digests=digests))
    holes = bytearray(DATA[:300_000])
    holes[100_000:200_000] = bytes(100_000)
    write_partial(
        directory,
        server.url,
        bytes(holes),
        claim=content_id(FIRST, digests=digests),
        boot=boot_id(),
        more=', "spans": [[0, 100000], [200000, 300000]]',
    )
    with ndcache.load(server.url, max_workers=1) as weights:
        assert {name: bytes(array) for name, array in weights.items()} == TENSORS
        assert weights.stats.resumed_bytes == 200_000
    assert sorted(ranges_asked(server)) == [
        (FIRST, "bytes=100000-199999"),
        (FIRST, f"bytes=300000-{len(DATA) - 1}"),
    ]


def test_some_tensors_of_a_shard_are_used_without_a_download(
    server: FileServer, cache_dir: Path, digests: bool
) -> None:
    """They lie in a partial file of the shard's size that was synced."""
    directory = cache_of(server.url, cache_dir)
    write_manifest(directory, server.url, digests=digests)
    write_partial(
        directory,
        server.url,
        bytes(LARGE) + TENSORS["b"],
        claim=content_id(FIRST, digests=digests),
        boot="synced",
        more=f', "spans": [[{LARGE}, {LARGE + SMALL}]]',
    )
    for offline in (True, False):
        with ndcache.load(server.url, names="b", offline=offline) as weights:
            assert {name: bytes(array) for name, array in weights.items()} == {"b": TENSORS["b"]}
    assert server.shard_requests() == []
    with ndcache.load(server.url, max_workers=1) as weights:
        assert {name: bytes(array) for name, array in weights.items()} == TENSORS
        assert weights.stats.resumed_bytes == SMALL
    assert set(ranges_asked(server)) == {(FIRST, f"bytes=0-{LARGE - 1}"), (SECOND, None)}


def test_a_lock_of_another_process_is_waited_for(
    server: FileServer, cache_dir: Path, digests: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = cache_of(server.url, cache_dir)
    write_manifest(directory, server.url, digests=digests)
    write_shard(directory, FIRST, digests=digests, claim=content_id(FIRST, digests=digests))
    waiting, really_try = threading.Event(), locks._try

    def noticed(lock: Any, **options: Any) -> locks._Result:
        result = really_try(lock, **options)
        if result is locks._Result.BUSY:
            waiting.set()
        return result

    (directory / ".ndcache" / "locks").mkdir()
    with ThreadPoolExecutor(1) as executor:
        with filelock.FileLock(directory / ".ndcache" / "locks" / FLAT[SECOND]):
            monkeypatch.setattr(locks, "_try", noticed)
            loading = executor.submit(ndcache.load, server.url)
            assert waiting.wait(60)
            write_shard(directory, SECOND, digests=digests, claim=content_id(SECOND, digests=digests))
        with loading.result(60) as weights:
            assert {name: bytes(array) for name, array in weights.items()} == TENSORS
    assert server.shard_requests() == []


# --- what is written can be used by 796cd2b -----------------------------------------------------------


def test_a_whole_model_is_written_as_before(server: FileServer, cache_dir: Path, digests: bool) -> None:
    directory = cache_of(server.url, cache_dir)
    assert ndcache.fetch(server.url) == directory
    notes = directory / ".ndcache" / "validators"
    assert tree(directory) == [
        ".ndcache/companions.json",
        ".ndcache/source.json",
        ".ndcache/used",
        ".ndcache/validators/more%2Fparams_shard_1.bin.json",
        ".ndcache/validators/params_shard_0.bin.json",
        ".ndcache/validators/tensor-cache.json.json",
        "more/params_shard_1.bin",
        "params_shard_0.bin",
        "tensor-cache.json",
    ]
    assert note(directory / ".ndcache" / "source.json") == {"source": server.url}
    for name, data in SHARDS.items():
        assert note(notes / f"{FLAT[name]}.json") == {
            "nbytes": len(data),
            "mtime_ns": (directory / name).stat().st_mtime_ns,
            "digests": {"md5": md5(data)} if digests else {},
            "etag": f'"{md5(data)}"',
            "last_modified": None,
            "claim": content_id(name, digests=digests),
        }
    data = manifest(digests=digests)
    assert note(notes / "tensor-cache.json.json") == {
        "nbytes": len(data),
        "mtime_ns": (directory / MANIFEST).stat().st_mtime_ns,
        "digests": {"sha256": sha256(data)},
        "etag": f'"{md5(data)}"',
        "last_modified": None,
        "claim": None,
    }


@pytest.mark.parametrize("digests", [True], indirect=True)
def test_the_lock_of_a_download_lies_where_it_did(server: FileServer, cache_dir: Path) -> None:
    directory = cache_of(server.url, cache_dir)
    server.gate.clear()  # no shard's body comes
    with ThreadPoolExecutor(1) as executor:
        loading = executor.submit(ndcache.fetch, server.url)
        deadline = time.monotonic() + 60
        while len(server.shard_requests()) < len(SHARDS) and time.monotonic() < deadline:
            time.sleep(0.005)
        for flat in FLAT.values():
            with pytest.raises(filelock.Timeout):
                filelock.FileLock(directory / ".ndcache" / "locks" / flat).acquire(blocking=False)
        server.gate.set()
        loading.result(60)
    assert list((directory / ".ndcache" / "locks").iterdir()) == []


def interrupted(scripted: ScriptedServer, body: bytes, **headers: str) -> None:
    scripted.script[f"/{MANIFEST}"] = [reply(200, manifest(digests=True))]
    scripted.script[f"/{FIRST}"] = [then_close(reply(200, body, {"ETag": '"1"', **headers}, length=len(DATA)))]
    with pytest.raises(ndcache.TransferError):
        ndcache.fetch(scripted.url, names=["a", "b"], retries=0)


@needs_boot_id
def test_an_interrupted_load_leaves_a_partial_file_as_before(scripted: ScriptedServer, cache_dir: Path) -> None:
    interrupted(scripted, DATA[:100_000])
    parts = cache_of(scripted.url, cache_dir) / ".ndcache" / "parts"
    partial, noted = sorted(parts.iterdir())
    assert re.fullmatch(r"params_shard_0\.bin\.[0-9a-f]{16}", partial.name)
    assert partial.read_bytes() == DATA[:100_000]
    assert noted.name == f"{partial.name}.json"
    assert note(noted) == {
        "url": f"{scripted.url}params_shard_0.bin",
        "etag": '"1"',
        "claim": md5(DATA),
        "sha256": None,
        "boot": boot_id(),
    }


@needs_boot_id
def test_a_partial_file_with_holes_is_written_as_before(tmp_path: Path) -> None:
    directory = ModelDirectory(tmp_path / "default" / "model")
    with directory.partials.create(SECOND) as partial:
        partial.set_source("http://host/x", '"1"', "tensor-cache.json 12", "ab" * 32)
        partial.write_at(b"abc", 10)
        partial.write_at(b"abc", 2)
    (noted,) = (directory.directory / ".ndcache" / "parts").glob("*.json")
    assert re.fullmatch(r"more%2Fparams_shard_1\.bin\.[0-9a-f]{16}\.json", noted.name)
    assert note(noted) == {
        "url": "http://host/x",
        "etag": '"1"',
        "claim": "tensor-cache.json 12",
        "sha256": "ab" * 32,
        "boot": boot_id(),
        "spans": [[2, 5], [10, 13]],
    }


def test_some_tensors_of_a_shard_are_written_as_before(server: FileServer, cache_dir: Path, digests: bool) -> None:
    directory = ndcache.fetch(server.url, names="b")
    (noted,) = (directory / ".ndcache" / "parts").glob("*.json")
    assert noted.with_suffix("").stat().st_size == len(DATA)
    assert note(noted) == {
        "url": f"{server.url}params_shard_0.bin",
        "etag": f'"{md5(DATA)}"',
        "claim": content_id(FIRST, digests=digests),
        "sha256": None,
        "boot": "synced",
        "spans": [[LARGE, LARGE + SMALL]],
    }


@pytest.mark.parametrize(
    ("claim", "added", "then"),
    [
        (None, "tensor-cache.json 1", "tensor-cache.json 1"),
        ("tensor-cache.json 1", "tensor-cache.json 2", "tensor-cache.json 2"),
        ("tensor-cache.json 1", "b16.json 3", "b16.json 3\ntensor-cache.json 1"),
        ("b16.json 3\ntensor-cache.json 1", "tensor-cache.json 2", "tensor-cache.json 2\nb16.json 3"),
        ("0123abcd", "tensor-cache.json 1", "tensor-cache.json 1\n0123abcd"),
    ],
)
def test_what_several_manifests_say_is_noted_as_before(claim: str | None, added: str, then: str) -> None:
    noted = {"nbytes": 3, "mtime_ns": 5, "digests": {}, "etag": None, "last_modified": None, "claim": claim}
    metadata = FileMetadata.from_note(noted)
    assert metadata is not None
    assert metadata.to_note() == noted
    assert metadata.with_content_id(added).to_note() == {**noted, "claim": then}


@pytest.mark.parametrize("digests", [True], indirect=True)
def test_a_bad_file_is_put_where_it_was(server: FileServer, cache_dir: Path) -> None:
    directory = ndcache.fetch(server.url)
    bad = bytes(SMALL)
    (directory / SECOND).write_bytes(bad)
    assert not ndcache.verify(server.url).ok
    assert (directory / ".ndcache" / "aside" / "more%2Fparams_shard_1.bin").read_bytes() == bad
