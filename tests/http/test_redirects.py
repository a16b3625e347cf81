"""Redirects, and the secrets and cookies that go along with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import trustme

import ndcache
from ndcache.http.transport import Transport
from ndcache.location.hub import Login

from ..helpers.servers import Connection, Request, ScriptedServer, reply, then_close
from ..helpers.transport import body, get, with_name


@pytest.fixture
def other() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    server.script["/b"] = [reply(200, b"moved")]
    yield server
    server.close()


def redirect(target: str, status: int = 302) -> bytes:
    return reply(status, b"look elsewhere", {"Location": target})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_within_the_origin_keeps_what_the_caller_sends(scripted: ScriptedServer, status: int) -> None:
    session = requests.Session()
    session.headers["X-Api-Key"] = "secret"
    session.auth = ("user", "secret")
    scripted.script = {"/a": [redirect("/b", status)], "/b": [reply(200, b"moved")]}
    assert body(Transport(session=session), scripted.url + "a") == b"moved"
    session.close()
    second = scripted.requests[1]
    assert second.headers["x-api-key"] == "secret"
    assert "authorization" in second.headers


@pytest.mark.parametrize("differs", ["port", "host", "scheme"])
@pytest.mark.parametrize("by", ["session", "token", "URL", "netrc", "options"])
@pytest.mark.parametrize("status", [302, 308])
def test_row_19_another_origin_gets_no_secrets(
    scripted: ScriptedServer,
    other: ScriptedServer,
    authority: trustme.CA,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    differs: str,
    by: str,
    status: int,
) -> None:
    here = scripted.url
    there = {
        "port": other.url,
        "host": here.replace("127.0.0.1", "localhost"),
        "scheme": here.replace("http:", "https:"),
    }[differs]

    def go_there(connection: Connection, request: Request) -> None:
        if differs == "scheme":
            scripted.wrap(with_name(authority, "127.0.0.1"))  # the same port speaks TLS from the next connection on
        connection.send(redirect(f"{there}b", status))

    scripted.script |= {"/a": [go_there], "/b": [reply(200, b"moved")]}
    session = requests.Session()
    session.headers["X-Api-Key"] = "secret"
    session.cookies.set("id", "secret")
    url = here.replace("//", "//user:secret@") if by == "URL" else here
    if by == "session":
        session.auth = ("user", "secret")
    elif by == "netrc":
        machines = "".join(f"machine {host} login user password secret\n" for host in ("127.0.0.1", "localhost"))
        (tmp_path / "netrc").write_text(machines)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    login = Login({"HF_ENDPOINT": here, "HF_TOKEN": "secret"}) if by == "token" else None
    transport = Transport(
        session=session,
        login=login,
        token="secret" if by == "options" else None,
        headers={"X-Other": "secret"} if by == "options" else None,
    )
    with authority.cert_pem.tempfile() as path:
        session.verify = path
        assert body(transport, f"{url}a") == b"moved"
    transport.close()
    session.close()
    first, *_, last = [*scripted.requests, *other.requests]
    assert (first.path, last.path) == ("/a", "/b")
    assert {"authorization", "cookie", "x-api-key", *(["x-other"] if by == "options" else [])} <= first.headers.keys()
    assert last.headers.keys() == {"host", "accept-encoding", "user-agent"}
    assert "secret" not in str(last)


def test_row_19_cookies_that_a_server_sets_are_not_kept(
    transport: Transport, scripted: ScriptedServer, other: ScriptedServer
) -> None:
    """Cookies do not tell ports apart (RFC 6265, 8.5), so none is kept."""
    cookie = {"Set-Cookie": "id=secret"}
    scripted.script |= {"/a": [reply(302, b"", {"Location": other.url + "b", **cookie})], "/c": [reply(200)]}
    other.script["/b"] = [reply(200, b"moved", cookie)]
    assert body(transport, scripted.url + "a") == b"moved"
    assert body(transport, scripted.url + "c") == b""
    assert not any("cookie" in request.headers for request in scripted.requests + other.requests)


def test_row_19_a_redirect_back_from_elsewhere_gets_no_secrets(scripted: ScriptedServer, other: ScriptedServer) -> None:
    scripted.script |= {"/a": [redirect(other.url + "b")], "/c": [reply(200, b"back")]}
    other.script["/b"] = [redirect(scripted.url + "c")]
    transport = Transport(login=Login({"HF_ENDPOINT": scripted.url, "HF_TOKEN": "secret"}))
    assert body(transport, scripted.url + "a") == b"back"
    transport.close()
    assert ["authorization" in request.headers for request in scripted.requests] == [True, False]


def test_a_password_in_the_url_goes_along_within_the_origin(transport: Transport, scripted: ScriptedServer) -> None:
    scripted.script |= {"/a": [redirect(scripted.url + "b")], "/b": [reply(200, b"moved")]}
    assert body(transport, scripted.url.replace("//", "//user:p%40ss@") + "a") == b"moved"
    assert {request.headers["authorization"] for request in scripted.requests} == {"Basic dXNlcjpwQHNz"}


def test_a_location_in_utf_8(transport: Transport, scripted: ScriptedServer) -> None:
    scripted.script |= {"/a": [redirect("/mod\u00c3\u00a8le")], "/mod%C3%A8le": [reply(200, b"moved")]}
    assert body(transport, scripted.url + "a") == b"moved"


def test_row_19_netrc_is_not_used_for_another_origin(
    scripted: ScriptedServer, other: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    scripted.script["/a"] = [redirect(other.url + "b")]
    transport = Transport()
    assert body(transport, scripted.url + "a") == b"moved"
    transport.close()
    assert "authorization" in scripted.requests[0].headers
    assert "authorization" not in other.requests[0].headers


@pytest.mark.parametrize(
    "target",
    [
        "/tensor-cache.json",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "ftp://host/a",
        "s3://bucket/a",
        "http://[bad/",
        "data:,x",
    ],
)
def test_row_18_a_redirect_to_something_other_than_http_is_refused(scripted: ScriptedServer, target: str) -> None:
    scripted.script["/tensor-cache.json"] = [redirect(target)]
    with pytest.raises(ndcache.RedirectError) as caught:
        ndcache.load(scripted.url, retries=5)
    assert not caught.value.retryable
    assert len(scripted.requests) == 1


def test_row_18_a_circle_of_redirects_is_followed_once(transport: Transport, scripted: ScriptedServer) -> None:
    scripted.script |= {"/a": [redirect("/b")], "/b": [redirect("/c")], "/c": [redirect(scripted.url + "a")]}
    with pytest.raises(ndcache.RedirectError, match="circle"):
        get(transport, scripted.url + "a")
    assert [request.path for request in scripted.requests] == ["/a", "/b", "/c"]


def cookie_wall(target: str, cookie: str = "id=1") -> Any:
    """Redirect requests without the cookie to `target`, with the cookie; answer the others."""

    def step(connection: Connection, request: Request) -> None:
        has_it = cookie in request.headers.get("cookie", "")
        connection.send(
            reply(200, b"there") if has_it else reply(302, b"", {"Location": target, "Set-Cookie": f"{cookie}; Path=/"})
        )

    return step


@pytest.mark.parametrize("absolute", [False, True])
def test_row_46_a_redirect_to_the_same_address_with_a_cookie_is_followed(
    scripted: ScriptedServer, absolute: bool
) -> None:
    scripted.script["/a"] = [cookie_wall(scripted.url + "a" if absolute else "/a")]
    with requests.Session() as session:
        transport = Transport(session=session)
        assert body(transport, scripted.url + "a") == b"there"
        assert body(transport, scripted.url + "a") == b"there"
    assert len(scripted.requests) == 3


def test_row_46_a_redirect_through_a_page_that_sets_a_cookie_is_followed(scripted: ScriptedServer) -> None:
    def page(connection: Connection, request: Request) -> None:
        has_it = "ok=1" in request.headers.get("cookie", "")
        connection.send(reply(200, b"there") if has_it else reply(307, b"", {"Location": "/consent"}))

    cookie = {"Location": "/a", "Set-Cookie": "ok=1; Path=/"}
    scripted.script |= {"/a": [page], "/consent": [reply(303, b"", cookie)]}
    with requests.Session() as session:
        assert body(Transport(session=session), scripted.url + "a") == b"there"
    assert [request.path for request in scripted.requests] == ["/a", "/consent", "/a"]


def test_row_46_a_redirect_to_the_same_address_without_the_callers_session_is_a_circle(
    transport: Transport, scripted: ScriptedServer
) -> None:
    scripted.script["/a"] = [cookie_wall("/a")]
    with pytest.raises(ndcache.RedirectError, match="circle"):
        get(transport, scripted.url + "a")
    assert len(scripted.requests) == 1


@pytest.mark.parametrize(("cookies", "most"), [(["id=1"], 2), ([f"id={n}" for n in range(50)], 11)])
def test_row_46_the_same_cookie_again_is_a_circle(scripted: ScriptedServer, cookies: list[str], most: int) -> None:
    scripted.script["/a"] = [reply(302, b"", {"Location": "/a", "Set-Cookie": cookie}) for cookie in cookies]
    with requests.Session() as session, pytest.raises(ndcache.RedirectError, match="circle"):
        get(Transport(session=session), scripted.url + "a")
    assert len(scripted.requests) == most


def test_row_46_a_model_behind_redirects_that_set_cookies_is_loaded(scripted: ScriptedServer, tmp_path: Path) -> None:
    ndcache.dump({"a": np.arange(9)}, tmp_path / "model")
    manifest, shard = ((tmp_path / "model" / name).read_bytes() for name in ("tensor-cache.json", "params_shard_0.bin"))

    def behind_the_wall(data: bytes, path: str) -> Any:
        wall = cookie_wall(path)

        def step(connection: Connection, request: Request) -> None:
            if "id=1" in request.headers.get("cookie", ""):
                connection.send(reply(200, data))
            else:
                wall(connection, request)

        return step

    files = {"/tensor-cache.json": manifest, "/params_shard_0.bin": shard}
    scripted.script = {path: [behind_the_wall(data, path)] for path, data in files.items()}
    with requests.Session() as session:
        assert ndcache.load(scripted.url, session=session)["a"].tolist() == list(range(9))


def test_row_18_an_endless_chain_of_redirects_ends(transport: Transport, scripted: ScriptedServer) -> None:
    scripted.script |= {f"/{n}": [redirect(f"/{n + 1}")] for n in range(100)}
    with pytest.raises(ndcache.RedirectError):
        get(transport, scripted.url + "0")
    assert len(scripted.requests) < 20


def test_row_18_no_redirect_from_https_to_http(
    secure: ScriptedServer, authority: trustme.CA, other: ScriptedServer
) -> None:
    secure.script["/a"] = [redirect(other.url + "b")]
    session = requests.Session()
    with authority.cert_pem.tempfile() as path:
        session.verify = path
        with pytest.raises(ndcache.RedirectError, match="from https"):
            get(Transport(session=session), secure.url + "a")
    session.close()
    assert not other.requests


def test_the_body_of_a_redirect_is_not_collected(transport: Transport, scripted: ScriptedServer) -> None:
    announced = 1 << 40
    scripted.script["/a"] = [then_close(redirect("/b").replace(b"Length: 14", f"Length: {announced}".encode()))]
    scripted.script["/b"] = [reply(200, b"moved")]
    assert body(transport, scripted.url + "a") == b"moved"
