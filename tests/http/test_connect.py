"""Choice among a host's addresses (RFC 8305). Only the look-up of names is simulated; sockets are real."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

import ndcache
from ndcache.http import connect
from ndcache.http.connect import Address, Routes, connect_to_first, resolve
from ndcache.http.sockets import _WatchedConnection
from ndcache.http.transport import Transport
from ndcache.workers.cancellation import Cancellation

from ..helpers.servers import Connection, FileServer, Request, ScriptedServer, reply

NAME = "model.test"
#: Loopback addresses without a listening port.
NOBODY = ("127.0.0.7", "127.0.0.8", "127.0.0.9")


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Return the list, to be filled, of the families and addresses of the host `NAME`."""
    found: list[tuple[int, str]] = []
    real = socket.getaddrinfo

    def look_up(host: str, port: Any, *args: Any, **options: Any) -> Any:
        if host != NAME:
            return real(host, port, *args, **options)
        return [
            (family, socket.SOCK_STREAM, 6, "", (address, port, 0, 0) if ":" in address else (address, port))
            for family, address in found
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return found


@pytest.fixture
def bury() -> Iterator[Callable[[str, int], tuple[int, str]]]:
    """Let an address (of any family) and port neither accept nor refuse connections, as behind a bad firewall."""
    with contextlib.ExitStack() as stack:

        def make(address: str, port: int) -> tuple[int, str]:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = stack.enter_context(socket.socket(family))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(0)
            for _ in range(4):
                sock = stack.enter_context(socket.socket(family))
                sock.setblocking(False)
                sock.connect_ex((address, port))
            return family, address

        yield make


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Give a function after whose call the next address is tried only when the one before has failed."""
    return lambda: monkeypatch.setattr(connect, "_ATTEMPT_DELAY", 3600.0)


def ask(transport: Transport, port: int, cancellation: Cancellation | None = None) -> bytes:
    with transport.get(f"http://{NAME}:{port}/a", {}, cancellation or Cancellation()) as response:
        return response.read(100)


def once(connection: Connection, request: Request) -> None:
    """Answer, and close the connection."""
    connection.send(reply(200, b"there", {"Connection": "close"}))


@pytest.mark.parametrize("dead", [["::1"], ["127.0.0.2"], ["::1", "127.0.0.2", "127.0.0.3"]], ids=" ".join)
def test_row_47_a_dead_address_is_waited_for_once(
    scripted: ScriptedServer,
    addresses: list[tuple[int, str]],
    bury: Callable[[str, int], tuple[int, str]],
    patient: Callable[[], None],
    dead: list[str],
) -> None:
    addresses += [bury(address, scripted.port) for address in dead] + [(socket.AF_INET, "127.0.0.1")]
    scripted.script["/a"] = [once]
    transport = Transport(timeout=(60.0, 60.0))
    assert ask(transport, scripted.port) == b"there"
    patient()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: ask(transport, scripted.port), range(8))) == [b"there"] * 8
    transport.close()
    assert scripted.connections == 9


def test_row_47_a_dead_address_does_not_slow_down_many_shards(
    tmp_path: Path,
    serve: Callable[..., FileServer],
    addresses: list[tuple[int, str]],
    bury: Callable[[str, int], tuple[int, str]],
) -> None:
    ndcache.dump({f"{n}": np.full(100, n) for n in range(12)}, tmp_path / "model", shard_bytes=800)
    server = serve(tmp_path / "model")
    port = int(server.url.rstrip("/").rpartition(":")[2])
    addresses += [bury("127.0.0.2", port), (socket.AF_INET, "127.0.0.1")]
    begun = time.monotonic()
    weights = ndcache.load(f"http://{NAME}:{port}/", timeout=(60.0, 60.0))
    assert len(weights) == 12
    assert time.monotonic() - begun < 60  # far less than a single timeout for connecting


def test_row_47_a_dead_address_of_a_proxy(
    scripted: ScriptedServer,
    addresses: list[tuple[int, str]],
    bury: Callable[[str, int], tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    addresses += [bury("127.0.0.2", scripted.port), (socket.AF_INET, "127.0.0.1")]
    monkeypatch.setenv("http_proxy", f"http://{NAME}:{scripted.port}")
    scripted.script["http://host.example/a"] = [reply(200, b"there")]
    transport = Transport(timeout=(60.0, 60.0))
    with transport.get("http://host.example/a", {}, Cancellation()) as response:
        assert response.read(100) == b"there"
    transport.close()


def test_row_47_an_address_that_stops_answering_is_forgotten(
    addresses: list[tuple[int, str]], bury: Callable[[str, int], tuple[int, str]], unused_port: int
) -> None:
    addresses += [(socket.AF_INET, address) for address in (NOBODY[0], "127.0.0.2", "127.0.0.3")]
    transport = Transport(timeout=(60.0, 60.0))

    def serve_once(address: str) -> None:
        with socket.create_server((address, unused_port)) as listener, ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask, transport, unused_port)
            sock, _ = listener.accept()
            with sock:
                sock.recv(1 << 16)
                sock.sendall(reply(200, b"there", {"Connection": "close"}))
            assert asking.result(60) == b"there"

    serve_once("127.0.0.2")
    bury("127.0.0.2", unused_port)
    serve_once("127.0.0.3")
    transport.close()


def test_row_47_a_host_whose_addresses_all_refuse_fails_at_once(
    addresses: list[tuple[int, str]], patient: Callable[[], None], unused_port: int
) -> None:
    patient()
    addresses += [(socket.AF_INET, address) for address in NOBODY]
    begun = time.monotonic()
    with pytest.raises(ndcache.ConnectError, match="refuses connections"):
        ask(Transport(timeout=(300.0, 300.0)), unused_port)
    assert time.monotonic() - begun < 90  # far less than 300 s for each, or for all


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


NO_FAMILY = (9999, "127.0.0.1")


@pytest.mark.parametrize(
    ("kinds", "error"),
    [
        (["no family"], OSError),
        (["no family", "refused"], ConnectionRefusedError),
        (["refused", "no family"], ConnectionRefusedError),
        (["dead"], TimeoutError),
        (["dead", "no family"], TimeoutError),
        (["dead", "refused", "no family"], ConnectionRefusedError),
        ([], OSError),
    ],
    ids=lambda value: " ".join(value) or "none" if isinstance(value, list) else "",
)
def test_row_47_if_every_address_fails_the_most_useful_failure_is_raised(
    addresses: list[tuple[int, str]],
    bury: Callable[[str, int], tuple[int, str]],
    unused_port: int,
    kinds: list[str],
    error: type[OSError],
) -> None:
    made: dict[str, Callable[[], Any]] = {
        "no family": lambda: NO_FAMILY,
        "refused": lambda: (socket.AF_INET, NOBODY[0]),
        "dead": lambda: bury("127.0.0.2", unused_port),
    }
    addresses += [made[kind]() for kind in kinds]
    with pytest.raises(error) as caught:
        connect_to_first(resolve(NAME, unused_port), 0.6, open_socket, lambda: False)
    assert caught.value.__class__ is error or error is OSError


def open_socket(address: Address) -> socket.socket:
    sock = socket.socket(address.family, address.type, address.proto)
    sock.setblocking(False)
    return sock


def test_row_47_the_last_of_many_dead_addresses_is_reached_in_a_short_time(
    scripted: ScriptedServer, addresses: list[tuple[int, str]], bury: Callable[[str, int], tuple[int, str]]
) -> None:
    addresses += [bury(f"127.0.0.{n}", scripted.port) for n in range(2, 12)] + [(socket.AF_INET, "127.0.0.1")]
    sock, winner = connect_to_first(resolve(NAME, scripted.port), 2.0, open_socket, lambda: False)
    sock.close()
    assert winner.sockaddr[0] == "127.0.0.1"


def test_families_take_turns_and_nothing_is_tried_twice(addresses: list[tuple[int, str]]) -> None:
    six, four = socket.AF_INET6, socket.AF_INET
    addresses += [(six, "::1"), (six, "::2"), (six, "::1"), (six, "::3"), (four, "127.0.0.1"), (four, "127.0.0.2")]
    assert [address.sockaddr[0] for address in resolve(NAME, 80)] == ["::1", "127.0.0.1", "::2", "127.0.0.2", "::3"]


def test_the_address_that_worked_comes_first_and_then_its_family(addresses: list[tuple[int, str]]) -> None:
    six, four = socket.AF_INET6, socket.AF_INET
    addresses += [(six, "::1"), (six, "::2"), (four, "127.0.0.1"), (four, "127.0.0.2")]
    routes, found = Routes(), resolve(NAME, 80)
    assert routes.order(NAME, 80, found) == found
    routes.remember(NAME, 80, found[3])
    assert [a.sockaddr[0] for a in routes.order(NAME, 80, found)] == ["127.0.0.2", "127.0.0.1", "::1", "::2"]
    assert routes.order(NAME, 81, found) == found
    routes.remember(NAME, 80, None)
    assert routes.order(NAME, 80, found) == found


def test_row_36_threads_that_connect_are_woken(
    addresses: list[tuple[int, str]], bury: Callable[[str, int], tuple[int, str]], unused_port: int
) -> None:
    addresses += [bury(f"127.0.0.{n}", unused_port) for n in (2, 3, 4)]
    cancellation, transport = Cancellation(), Transport(timeout=(300.0, 300.0))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(ask, transport, unused_port, cancellation)
        while sum(len(watch.wakers) for watch in list(cancellation._watches)) < 3:
            time.sleep(0.01)
        cancellation.set()
        with pytest.raises(ndcache.CancelledError):
            future.result(60)
    transport.close()


def test_the_source_address_and_the_options_are_kept(scripted: ScriptedServer) -> None:
    connection = _WatchedConnection(
        "127.0.0.1",
        scripted.port,
        timeout=60,
        source_address=("127.0.0.5", 0),
        socket_options=[(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)],
    )
    with connection._new_conn() as sock:
        assert sock.getsockname()[0] == "127.0.0.5"
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.gettimeout() == 60


def test_a_session_of_the_callers_races_too(
    scripted: ScriptedServer,
    addresses: list[tuple[int, str]],
    bury: Callable[[str, int], tuple[int, str]],
    patient: Callable[[], None],
) -> None:
    addresses += [bury("127.0.0.2", scripted.port), (socket.AF_INET, "127.0.0.1")]
    scripted.script["/a"] = [once]
    with requests.Session() as session:
        transport = Transport(session=session, timeout=(60.0, 60.0))
        assert ask(transport, scripted.port) == b"there"
        patient()
        assert ask(transport, scripted.port) == b"there"


def test_routes_are_safe_between_threads() -> None:
    routes, found = Routes(), [Address(2, 1, 6, "", (f"127.0.0.{n}", 80)) for n in range(1, 5)]
    begin = threading.Barrier(4)

    def use(mine: Address) -> None:
        begin.wait()
        for _ in range(2000):
            assert len(routes.order(NAME, 80, found)) == 4
            routes.remember(NAME, 80, mine)
            routes.remember(NAME, 80, None)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, found))
