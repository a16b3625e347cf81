"""Manifests that cannot be used: nothing is kept of them, and no shard is requested."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ndcache

from ..helpers import models
from ..helpers.loads import QUICK, Serve, assert_same, published
from ..helpers.servers import Connection, Request, ScriptedServer, reply, then_close


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
def test_row_20_an_unsafe_path_is_refused_before_any_shard_is_requested(
    model: Path, scripted: ScriptedServer, cache_dir: Path, path: str
) -> None:
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
def test_row_22_an_endless_manifest_is_refused(scripted: ScriptedServer, length: int | None) -> None:
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


def test_row_22_an_endless_local_manifest_is_refused(model: Path) -> None:
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
def test_row_24_an_unknown_dtype_or_format_matters_when_its_tensor_is_requested(
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
