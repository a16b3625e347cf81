"""Bodies are read in a tight loop: over plain connections, TLS and proxies, with and without private names of `ssl`."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
import trustme

import ndcache
from ndcache.http import raw_response
from ndcache.http.transport import Transport
from ndcache.workers.cancellation import Cancellation

from ..helpers.servers import Connection, Request, ScriptedServer, reply

DATA = os.urandom((3 << 20) + 12_345)
HALF = len(DATA) // 2
SHARD = "/params_shard_0.bin"
ROUTES = ["plain", "TLS", "TLS with public names only", "TLS through a proxy", "TLS through a proxy with TLS"]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def proxy() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture(params=ROUTES)
def server(
    request: pytest.FixtureRequest,
    scripted: ScriptedServer,
    proxy: ScriptedServer,
    authority: trustme.CA,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> ScriptedServer:
    """Serve a model of one shard; the route to the server is one of `ROUTES`."""
    scripted.script["/tensor-cache.json"] = [reply(200, manifest())]
    if request.param == "plain":
        return scripted
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    scripted.wrap(context)
    if "public" in request.param:
        monkeypatch.setattr(raw_response, "_TLS_OBJECT", "a name that no Python has")
    if "proxy" in request.param:
        if "with TLS" in request.param:
            proxy.wrap(context)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        proxy.script[f"127.0.0.1:{scripted.port}"] = [functools.partial(tunnel, scripted.port)]
    return scripted


@pytest.fixture
def transport() -> Iterator[Transport]:
    made = Transport(timeout=(30.0, 30.0))
    yield made
    made.close()


def tunnel(port: int, connection: Connection, request: Request) -> None:
    """Answer a CONNECT, and pass bytes on in one thread, as two must not use a TLS connection at once."""
    connection.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
    front = connection.sock
    with socket.create_connection(("127.0.0.1", port)) as behind:
        other = {front: behind, behind: front}
        while True:
            is_pending = isinstance(front, ssl.SSLSocket) and front.pending()
            for sock in [front] if is_pending else select.select([front, behind], [], [])[0]:
                data = sock.recv(1 << 16)
                if not data:
                    return
                other[sock].sendall(data)


def manifest() -> bytes:
    record = {"name": "a", "shape": [len(DATA)], "dtype": "uint8", "format": "raw", "byteOffset": 0}
    shard = {"dataPath": SHARD[1:], "format": "raw-shard", "nbytes": len(DATA), "md5sum": hashlib.md5(DATA).hexdigest()}
    return json.dumps({"metadata": {}, "records": [{**shard, "records": [{**record, "nbytes": len(DATA)}]}]}).encode()


def test_a_model_arrives(server: ScriptedServer) -> None:
    server.script[SHARD] = [reply(200, DATA)]
    weights = ndcache.load(server.url)
    assert weights["a"].tobytes() == DATA
    assert weights.stats.network_bytes == len(DATA)


@pytest.mark.parametrize("framing", ["length", "chunked", "neither"])
def test_what_has_arrived_is_returned_at_once_and_in_few_pieces(
    server: ScriptedServer, transport: Transport, framing: str
) -> None:
    first, sent, taken = DATA[:200_000], threading.Event(), threading.Event()

    def step(connection: Connection, request: Request) -> None:
        def frame(data: bytes) -> bytes:
            return b"%x\r\n%s\r\n" % (len(data), data) if framing == "chunked" else data

        headers = {"Transfer-Encoding": "chunked"} if framing == "chunked" else {}
        connection.send(reply(200, b"", headers, length=len(DATA) if framing == "length" else None))
        connection.send(frame(first))
        sent.set()
        assert taken.wait(30)
        connection.send(frame(DATA[len(first) :]))
        if framing == "chunked":
            connection.send(b"0\r\n\r\n")

    server.script["/a"] = [step]
    with transport.get(server.url + "a", {}, Cancellation()) as response:
        assert sent.wait(30)
        came, pieces = b"", 0
        while len(came) < len(first):
            came += response.read_some(1 << 20)
            pieces += 1
        assert came == first
        assert pieces < len(first) / (1 << 14)  # the records that it has come in
        taken.set()
        while data := response.read_some(1 << 20):
            came += data
        assert came == DATA


def test_a_connection_is_used_again(server: ScriptedServer, transport: Transport) -> None:
    server.script["/a"] = [reply(200, DATA)]
    for _ in range(3):
        with transport.get(server.url + "a", {}, Cancellation()) as response:
            assert response.read(1 << 30) == DATA
    assert server.connections == 1


def hold(connection: Connection) -> None:
    connection.sock.recv(1)  # until the client gives up


def drip(connection: Connection) -> None:
    while True:
        connection.send(b"?")
        if select.select([connection.sock], [], [], 0.05)[0]:
            return


@pytest.mark.parametrize("how", [hold, drip])
def test_a_server_that_stalls_is_noticed(server: ScriptedServer, how: Callable[[Connection], None]) -> None:
    def step(connection: Connection, request: Request) -> None:
        connection.send(reply(200, DATA[:HALF], length=len(DATA)))
        how(connection)

    server.script[SHARD] = [step]
    with pytest.raises(ndcache.StallError):
        ndcache.load(server.url, timeout=(10, 0.5), retries=0)


@pytest.mark.parametrize("how", [hold, drip])
def test_a_load_is_cancelled_in_the_middle_of_a_body(server: ScriptedServer, how: Callable[[Connection], None]) -> None:
    cancel = threading.Event()

    def step(connection: Connection, request: Request) -> None:
        connection.send(reply(200, DATA[:HALF], length=len(DATA)))
        cancel.set()
        how(connection)

    server.script[SHARD] = [step]
    with pytest.raises(ndcache.CancelledError):
        ndcache.load(server.url, cancel=cancel)


def test_a_body_that_breaks_off_goes_on_where_it_was(server: ScriptedServer) -> None:
    starts: list[int] = []

    def step(connection: Connection, request: Request) -> None:
        start = int(request.headers.get("range", "bytes=0-")[6:].partition("-")[0])
        starts.append(start)
        headers = {"ETag": '"v1"'}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
            connection.send(reply(206, DATA[start:], headers))
            return
        connection.send(reply(200, DATA[:HALF], headers, length=len(DATA)))
        connection.sock.close()

    server.script[SHARD] = [step]
    weights = ndcache.load(server.url, retries=ndcache.RetryPolicy(backoff=0.01))
    assert weights["a"].tobytes() == DATA
    assert starts[0] == 0
    assert 0 < starts[1] <= HALF
    assert len(starts) == 2
    assert weights.stats.network_bytes == len(DATA)


def test_a_session_of_the_callers_gets_bytes_that_it_can_keep(server: ScriptedServer) -> None:
    server.script |= {"/a": [reply(200, DATA)], SHARD: [reply(200, DATA)]}
    with requests.Session() as session:
        assert ndcache.load(server.url, session=session)["a"].tobytes() == DATA
        with session.get(server.url + "a", stream=True, timeout=30) as response:
            pieces: list[bytes] = []
            while piece := response.raw.read1(1 << 20):
                pieces.append(piece)
    assert {type(piece) for piece in pieces} == {bytes}
    assert b"".join(pieces) == DATA


def test_this_python_has_the_private_name(scripted: ScriptedServer, authority: trustme.CA) -> None:
    """If a Python loses it, bodies are read more slowly over TLS, and this test says so."""
    context, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(trusting)
    scripted.wrap(context)
    with (
        socket.create_connection(("127.0.0.1", scripted.port)) as plain,
        trusting.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
    ):
        assert isinstance(raw_response._reader(sock), functools.partial)


def test_a_fork_does_not_wait_for_the_parents_threads() -> None:
    with raw_response._turns[0]:
        child = os.fork()
        if child == 0:
            os._exit(0 if all(turn.acquire(blocking=False) for turn in raw_response._turns) else 1)
        assert os.waitpid(child, 0)[1] == 0
