"""TLS connections: broken ones are tried again, wrong ones are final, and bytes are returned as they come."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import trustme

import ndcache
from ndcache.http import sockets
from ndcache.http.response import Response
from ndcache.http.transport import Transport
from ndcache.workers.cancellation import Cancellation

from ..helpers.models import assert_same
from ..helpers.servers import Connection, Request, ScriptedServer, Step, reply, then_close
from ..helpers.tensor_files import file_bytes, header_of

DATA = bytes(range(256)) * 4096  # 1 MiB
SHARD = "/params_shard_0.bin"
ETAG = {"ETag": '"v1"'}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusted(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))


@pytest.fixture
def secure(scripted: ScriptedServer, authority: trustme.CA, trusted: None) -> ScriptedServer:
    """Serve a model of one shard; each test sets how the shard is sent at first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    scripted.wrap(context)
    scripted.script |= {"/tensor-cache.json": [reply(200, manifest())], SHARD: [give]}
    return scripted


@pytest.fixture
def transport() -> Iterator[Transport]:
    made = Transport(timeout=(30.0, 30.0))
    yield made
    made.close()


def manifest() -> bytes:
    record = {"name": "a", "shape": [len(DATA)], "dtype": "uint8", "format": "raw", "byteOffset": 0}
    shard = {"dataPath": SHARD[1:], "format": "raw-shard", "nbytes": len(DATA), "md5sum": hashlib.md5(DATA).hexdigest()}
    return json.dumps({"metadata": {}, "records": [{**shard, "records": [{**record, "nbytes": len(DATA)}]}]}).encode()


