"""Requests and responses, on real sockets but for the plain table of statuses."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import pickle
import socket
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests
import responses
import trustme

import ndcache
from ndcache.http.transport import Transport
from ndcache.workers.cancellation import Cancellation

from ..helpers.servers import Connection, Request, ScriptedServer, reply, then_close, then_reset, then_stall
from ..helpers.transport import body, get, with_name

SHORT = (30.0, 0.3)


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
def test_row_17_a_certificate_or_cipher_that_is_refused_ends_the_load(
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
            received.append(bytes(piece))
    session.close()
    came = b"".join(received)
    assert came == data[: len(came)]
    assert len(came) > (2 << 20)
    if error is None:
        assert len(came) == len(data)
    assert max(map(len, received)) > 1 << 16  # more than a record of TLS at once


def test_row_17_a_server_that_answers_tls_with_plain_http_is_named() -> None:
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


def test_row_14_a_date_of_retry_after_in_the_form_of_asctime_is_utc(
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
