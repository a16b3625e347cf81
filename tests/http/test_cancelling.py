"""Cancellation of requests, timeouts, and connections to hosts that do not answer."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

import ndcache
from ndcache.http.transport import Transport
from ndcache.workers.cancellation import Cancellation

from ..helpers.servers import Connection, Request, ScriptedServer, reply, then_stall
from ..helpers.transport import body, get

SHORT = (30.0, 0.3)


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
