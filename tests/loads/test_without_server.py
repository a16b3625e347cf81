"""Loads without a server: from the cache, offline, and from a local directory."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ndcache

from ..helpers import models
from ..helpers.loads import Serve, assert_same, flip
from ..helpers.servers import ScriptedServer, reply, then_close, then_reset, then_stall


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
def test_row_34_without_the_server_a_cached_model_is_used(model: Path, serve: Serve, verb: str) -> None:
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
def test_row_33_offline_nothing_is_requested(
    model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, how: str, verb: str
) -> None:
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


def test_warnings_name_the_callers_line(model: Path, serve: Serve) -> None:
    models.simple_model(model)
    server = serve(model)
    ndcache.load(server.url)
    server.close()
    for load in (ndcache.load, ndcache.Loader().load):
        with pytest.warns(RuntimeWarning) as caught:
            load(server.url)
        assert [warning.filename for warning in caught] == [__file__]
