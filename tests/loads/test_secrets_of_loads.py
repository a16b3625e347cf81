"""Secrets of a load, which are neither shown nor kept."""

from __future__ import annotations

import base64
import logging
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
import requests

import ndcache

from ..helpers import models
from ..helpers.hub import HubServer
from ..helpers.loads import HALF, QUICK, Serve, assert_same, partial_files
from ..helpers.servers import ScriptedServer, reply, then_close, then_stall


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


def test_row_113_only_the_source_is_told_the_token_and_the_headers(tmp_path: Path, serve: Serve) -> None:
    """Mirrors and the storage behind redirects are told nothing."""
    arrays = models.simple_model(tmp_path / "www")
    hub, mirror = HubServer(tmp_path / "www", lfs=(".bin",)), serve(tmp_path / "www")
    hub.failing["params_shard_1.bin"] = 404
    try:
        weights = ndcache.load(
            f"{hub.url}/owner/model/resolve/main/",
            token="secret",
            headers={"X-Key": "secret", "User-Agent": "mine"},
            mirrors=[mirror.url],
        )
        assert_same(weights, arrays)
        assert {str(sent.get("authorization")) for sent in hub.headers} == {"Bearer secret"}
        assert {(sent["x-key"], sent["user-agent"]) for sent in hub.headers} == {("secret", "mine")}
        assert len(hub.storage.requests) == 3
        assert [request.path for request in mirror.requests] == ["/params_shard_1.bin"]
        assert "secret" not in str(hub.storage.requests) + str(mirror.requests)
    finally:
        hub.close()


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({"headers": {"authorization": "Basic own"}}, "Basic own"),
        ({"token": "own"}, "Bearer own"),
    ],
)
def test_options_take_precedence_over_other_credentials(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], sent: str
) -> None:
    models.simple_model(tmp_path / "www")
    server = serve(tmp_path / "www")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    ndcache.read_manifest(server.url.replace("//", "//user:secret@"), **options)
    assert [request.headers["authorization"] for request in server.requests] == [sent]


SECRET = "hunter2"

FORMS = (SECRET.encode(), base64.b64encode(f"user:{SECRET}".encode()))


def everything_in(error: BaseException) -> bytes:
    """Return all that an error shows: text, traceback, causes, fields, pickle, and attached errors."""
    seen = [str(error), repr(error), str(vars(error)), *traceback.format_exception(error)]
    texts = "".join(seen).encode() + pickle.dumps(error)
    others = getattr(error, "others", ())
    causes = [cause for cause in (error.__cause__,) if cause is not None]
    return texts + b"".join(everything_in(other) for other in (*others, *causes))


@pytest.mark.once
@pytest.mark.parametrize("way", ["token", "query", "user and password", "netrc", "session", "redirect", "options"])
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
    if way == "options":
        options |= {"token": SECRET, "headers": {"X-Key": SECRET}}
    seen, ended_with = b"", list[type[BaseException]]()
    with caplog.at_level(logging.DEBUG, "ndcache"), ndcache.Loader(**options) as loader:  # type: ignore[arg-type]
        for _ in range(2):  # the second time from the cache, and from partial files
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
        assert partial_files(cache_dir)
    shown = capsys.readouterr()
    seen += f"{caplog.text} {[vars(record) for record in caplog.records]} {shown.out} {shown.err}".encode()
    seen += f"{reports}".encode() + pickle.dumps(reports)
    for path in cache_dir.rglob("*"):
        seen += str(path).encode() + (path.read_bytes() if path.is_file() else b"")
    assert not any(form in seen for form in FORMS)
