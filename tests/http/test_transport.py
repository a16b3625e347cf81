"""Requests and responses, on real sockets but for the plain table of statuses."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import os
import pickle
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import responses
import trustme

import ndcache
from ndcache.http.response import Response
from ndcache.http.transport import Transport
from ndcache.location.hub import Login
from ndcache.workers.cancellation import Cancellation

from ..helpers.servers import Connection, Request, ScriptedServer, reply, then_close, then_reset, then_stall

SHORT = (30.0, 0.3)


@pytest.fixture
def transport() -> Iterator[Transport]:
    made = Transport()
    yield made
    made.close()


def get(
    transport: Transport, url: str, cancellation: Cancellation | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    return transport.get(url, headers or {}, cancellation or Cancellation())


def body(transport: Transport, url: str, **options: Any) -> bytes:
    with get(transport, url, **options) as response:
        return response.read(1 << 20)


# --- statuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "headers", "error"),
    [
        (401, {}, ndcache.AuthError),
        (403, {}, ndcache.AuthError),
        (404, {}, ndcache.NotFoundError),
        (410, {}, ndcache.NotFoundError),
        (408, {}, ndcache.ServerError),
        (429, {}, ndcache.RateLimitedError),
        (500, {}, ndcache.ServerError),
        (502, {}, ndcache.ServerError),
        (503, {}, ndcache.ServerError),
        (503, {"Retry-After": "3"}, ndcache.RateLimitedError),
        (504, {}, ndcache.ServerError),
        (204, {}, ndcache.ProtocolError),
        (300, {}, ndcache.ProtocolError),
        (418, {}, ndcache.ProtocolError),
        (200, {"Content-Encoding": "gzip"}, ndcache.ProtocolError),
        (200, {"Content-Encoding": "br"}, ndcache.ProtocolError),
    ],
)
def test_each_status_is_its_error(
    transport: Transport, status: int, headers: dict[str, str], error: type[ndcache.TransferError]
) -> None:
    url = "http://user:secret@host.example/model/a.bin?signature=secret"
    with responses.RequestsMock() as mock:
        mock.add(responses.GET, url.replace("user:secret@", ""), status=status, headers=headers)
        with pytest.raises(error) as caught:
            get(transport, url)
    assert type(caught.value) is error
    assert caught.value.status == status
    assert "secret" not in str(caught.value) + repr(caught.value) + repr(pickle.dumps(caught.value))


def test_a_body_comes_whole_and_its_connection_is_used_again(transport: Transport, scripted: ScriptedServer) -> None:
    data = bytes(range(256)) * 1000
    seen: set[tuple[str, int]] = set()

    def remember(connection: Connection, request: Request) -> None:
        seen.add(connection.sock.getpeername())
        connection.send(reply(200, data))
        again = connection.read_request()
        assert again is not None
        connection.send(reply(200, b"second"))

    scripted.script["/a"] = [remember]
    assert body(transport, scripted.url + "a") == data
    assert body(transport, scripted.url + "b") == b"second"
    assert len(seen) == 1


def test_only_the_identity_encoding_is_asked_for(transport: Transport, scripted: ScriptedServer) -> None:
    scripted.script["/a"] = [reply(200, b"x")]
    body(transport, scripted.url + "a")
    assert scripted.requests[0].headers["accept-encoding"] == "identity"
    assert scripted.requests[0].headers["user-agent"] == f"ndcache/{ndcache.__version__}"


# --- bad responses ------------------------------------------------------------------------------------

LENGTH = "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\nabc"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (LENGTH.format("-3"), ndcache.ProtocolError),
        (LENGTH.format("3x"), ndcache.ProtocolError),
        (LENGTH.format("+3"), ndcache.ProtocolError),
        (LENGTH.format("1_0"), ndcache.ProtocolError),
        (LENGTH.format("٣").encode().decode("latin-1"), ndcache.ProtocolError),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", ndcache.ProtocolError),
        ("HTTP/1.1 2000 OK\r\n\r\n", ndcache.ProtocolError),
        ("HTTP/1.1 abc OK\r\n\r\n", ndcache.ProtocolError),
        ("SSH-2.0-OpenSSH_9.2\r\n\r\n", ndcache.ProtocolError),
        ("HTTP/1.1 200 OK\r\n" + "X: " + "x" * 70_000 + "\r\n\r\n", ndcache.ProtocolError),
        ("HTTP/1.1 200 OK\r\n" + "X: x\r\n" * 200 + "\r\n", ndcache.ProtocolError),
        ("", ndcache.ConnectError),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else value.__name__,
)
def test_a_response_that_is_not_http(
    transport: Transport, scripted: ScriptedServer, answer: str, error: type[ndcache.TransferError]
) -> None:
    scripted.script["/a"] = [then_close(answer.encode("latin-1"))]
    with pytest.raises(error) as caught, get(transport, scripted.url + "a") as response:
        assert response.content_length is not None
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (then_close(reply(200, b"abc", length=10)), ndcache.TruncatedError),
        (
            then_close(reply(200, b"5\r\nab", {"Transfer-Encoding": "chunked"}, length=None)),
            ndcache.TruncatedError,
        ),
        (then_reset(reply(200, b"abc", length=1 << 20)), ndcache.ConnectError),
    ],
    ids=["cut", "chunked and cut", "reset"],
)
def test_a_body_that_ends_early(
    transport: Transport, scripted: ScriptedServer, step: Any, error: type[ndcache.TransferError]
) -> None:
    scripted.script["/a"] = [step]
    with pytest.raises(error) as caught, get(transport, scripted.url + "a") as response:
        response.read(1 << 20)
    assert type(caught.value) is error
    assert caught.value.retryable


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nX:", reply(200, b"abc", length=10)])
def test_row_13_a_silent_server_fails_after_the_read_timeout(scripted: ScriptedServer, sent: bytes) -> None:
    scripted.script["/a"] = [then_stall(sent)]
    transport, begun = Transport(timeout=SHORT), time.monotonic()
    with pytest.raises(ndcache.StallError) as caught, get(transport, scripted.url + "a") as response:
        response.read(1 << 20)
    waited = time.monotonic() - begun
    transport.close()
    assert caught.value.retryable
    assert SHORT[1] <= waited < SHORT[0]  # so it was not the timeout for connecting, or another one


def test_a_chunked_body_is_put_together(transport: Transport, scripted: ScriptedServer) -> None:
    chunks = b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    scripted.script["/a"] = [reply(200, chunks, {"Transfer-Encoding": "chunked"}, length=None)]
    assert body(transport, scripted.url + "a") == b"abcde"


def test_a_compressed_body_is_never_decoded(transport: Transport, scripted: ScriptedServer) -> None:
    scripted.script["/a"] = [reply(200, b"\x1f\x8b" + b"\0" * 1000, {"Content-Encoding": "gzip"})]
    with pytest.raises(ndcache.ProtocolError, match="gzip"):
        get(transport, scripted.url + "a")


# --- no connection ------------------------------------------------------------------------------------


def test_nobody_listens(transport: Transport, scripted: ScriptedServer) -> None:
    scripted.close()
    with pytest.raises(ndcache.ConnectError, match="refuses connections"):
        get(transport, scripted.url)


def test_an_unknown_host(transport: Transport) -> None:
    with pytest.raises(ndcache.ConnectError, match=r"host nowhere\.invalid is not known"):
        get(transport, "http://nowhere.invalid/")


def test_a_proxy_that_does_not_exist(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@127.0.0.1:9")
    with pytest.raises(ndcache.ConnectError, match="proxy") as caught:
        get(transport, "http://host.example/")
    assert "secret" not in str(caught.value)


def test_row_40_the_cause_shows_no_secrets(transport: Transport, scripted: ScriptedServer) -> None:
    scripted.close()
    with pytest.raises(ndcache.ConnectError) as caught:
        get(transport, scripted.url.replace("//", "//user:secret@") + "a?signature=secret")
    error: BaseException | None = caught.value
    while error is not None:
        assert "secret" not in str(error)
        error = error.__cause__


# --- TLS ----------------------------------------------------------------------------------------------


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secure(scripted: ScriptedServer, authority: trustme.CA) -> ScriptedServer:
    """Let the scripted server speak TLS with a certificate of `authority`."""
    scripted.wrap(with_name(authority, "127.0.0.1"))
    return scripted


def with_name(authority: trustme.CA, name: str, **options: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, **options).configure_cert(context)
    return context


def long_ago() -> dict[str, datetime.datetime]:
    then = datetime.datetime(2001, 1, 1, tzinfo=datetime.timezone.utc)
    return {"not_before": then, "not_after": then + datetime.timedelta(days=1)}


def only_unknown_ciphers(authority: trustme.CA) -> ssl.SSLContext:
    context = with_name(authority, "127.0.0.1")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("PSK")
    return context


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: with_name(trustme.CA(), "127.0.0.1"), "certificate verify failed"),
        (lambda known: with_name(known, "host.example"), "certificate verify failed"),
        (lambda known: with_name(known, "127.0.0.1", **long_ago()), "certificate verify failed"),
        (only_unknown_ciphers, "handshake"),
    ],
    ids=["unknown authority", "another host", "expired", "no cipher in common"],
)
def test_row_17_one_connection_and_no_downgrade(
    scripted: ScriptedServer,
    authority: trustme.CA,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[trustme.CA], ssl.SSLContext],
    message: str,
) -> None:
    scripted.wrap(make(authority))
    with authority.cert_pem.tempfile() as path:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", path)
        with pytest.raises(ndcache.TLSError, match=message) as caught:
            ndcache.load(scripted.url, retries=5)
    assert not caught.value.retryable
    assert caught.value.attempts in (None, 1)
    assert scripted.connections == 1
    assert not scripted.requests


def test_tls_with_a_known_authority(secure: ScriptedServer, authority: trustme.CA) -> None:
    session = requests.Session()
    secure.script["/a"] = [reply(200, b"abc")]
    with authority.cert_pem.tempfile() as path:
        session.verify = path
        assert body(Transport(session=session), secure.url + "a") == b"abc"
    session.close()


@pytest.mark.parametrize(
    ("ending", "error"), [(then_close, ndcache.TruncatedError), (then_stall, ndcache.StallError), (None, None)]
)
def test_large_bodies_over_tls(secure: ScriptedServer, authority: trustme.CA, ending: Any, error: Any) -> None:
    data = np.random.default_rng(0).bytes(4 << 20)
    whole = reply(200, data)
    secure.script["/a"] = [whole if ending is None else ending(whole[: -1 << 20])]
    session, received = requests.Session(), []
    with authority.cert_pem.tempfile() as path, contextlib.ExitStack() as stack:
        session.verify = path
        transport = Transport(session=session, timeout=(10, 0.5))
        response = stack.enter_context(transport.get(secure.url + "a", {}, Cancellation()))
        if error is not None:
            stack.enter_context(pytest.raises(error))
        while piece := response.read_some(1 << 18):
            received.append(piece)
    session.close()
    came = b"".join(received)
    assert came == data[: len(came)]
    assert len(came) > (2 << 20)
    if error is None:
        assert len(came) == len(data)
    assert max(map(len, received)) > 1 << 16  # more than a record of TLS at once


def test_row_17_plain_http_on_a_tls_port() -> None:
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    with sock, contextlib.suppress(ConnectionError):
                        received.append(sock.recv(1 << 16))
                        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                        sock.shutdown(socket.SHUT_WR)
                        while sock.recv(1 << 16):
                            pass

        done = pool.submit(answer)
        with pytest.raises(ndcache.TLSError, match="plain http"):
            ndcache.load(f"https://127.0.0.1:{listener.getsockname()[1]}/", retries=5)
        listener.shutdown(socket.SHUT_RDWR)
        done.result(30)
    (hello,) = received
    assert hello[:1] == b"\x16"  # a TLS handshake, and nothing in plain text
    assert b"GET" not in hello


# --- redirects ----------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("by", ["session", "token", "URL", "netrc"])
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
    transport = Transport(session=session, login=login)
    with authority.cert_pem.tempfile() as path:
        session.verify = path
        assert body(transport, f"{url}a") == b"moved"
    transport.close()
    session.close()
    first, *_, last = [*scripted.requests, *other.requests]
    assert (first.path, last.path) == ("/a", "/b")
    assert {"authorization", "cookie", "x-api-key"} <= first.headers.keys()
    assert last.headers.keys() == {"host", "accept-encoding", "user-agent"}
    assert "secret" not in str(last)


def test_row_19_cookies_that_a_server_sets(
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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [KeyError, ValueError, OSError, KeyboardInterrupt])
def test_the_response_is_closed_when_a_hook_of_the_callers_raises(
    scripted: ScriptedServer, kind: type[BaseException]
) -> None:
    seen: list[requests.Response] = []

    def hook(answer: requests.Response, **_: Any) -> None:
        seen.append(answer)
        raise kind("mine")

    scripted.script["/a"] = [reply(200, b"body" * 1000)]
    with requests.Session() as session:
        session.hooks["response"].append(hook)
        with pytest.raises((kind, ndcache.TransferError)):
            get(Transport(session=session), scripted.url + "a")
        assert seen[0].raw.closed


def test_a_hook_of_the_callers_that_raises(scripted: ScriptedServer) -> None:
    scripted.script["/a"] = [reply(404)]
    for hooks in (lambda answer, **_: answer.raise_for_status(), [lambda answer, **_: answer.raise_for_status()]):
        session = requests.Session()
        session.hooks = {"response": hooks}
        with pytest.raises(ndcache.NotFoundError) as caught:
            get(Transport(session=session), scripted.url + "a?signature=secret")
        session.close()
        assert "secret" not in str(caught.value) + str(caught.value.__cause__)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # urllib3 drops that connection
def test_row_40_a_header_that_cannot_be_sent_is_not_shown(scripted: ScriptedServer) -> None:
    session = requests.Session()
    session.headers["Authorization"] = "Bearer secret\n"
    with pytest.raises(ndcache.AuthError, match="Authorization") as caught:
        get(Transport(session=session), scripted.url)
    session.close()
    assert "secret" not in str(caught.value) + str(caught.value.__cause__)


def test_a_kept_connection_that_the_server_has_closed_costs_nothing(
    transport: Transport, scripted: ScriptedServer
) -> None:
    def once(connection: Connection, request: Request) -> None:
        connection.send(reply(200, b"first"))
        connection.read_request()  # and hang up instead of an answer

    scripted.script = {"/a": [once], "/b": [reply(200, b"second")]}
    assert body(transport, scripted.url + "a") == b"first"
    assert body(transport, scripted.url + "b") == b"second"


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
        "http://[bad/",
        "data:,x",
    ],
)
def test_row_18_redirects_that_are_not_followed(scripted: ScriptedServer, target: str) -> None:
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
def test_row_46_back_to_the_same_address_with_a_cookie(scripted: ScriptedServer, absolute: bool) -> None:
    scripted.script["/a"] = [cookie_wall(scripted.url + "a" if absolute else "/a")]
    with requests.Session() as session:
        transport = Transport(session=session)
        assert body(transport, scripted.url + "a") == b"there"
        assert body(transport, scripted.url + "a") == b"there"
    assert len(scripted.requests) == 3


def test_row_46_a_cookie_from_another_path(scripted: ScriptedServer) -> None:
    def page(connection: Connection, request: Request) -> None:
        has_it = "ok=1" in request.headers.get("cookie", "")
        connection.send(reply(200, b"there") if has_it else reply(307, b"", {"Location": "/consent"}))

    cookie = {"Location": "/a", "Set-Cookie": "ok=1; Path=/"}
    scripted.script |= {"/a": [page], "/consent": [reply(303, b"", cookie)]}
    with requests.Session() as session:
        assert body(Transport(session=session), scripted.url + "a") == b"there"
    assert [request.path for request in scripted.requests] == ["/a", "/consent", "/a"]


def test_row_46_without_a_session_of_the_callers_it_is_a_circle(transport: Transport, scripted: ScriptedServer) -> None:
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


def test_row_46_a_load_behind_a_cookie_wall(scripted: ScriptedServer, tmp_path: Path) -> None:
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


# --- Retry-After --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0),
        ("7", 7),
        ("99999999999", 1e10),
        ("-1", None),
        ("soon", None),
        ("", None),
        ("1.5", None),
        (email.utils.formatdate(0, usegmt=True), 0),
    ],
)
def test_row_14_retry_after_in_seconds(
    transport: Transport, scripted: ScriptedServer, value: str, expected: float | None
) -> None:
    scripted.script["/a"] = [reply(429, b"", {"Retry-After": value})]
    with pytest.raises(ndcache.RateLimitedError) as caught:
        get(transport, scripted.url + "a")
    assert caught.value.retry_after == expected


def test_row_14_a_date_in_the_oldest_form_is_utc(
    transport: Transport, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC 9110, 5.6.7."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        date = time.asctime(time.gmtime(time.time() + 10_000))
        scripted.script["/a"] = [reply(503, b"", {"Retry-After": date})]
        with pytest.raises(ndcache.RateLimitedError) as caught:
            get(transport, scripted.url + "a")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert caught.value.retry_after is not None
    assert 9_000 < caught.value.retry_after <= 10_000


def test_row_14_retry_after_as_a_date(transport: Transport, scripted: ScriptedServer) -> None:
    date = email.utils.formatdate(time.time() + 1000, usegmt=True)
    scripted.script["/a"] = [reply(503, b"", {"Retry-After": date})]
    with pytest.raises(ndcache.RateLimitedError) as caught:
        get(transport, scripted.url + "a")
    assert caught.value.retry_after is not None
    assert 900 < caught.value.retry_after <= 1000


# --- cancellation -------------------------------------------------------------------------------------


BEGUN = reply(200, b"abc", length=10)


@pytest.mark.parametrize(
    ("sent", "callers_session"),
    # The connections of a caller's session can be shut only once the headers have come.
    [(b"", False), (BEGUN, False), (BEGUN, True)],
    ids=["headers", "body", "body of a caller's session"],
)
def test_row_36_cancellation_wakes_a_thread_that_waits_for_the_server(
    scripted: ScriptedServer, sent: bytes, callers_session: bool
) -> None:
    reached = threading.Event()

    def step(connection: Connection, request: Request) -> None:
        connection.send(sent)
        reached.set()
        connection.stall()

    scripted.script["/a"] = [step]
    session = requests.Session() if callers_session else None
    transport, cancellation = Transport(session=session, timeout=(60, 60)), Cancellation()
    taken = threading.Event()

    def request() -> bytes:
        with get(transport, scripted.url + "a", cancellation) as response:
            taken.set()
            return response.read(100)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(request)
        assert reached.wait(30)
        if sent:
            assert taken.wait(30)
        cancellation.set()
        with pytest.raises(ndcache.CancelledError):
            future.result(30)
    transport.close()
    if session:
        session.close()


def test_row_36_cancellation_wakes_sleepers_and_refuses_requests(transport: Transport) -> None:
    cancellation = Cancellation()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(cancellation.sleep, 1000)
        cancellation.set()
        with pytest.raises(ndcache.CancelledError):
            future.result(30)
    with pytest.raises(ndcache.CancelledError):
        get(transport, "http://127.0.0.1:9/", cancellation)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_makes_connections_of_its_own(transport: Transport, scripted: ScriptedServer) -> None:
    peers: list[int] = []

    def step(connection: Connection, request: Request) -> None:
        peers.append(connection.sock.getpeername()[1])
        while True:
            connection.send(reply(200, b"abc"))
            if connection.read_request() is None:
                return
            peers.append(connection.sock.getpeername()[1])

    scripted.script["/a"] = [step]
    assert body(transport, scripted.url + "a") == b"abc"
    child = os.fork()
    if child == 0:
        os._exit(0 if body(transport, scripted.url + "a") == b"abc" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert body(transport, scripted.url + "a") == b"abc"
    assert peers[0] == peers[2] != peers[1]


# --- connecting ---------------------------------------------------------------------------------------


@pytest.fixture
def deaf() -> Iterator[str]:
    """Give the address of a server whose queue is full, so that connecting to it takes for ever."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def mute() -> Iterator[str]:
    """Give the address of a server that accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("phase", ["deaf", "mute"])
def test_row_36_connecting_and_tls_handshakes_are_cancelled(request: pytest.FixtureRequest, phase: str) -> None:
    url = f"https://{request.getfixturevalue(phase)}/"
    cancellation, transport = Cancellation(), Transport(timeout=(300.0, 300.0))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(get, transport, url, cancellation)
        while not any(watch.wakers for watch in list(cancellation._watches)):
            time.sleep(0.01)
        cancellation.set()
        with pytest.raises(ndcache.CancelledError):
            future.result(60)
    transport.close()


def test_row_12_connecting_has_a_timeout_of_its_own(deaf: str) -> None:
    """A server that is slow to accept a connection has not stalled."""
    cancellation, transport = Cancellation(), Transport(timeout=(1.0, 0.1))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(get, transport, f"http://{deaf}/", cancellation)
        while not future.done():
            cancellation.poll()
            time.sleep(0.01)
        with pytest.raises(ndcache.ConnectError, match="did not answer in time"):
            future.result()
    transport.close()


def test_row_13_a_server_that_is_silent_in_the_handshake(mute: str) -> None:
    transport = Transport(timeout=(30.0, 0.3))
    with pytest.raises(ndcache.StallError), ThreadPoolExecutor(1) as pool:
        cancellation = Cancellation()
        future = pool.submit(get, transport, f"https://{mute}/", cancellation)
        while not future.done():
            cancellation.poll()
            time.sleep(0.01)
        future.result()
    transport.close()


def test_an_address_that_does_not_answer_is_not_the_last(
    transport: Transport, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens where a host has an IPv6 address and the network does not."""
    look_up = socket.getaddrinfo

    def two_addresses(host: str, port: int, *args: Any) -> list[Any]:
        (family, kind, protocol, name, _), *_ = found = look_up(host, port, *args)
        return [(family, kind, protocol, name, ("127.0.0.1", 1)), *found]

    monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
    scripted.script["/a"] = [reply(200, b"there")]
    assert body(transport, scripted.url + "a") == b"there"