def give(connection: Connection, request: Request) -> None:
    """Send the shard from the first byte of the requested range on."""
    start = int(request.headers.get("range", "bytes=0-")[6:].partition("-")[0])
    headers = {**ETAG, "Content-Range": f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"} if start else ETAG
    connection.send(reply(206 if start else 200, DATA[start:], headers))


def assert_loads(url: str) -> None:
    assert ndcache.load(url, retries=ndcache.RetryPolicy(backoff=0.01))["a"].tobytes() == DATA


# --- broken connections ----------------------------------------------------------------------------------


def below_tls(data: bytes) -> Callable[[Connection], None]:
    return lambda connection: socket.socket.sendall(connection.sock, data)


def say_goodbye(connection: Connection) -> None:
    """Return the notice with which TLS ends a connection."""
    connection.sock.settimeout(0.01)
    with contextlib.suppress(OSError):
        assert isinstance(connection.sock, ssl.SSLSocket)
        connection.sock.unwrap()


BREAKS: dict[str, Callable[[Connection], None]] = {
    "no notice": lambda connection: None,
    "notice": say_goodbye,
    "reset": Connection.reset,
    "damaged record": below_tls(b"\x17\x03\x03\x00\x40" + bytes(64)),
    "no record": below_tls(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "record that is too long": below_tls(b"\x17\x03\x03\xff\xff" + bytes(64)),
}
HEAD = {
    "length": reply(200, b"", ETAG, length=len(DATA)),
    "chunked": reply(200, b"80000\r\n", {**ETAG, "Transfer-Encoding": "chunked"}, length=None),
    "neither": reply(200, b"", ETAG, length=None),
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("framing", [*HEAD, "headers", "nothing"])
def test_row_45_a_body_whose_connection_breaks_is_resumed(secure: ScriptedServer, framing: str, how: str) -> None:
    def step(connection: Connection, request: Request) -> None:
        if framing == "headers":
            connection.send(HEAD["length"][:20])
        elif framing != "nothing":
            connection.send(HEAD[framing] + DATA[: len(DATA) // 2])
        BREAKS[how](connection)

    secure.script[SHARD] = [step, give]
    assert_loads(secure.url)
    _, second = secure.requests_for(SHARD)
    if framing in HEAD and how != "reset":  # a reset discards bytes that the client has not read
        assert second.headers["range"] == f"bytes={len(DATA) // 2}-{len(DATA) - 1}"


@pytest.mark.parametrize("how", sorted(BREAKS.keys() - {"reset"}))  # a reset discards bytes that were not read
def test_row_45_bytes_that_came_before_the_connection_broke_are_returned(
    secure: ScriptedServer, transport: Transport, how: str
) -> None:
    broken = threading.Event()

    def step(connection: Connection, request: Request) -> None:
        connection.send(HEAD["length"] + b"first")
        connection.send(b"second")
        BREAKS[how](connection)
        connection.sock.shutdown(socket.SHUT_WR)
        broken.set()

    secure.script["/a"] = [step]
    with transport.get(secure.url + "a", {}, Cancellation()) as response:
        assert broken.wait(30)
        came = b""
        with pytest.raises((ndcache.ConnectError, ndcache.TruncatedError)) as caught:
            while True:
                came += response.read_some(1 << 20)
        assert came == b"firstsecond"
    assert caught.value.retryable


def alert(description: int) -> bytes:
    """Return a fatal alert (RFC 8446, 6.2)."""
    return bytes([21, 3, 3, 0, 2, 2, description])


HELLOS: dict[str, tuple[bytes | None, str | None]] = {
    "end": (b"", None),
    "reset": (None, None),
    "internal error": (alert(80), None),
    "bad record MAC": (alert(20), None),
    "decode error": (alert(50), None),
    "decrypt error": (alert(51), None),
    "user cancelled": (alert(90), None),
    "handshake failure": (alert(40), "in common"),
    "protocol version": (alert(70), "in common"),
    "insufficient security": (alert(71), "in common"),
    "unrecognized name": (alert(112), "does not know this host"),
    "unknown authority": (alert(48), "certificate from this machine"),
    "access denied": (alert(49), "certificate from this machine"),
    "certificate required": (alert(116), "certificate from this machine"),
    "plain http": (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "speak TLS"),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", "speak TLS"),
}


@contextlib.contextmanager
def front(server: ScriptedServer, answer: bytes | None, *, first: int = 1) -> Iterator[tuple[str, list[bytes]]]:
    """Answer the first hellos with `answer` (None: a reset), and pass the others on to `server`."""
    hellos: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            hellos.append(sock.recv(1 << 16))
            if len(hellos) > first:
                Connection(sock, server).pass_on(server.port, hellos[-1])
            elif answer is None:
                Connection(sock, server).reset()
            else:
                sock.sendall(answer)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(16) as pool:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    pool.submit(serve, listener.accept()[0])

        accepting = pool.submit(accept)
        yield f"https://127.0.0.1:{listener.getsockname()[1]}/", hellos
        listener.shutdown(socket.SHUT_RDWR)
        accepting.result()


@pytest.mark.parametrize("how", [how for how, (_, words) in HELLOS.items() if words is None])
def test_row_45_a_handshake_that_breaks_is_tried_again(secure: ScriptedServer, how: str) -> None:
    with front(secure, HELLOS[how][0]) as (url, hellos):
        assert_loads(url)
    assert len(hellos) >= 2


def test_row_45_a_connection_that_is_reset_before_the_handshake_leaves_no_socket(
    secure: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warning that Python gives for a socket that nobody closed would be an error here."""
    connect, count = sockets._WatchedConnection._new_conn, itertools.count()

    def connect_and_be_reset(self: sockets._WatchedConnection) -> socket.socket:
        if next(count) >= 2:
            return connect(self)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sock = socket.create_connection(listener.getsockname())
            Connection(listener.accept()[0], secure).reset()
        select.select([sock], [], [], 60)  # until the reset has come
        return sock

    monkeypatch.setattr(sockets._WatchedConnection, "_new_conn", connect_and_be_reset)
    assert_loads(secure.url)
    assert next(count) > 2


@pytest.mark.parametrize("how", [how for how, (_, words) in HELLOS.items() if words is not None])
def test_row_17_an_alert_in_the_handshake_is_final(secure: ScriptedServer, how: str) -> None:
    answer, words = HELLOS[how]
    with front(secure, answer, first=100) as (url, hellos):
        with pytest.raises(ndcache.TLSError, match=words) as caught:
            ndcache.load(url, retries=5)
        assert "REQUESTS_CA_BUNDLE" not in str(caught.value)
    assert len(hellos) == 1


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_row_17_a_server_that_wants_a_client_certificate(
    secure: ScriptedServer, authority: trustme.CA, version: ssl.TLSVersion
) -> None:
    """With TLS 1.3, the client learns this only after the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.verify_mode = ssl.CERT_REQUIRED
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    secure.wrap(context)
    with pytest.raises(ndcache.NdcacheError) as caught:
        ndcache.load(secure.url, retries=ndcache.RetryPolicy(1, backoff=0.01))
    # The reset of the connection may overtake the alert, which is never seen then.
    assert isinstance(caught.value, ndcache.TLSError | ndcache.ConnectError)
    if isinstance(caught.value, ndcache.TLSError):
        assert "certificate from this machine" in str(caught.value)


# --- the end of a body without framing ------------------------------------------------------------------


def unframed(data: bytes, ending: Callable[[Connection], None]) -> Step:
    def step(connection: Connection, request: Request) -> None:
        connection.send(reply(200, data, ETAG, length=None))
        ending(connection)

    return step


@pytest.mark.parametrize("how", ["no notice", "notice"])
def test_row_45_a_body_without_framing_that_ends_without_notice_may_be_cut(
    secure: ScriptedServer, transport: Transport, how: str
) -> None:
    secure.script["/a"] = [unframed(b"abc", BREAKS[how])]
    with transport.get(secure.url + "a", {}, Cancellation()) as response:
        assert response.read(100) == b"abc"
        assert response.may_be_truncated == (how == "no notice")


def test_row_45_a_whole_model_without_framing_or_notice_loads_at_once(secure: ScriptedServer) -> None:
    """Servers of HTTP/1.0 send it so; the manifest's brackets and sizes tell whether bodies are complete."""
    secure.script = {path: [unframed(data, BREAKS["no notice"])] for path, data in FILES.items()}
    assert_loads(secure.url)
    assert len(secure.requests) == 2


def test_a_session_of_the_callers_stays_as_lenient_as_it_was(secure: ScriptedServer) -> None:
    secure.script |= {"/a": [unframed(b"abc", BREAKS["no notice"])], "/b": [reply(200, b"kept")]}
    with requests.Session() as session:
        transport = Transport(session=session)
        for _ in range(2):
            with transport.get(secure.url + "b", {}, Cancellation()) as response:
                assert response.read(100) == b"kept"
            assert session.get(secure.url + "a", timeout=30).content == b"abc"
        transport.close()


FILES = {"/tensor-cache.json": manifest(), SHARD: DATA}


def test_row_45_a_manifest_that_was_cut_is_asked_for_again(secure: ScriptedServer) -> None:
    cut = unframed(manifest()[:-5], BREAKS["no notice"])
    secure.script["/tensor-cache.json"] = [cut, reply(200, manifest())]
    assert_loads(secure.url)


def test_a_manifest_that_is_not_cut_but_wrong_is_asked_for_once(secure: ScriptedServer) -> None:
    secure.script["/tensor-cache.json"] = [unframed(manifest()[:-5], say_goodbye)]
    with pytest.raises(ndcache.ManifestSyntaxError):
        ndcache.load(secure.url)
    assert len(secure.requests) == 1


# --- bytes as they come ---------------------------------------------------------------------------------


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@pytest.mark.parametrize("framing", ["length", "chunked", "neither"])
def test_row_13_a_read_returns_as_soon_as_bytes_have_come(
    secure: ScriptedServer, transport: Transport, framing: str
) -> None:
    """After a fast start, each record is sent when the one before has been returned."""
    taken = threading.Semaphore(0)
    pieces = [os.urandom(100 + 50 * number) for number in range(20)]
    total = len(DATA) + sum(map(len, pieces))

    def step(connection: Connection, request: Request) -> None:
        frame = chunk if framing == "chunked" else bytes
        headers = {"Transfer-Encoding": "chunked"} if framing == "chunked" else {}
        connection.send(reply(200, frame(DATA), headers, length=total if framing == "length" else None))
        for piece in pieces:
            assert taken.acquire(timeout=30)
            connection.send(frame(piece))
        if framing == "chunked":
            connection.send(b"0\r\n\r\n")

    secure.script["/a"] = [step]
    with transport.get(secure.url + "a", {}, Cancellation()) as response:
        start = b""
        while len(start) < len(DATA):
            start += response.read_some(1 << 20)
        assert start == DATA
        for piece in pieces:
            taken.release()
            came = b""
            while len(came) < len(piece):
                came += response.read_some(1 << 20)
            assert came == piece
        assert response.read_some(1 << 20) == b""


@pytest.mark.parametrize("size", [1, 10, 1000, 8192, 16384, 20_000, 100_000])
@pytest.mark.parametrize("how", ["at once", "line by line", "byte by byte"])
def test_chunks_of_any_size_are_put_together(secure: ScriptedServer, transport: Transport, size: int, how: str) -> None:
    pieces = [os.urandom(size) for _ in range(max(3, min(300, 200_000 // size)))]
    if how == "byte by byte":
        pieces = [os.urandom(min(size, 3000)) for _ in range(2)]

    def step(connection: Connection, request: Request) -> None:
        connection.send(reply(200, b"", {"Transfer-Encoding": "chunked"}, length=None))
        for piece in [*pieces, b""]:
            if how == "at once":
                connection.send(chunk(piece))
            elif how == "line by line":
                for part in (b"%x;x=y\r" % len(piece), b"\n", piece, b"\r", b"\n"):
                    connection.send(part)
            else:
                for byte in chunk(piece):
                    connection.send(bytes([byte]))

    secure.script["/a"] = [step]
    with transport.get(secure.url + "a", {}, Cancellation()) as response:
        assert read_all(response) == b"".join(pieces)
        assert not response.may_be_truncated


def read_all(response: Response) -> bytes:
    return b"".join(iter(lambda: bytes(response.read_some(1 << 18)), b""))


def test_a_connection_with_tls_is_used_again(secure: ScriptedServer, transport: Transport) -> None:
    secure.script["/a"] = [reply(200, DATA)]
    secure.script["/b"] = [reply(200, chunk(DATA) + b"0\r\n\r\n", {"Transfer-Encoding": "chunked"}, length=None)]
    for path in "abab":
        with transport.get(secure.url + path, {}, Cancellation()) as response:
            assert read_all(response) == DATA
    assert secure.connections == 1


def test_a_connection_that_failed_is_not_used_again(secure: ScriptedServer, transport: Transport) -> None:
    def step(connection: Connection, request: Request) -> None:
        connection.send(reply(200, chunk(b"abc") + b"nonsense\r\n", {"Transfer-Encoding": "chunked"}, length=None))
        connection.stall()

    secure.script |= {"/a": [step], "/b": [reply(200, b"good")]}
    with pytest.raises(ndcache.TransferError), transport.get(secure.url + "a", {}, Cancellation()) as response:
        read_all(response)
    with transport.get(secure.url + "b", {}, Cancellation()) as response:
        assert read_all(response) == b"good"
    assert secure.connections == 2


def test_a_safetensors_file_that_breaks_off_over_tls_is_resumed(secure: ScriptedServer) -> None:
    arrays = {name: np.full(1000, ord(name), np.float32) for name in "ab"}
    data = file_bytes(header_of(arrays), b"".join(array.tobytes() for array in arrays.values()))
    half, etag = len(data) // 2, {"ETag": '"one"'}
    rest = {**etag, "Content-Range": f"bytes {half}-{len(data) - 1}/{len(data)}"}
    secure.script["/model.safetensors"] = [
        reply(200, data, etag),  # for the header, of which no more is read
        then_close(reply(200, data, etag)[: half - len(data)]),
        reply(206, data[half:], rest),
    ]
    with ndcache.load(f"{secure.url}model.safetensors") as weights:
        assert_same(weights, arrays)
    ranges = [request.headers.get("range") for request in secure.requests_for("/model.safetensors")]
    assert ranges == ["bytes=0-262143", None, f"bytes={half}-{len(data) - 1}"]
