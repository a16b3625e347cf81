"""Our own sessions of requests: when they read the environment and netrc, and what they send."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

import ndcache
from ndcache.http.transport import Transport

from ..helpers.models import simple_model
from ..helpers.servers import FileServer, ScriptedServer, reply
from ..helpers.transport import body


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the hosts for which the environment and netrc have been read."""
    hosts: list[str] = []
    read_proxies, read_netrc = requests.sessions.get_environ_proxies, requests.utils.get_netrc_auth

    def environ_proxies(url: str, **options: object) -> object:
        hosts.append(f"environment {url.split('/')[2]}")
        return read_proxies(url, **options)  # type: ignore[arg-type]

    def netrc_auth(url: str, **options: object) -> object:
        hosts.append(f"netrc {url.split('/')[2]}")
        return read_netrc(url, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(requests.sessions, "get_environ_proxies", environ_proxies)
    monkeypatch.setattr(requests.utils, "get_netrc_auth", netrc_auth)
    return hosts


def test_settings_are_read_once_for_each_origin(
    transport: Transport, scripted: ScriptedServer, reads: list[str]
) -> None:
    host = scripted.url.split("/")[2]
    other = host.replace("127.0.0.1", "localhost")
    scripted.script |= {f"/{name}": [reply(200, b"x")] for name in "abcd"}
    for name in "abc":
        assert body(transport, scripted.url + name) == b"x"
    assert sorted(reads) == [f"environment {host}", f"netrc {host}"]
    assert body(transport, f"http://{other}/d") == b"x"
    assert sorted(reads[2:]) == [f"environment {other}", f"netrc {other}"]


def test_settings_are_read_once_in_each_load(serve_model: FileServer, reads: list[str], tmp_path: Path) -> None:
    with ndcache.Loader(cache_dir=tmp_path / "cache") as loader:
        loader.fetch(serve_model.url)
        assert len(serve_model.requests) == 5
        assert len(reads) == 2
        loader.delete(serve_model.url)
        loader.fetch(serve_model.url)
        assert len(reads) == 4


def test_a_loader_notices_credentials_that_come_later(
    serve_model: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with ndcache.Loader(cache_dir=tmp_path / "cache") as loader:
        loader.read_manifest(serve_model.url)
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        loader.fetch(serve_model.url)
    before, *after = [request.headers.get("authorization") for request in serve_model.requests]
    assert before is None
    assert after == ["Basic dXNlcjpzZWNyZXQ="] * 5


def test_a_loader_notices_a_proxy_that_comes_later(
    serve_model: FileServer, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with ndcache.Loader(cache_dir=tmp_path / "cache", retries=0) as loader:
        loader.fetch(serve_model.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", scripted.url)
        url = f"{serve_model.url}tensor-cache.json"
        scripted.script[url] = [reply(407, b"")]
        with pytest.warns(RuntimeWarning, match="using the cached manifest.*http_proxy"):
            loader.read_manifest(serve_model.url)


def test_requests_have_no_headers_but_ours(transport: Transport, scripted: ScriptedServer) -> None:
    scripted.script["/a"] = [reply(200, b"x", {"Set-Cookie": "a=b"}), reply(200, b"x")]
    for _ in range(2):
        assert body(transport, scripted.url + "a", headers={"If-None-Match": '"1"'}) == b"x"
    for request in scripted.requests:
        assert request.headers == {
            "host": scripted.url.split("/")[2],
            "user-agent": f"ndcache/{ndcache.__version__}",
            "accept-encoding": "identity",
            "if-none-match": '"1"',
        }


@pytest.fixture
def serve_model(tmp_path: Path, serve: object) -> FileServer:
    """Serve a model of four shards."""
    simple_model(tmp_path / "model", shards=4)
    server = serve(tmp_path / "model")  # type: ignore[operator]
    assert isinstance(server, FileServer)
    return server