@pytest.mark.parametrize("host", ["a" * 63, "no-such-host.invalid"])
def test_row_12_an_unknown_host(transport: Transport, host: str) -> None:
    with pytest.raises(ndcache.ConnectError, match="is not known"):
        get(transport, f"http://{host}/")


def test_row_40_the_query_is_not_in_the_log_of_urllib3(
    transport: Transport, scripted: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    scripted.script["/a"] = [reply(200, b"there")]
    with caplog.at_level("DEBUG"):
        assert body(transport, scripted.url + "a?signature=secret&x") == b"there"
        requests.get(scripted.url + "a?of=others", timeout=30).close()
    assert "GET /a?" in caplog.text
    assert "secret" not in caplog.text
    assert "of=others" in caplog.text


def test_row_36_a_request_of_the_callers_session_is_cancelled_before_the_headers(scripted: ScriptedServer) -> None:
    scripted.script |= {"/first": [reply(200)], "/a": [then_stall(b"HTTP/1.1 200")]}
    with requests.Session() as session:
        session.get(scripted.url + "first", timeout=30)  # a connection that it made itself
        cancellation, transport = Cancellation(), Transport(session=session, timeout=(300.0, 300.0))
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(get, transport, scripted.url + "a", cancellation)
            while not scripted.requests_for("/a"):
                time.sleep(0.01)
            cancellation.set()
            with pytest.raises(ndcache.CancelledError):
                future.result(60)
        assert session.get(scripted.url + "first", timeout=30).status_code == 200


def test_an_address_of_a_family_that_is_not_there_is_not_the_last(
    transport: Transport, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up = socket.getaddrinfo

    def with_another_family(*args: Any) -> list[Any]:
        (_, *rest), *_ = found = look_up(*args)
        return [(9999, *rest), *found]

    monkeypatch.setattr(socket, "getaddrinfo", with_another_family)
    scripted.script["/a"] = [reply(200, b"there")]
    assert body(transport, scripted.url + "a") == b"there"


def test_connections_are_closed_by_close_and_not_by_finalizers(transport: Transport, scripted: ScriptedServer) -> None:
    """In a finalizer, Ctrl-C would be lost."""
    hung_up = threading.Event()

    def answer(connection: Connection, _: Request) -> None:
        connection.send(reply(200, b"body"))
        with contextlib.suppress(EOFError, OSError):
            connection.read_request()
        hung_up.set()

    scripted.script["/a"] = [answer]
    assert body(transport, scripted.url + "a") == b"body"
    session = transport._sessions.get(with_secrets=True)
    pool = session.get_adapter(scripted.url).poolmanager.connection_from_url(scripted.url)  # type: ignore[attr-defined]
    transport.close()
    assert hung_up.wait(30)
    assert pool.pool is not None  # a request that is about to use the pool still can
