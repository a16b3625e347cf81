"""Interim responses (1xx), row 46 of docs/faults.rst, and the choice among kept connections."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import trustme

import ndcache
from ndcache.http.transport import Transport
from ndcache.workers.cancellation import Cancellation

from ..helpers.servers import Connection, Request, ScriptedServer, Step, reply

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"
HINTS = b'HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nETag: "another"\r\nContent-Length: 7\r\n\r\n'
INTERIM = {
    "100": CONTINUE,
    "100 with headers": b"HTTP/1.1 100 Continue\r\nX-Server: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    "102": PROCESSING,
    "103": HINTS,
    "unknown": b"HTTP/1.1 199 Whatever\r\n\r\n",
    "no reason": b"HTTP/1.1 103\r\n\r\n",
    "several": CONTINUE + HINTS + PROCESSING + CONTINUE + HINTS,
    "many": 300 * PROCESSING,
}
ANSWER = reply(200, b"there", {"ETag": '"right"'})


@pytest.fixture
def transport() -> Iterator[Transport]:
    made = Transport(timeout=(30.0, 30.0))
    yield made
    made.close()


@pytest.fixture
def secure(scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ScriptedServer:
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    scripted.wrap(context)
    return scripted


@pytest.fixture
def proxy() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


def body(transport: Transport, url: str) -> bytes:
    with transport.get(url, {}, Cancellation()) as response:
        assert response.etag == '"right"'
        return response.read(100)


@pytest.mark.parametrize("interim", INTERIM)
@pytest.mark.parametrize("over", ["http", "https"])
def test_row_46_interim_responses_are_skipped(
    request: pytest.FixtureRequest, scripted: ScriptedServer, transport: Transport, interim: str, over: str
) -> None:
    server = request.getfixturevalue("secure") if over == "https" else scripted
    server.script["/a"] = [INTERIM[interim] + ANSWER]
    for _ in range(2):
        assert body(transport, server.url + "a") == b"there"
    assert server.connections == 1


def test_row_46_a_response_may_take_long_to_come(scripted: ScriptedServer, transport: Transport) -> None:
    come = threading.Event()

    def step(connection: Connection, request: Request) -> None:
        for part in (PROCESSING[:10], PROCESSING[10:], HINTS[:30], HINTS[30:] + ANSWER):
            connection.send(part)
            come.wait(0.02)

    scripted.script["/a"] = [step]
    assert body(transport, scripted.url + "a") == b"there"


@pytest.mark.parametrize("session", [False, True], ids=["own session", "the caller's"])
def test_row_46_interim_responses_through_a_proxy(
    scripted: ScriptedServer, proxy: ScriptedServer, monkeypatch: pytest.MonkeyPatch, session: bool
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    proxy.script["http://host.example/a"] = [HINTS + ANSWER]
    with requests.Session() as given:
        transport = Transport(session=given if session else None)
        assert body(transport, "http://host.example/a") == b"there"
        transport.close()


@pytest.mark.parametrize("session", [False, True], ids=["own session", "the caller's"])
def test_row_46_interim_responses_through_a_tunnel(
    secure: ScriptedServer, proxy: ScriptedServer, monkeypatch: pytest.MonkeyPatch, session: bool
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    proxy.script[f"127.0.0.1:{secure.port}"] = [tunnel(secure.port, CONTINUE + HINTS)]
    secure.script["/a"] = [HINTS + ANSWER]
    with requests.Session() as given:
        transport = Transport(session=given if session else None)
        assert body(transport, secure.url + "a") == b"there"
        transport.close()


def tunnel(port: int, before: bytes = b"") -> Step:
    """Answer a CONNECT as a proxy does; `before` is sent before the response."""

    def step(connection: Connection, request: Request) -> None:
        assert request.method == "CONNECT"
        connection.send(before + b"HTTP/1.1 200 Connection established\r\n\r\n")
        connection.pass_on(port)

    return step


def test_row_46_endless_interim_responses_fail(scripted: ScriptedServer, transport: Transport) -> None:
    def step(connection: Connection, request: Request) -> None:
        while True:
            connection.send(100 * PROCESSING)

    scripted.script["/a"] = [step]
    with pytest.raises(ndcache.ProtocolError):
        body(transport, scripted.url + "a")


def test_row_46_a_change_of_the_protocol_fails(scripted: ScriptedServer, transport: Transport) -> None:
    scripted.script |= {
        "/a": [b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"],
        "/b": [ANSWER],
    }
    with pytest.raises(ndcache.ProtocolError, match="101"):
        body(transport, scripted.url + "a")
    assert body(transport, scripted.url + "b") == b"there"
    assert scripted.connections == 2


# --- which connections are kept -------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["http", "https"])
@pytest.mark.parametrize("whose", ["own", "callers"])
def test_row_49_an_open_connection_goes_before_a_new_one(
    request: pytest.FixtureRequest, scripted: ScriptedServer, over: str, whose: str
) -> None:
    """Otherwise a server that limits connections refuses new ones again and again, while an open one lies idle."""
    server = request.getfixturevalue("secure") if over == "https" else scripted
    server.script["/a"] = [reply(200, b"there")]
    server.script["/limited"] = [reply(503, b"busy", {"Connection": "close"})]
    with requests.Session() as session:
        transport = Transport(session=session if whose == "callers" else None, timeout=(30.0, 30.0))
        held = transport.get(server.url + "a", {}, Cancellation())
        with pytest.raises(ndcache.ServerError):
            transport.get(server.url + "limited", {}, Cancellation())
        with held:
            held.read(100)
        with (
            transport.get(server.url + "a", {}, Cancellation()) as busy,
            transport.get(server.url + "a", {}, Cancellation()) as other,
        ):
            assert server.connections == 3
            busy.read(100)
            other.read(100)
        server.script["/last"] = [reply(200, b"there", {"Connection": "close"})]
        with transport.get(server.url + "last", {}, Cancellation()) as closing:
            with transport.get(server.url + "a", {}, Cancellation()) as response:
                response.read(100)
            closing.read(100)
        with transport.get(server.url + "a", {}, Cancellation()) as response:
            response.read(100)
        assert server.connections == 3
        transport.close()
