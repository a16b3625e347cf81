"""Requests go to the origin that was checked and take no secrets elsewhere; row 41 of docs/faults.rst."""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

import ndcache
from ndcache.http.connect import Routes
from ndcache.http.sockets import WrongOriginError, watching
from ndcache.http.transport import Transport
from ndcache.location import locate
from ndcache.location.hub import Login
from ndcache.urls.url import Origin, parse, parse_proxy
from ndcache.workers.cancellation import Cancellation
from ndcache.workers.stall import StallWatch

from ..helpers.servers import ScriptedServer, reply

NASTY = [
    *("\\", "\t", "\n", "\r", " ", "%2e", "%40", "%00", "%5c", "%", "@", ":", "#", "?", "/", ";", ",", "..", ".", "["),
    *(
        "]",
        "\0",
        "\x7f",
        "\x85",
        "\u200b",
        "\u00ad",
        "\u202e",
        "。",
        "．",
        "ﬁ",
        "ß",
        "ü",
        "İ",
        "\u212a",
        "①",
        "٣",
        "/@",
    ),
]
SCHEMES = [*["http"] * 16, "HTTP", "hTtP", "https", " http", "http\t"]
SEPARATORS = [*["://"] * 20, ":/", ":///", ":\\\\", ":/\\", ":", "//", ":// "]
USERS = [
    *[""] * 12,
    *(
        "user@",
        "user:pw@",
        "home.test@",
        "home.test:80@",
        "evil.test\\@",
        "evil.test:80\\@",
        "evil.test#@",
        "evil.test/@",
    ),
    *("evil.test?@", "a:b@c@", "u:p%40w@", "[@", "evil.test%5c@", "evil.test\t@", ":@", "@", "evil.test;@", "ü:ß@"),
]
HOSTS = [
    *("home.test", "HOME.Test", "evil.test", "home.test.", "home.test.evil.test", "127.0.0.1", "127.0.0.2", "[::1]"),
    *("[0:0::1]", "127.1", "0x7f000001", "bücher.test", "xn--bcher-kva.test", "faß.test", "home。test", "[::1%25lo]"),
    *("localhost", "home_1.test", "-home.test", "home..test", "", "[home.test]", "home%2etest", "ＨＯＭＥ.test"),
]
PORTS = [
    *[""] * 8,
    ":80",
    ":8080",
    ":8080",
    ":443",
    ":",
    ":0",
    ":080",
    ":+80",
    ": 80",
    ":80 ",
    ":８０",
    ":65536",
    ":-1",
    ":81:82",
]
TAILS = [
    *(
        "",
        "/",
        "/x",
        "/@evil.test/",
        "\\@evil.test/",
        "/..//evil.test/x",
        "?@evil.test",
        "#@evil.test/",
        "//evil.test/",
    ),
    *("/%2e%2e/", "/\\evil.test", "?a=b", "/x#f", "\\evil.test/", "%2f@evil.test/", ":80@evil.test/", "@evil.test/"),
]


def generated(number: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(number):
        text = "".join(map(rng.choice, (SCHEMES, SEPARATORS, USERS, HOSTS, PORTS, TAILS)))
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(NASTY) + text[at:]
        yield text


@dataclass
class Peers:
    """Servers that tell their host and port: each host and port that is looked up gets one, at an address of its own.

    Attributes
    ----------
    connected : list
        The host and port of each connection.
    seen : dict
        By host and port, the heads of the requests received there.
    redirects : dict of bytes to bytes
        By the requested path, the Location of the response.
    """

    connected: list[tuple[str, int]] = field(default_factory=list)
    seen: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)
    redirects: dict[bytes, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._listeners: dict[tuple[str, int], socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def look_up(self, host: str, port: int, *_: Any) -> list[Any]:
        """Replace `socket.getaddrinfo`."""
        who = (host, port)
        if who not in self._listeners:
            number = len(self._listeners)
            listener = socket.create_server((f"127.0.{1 + number // 250}.{1 + number % 250}", 0), backlog=16)
            self._listeners[who] = listener
            self._selector.register(listener, selectors.EVENT_READ, who)
            self._wake.send(b"x")
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", self._listeners[who].getsockname())]

    def close(self) -> None:
        self._wake.close()
        self._thread.join(30)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock: Any = key.fileobj
                if sock is self._woken:
                    if not sock.recv(64):
                        return
                elif sock in self._listeners.values():
                    self.connected.append(key.data)
                    self._selector.register(sock.accept()[0], selectors.EVENT_READ, key.data)
                else:
                    self._answer(sock, key.data)

    def _answer(self, sock: socket.socket, who: tuple[str, int]) -> None:
        head = b""
        with contextlib.suppress(OSError):
            head = sock.recv(1 << 16)
            if head.startswith(b"GET "):
                self.seen.setdefault(who, []).append(head)
                location = self.redirects.get(head.split(b" ")[1])
                body = f"{who[0]} {who[1]}".encode()
                if location is None:
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                else:
                    sock.sendall(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n")
                return
        self._selector.unregister(sock)
        sock.close()


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peers]:
    if sys.platform == "darwin":
        pytest.skip("only 127.0.0.1 is a loopback address here")
    made = Peers()
    monkeypatch.setattr(socket, "getaddrinfo", made.look_up)
    yield made
    made.close()


def answer(transport: Transport, url: str) -> str:
    with transport.get(url, {}, Cancellation()) as response:
        return response.read(1000).decode()


@pytest.mark.parametrize("count", [3_000, pytest.param(20_000, marks=pytest.mark.once)])
def test_row_41_the_origin_that_is_checked_is_the_one_that_answers(peers: Peers, count: int) -> None:
    """Each of the generated URLs that is accepted goes to the host and port that were checked."""
    transport, reached = Transport(), 0
    for text in generated(count, seed=1):
        try:
            location = locate(text, {})
        except (ValueError, ndcache.NotFoundError):
            continue  # refused, or not meant as a URL
        origin, before = parse(location.base).origin, len(peers.connected)
        if not set(parse(location.base).user or "") <= set(map(chr, range(256))):
            continue  # a password that requests cannot send
        if origin.scheme == "https":
            with pytest.raises(ndcache.TransferError):
                answer(transport, location.base)  # nobody here speaks TLS
            assert set(peers.connected[before:]) == {origin[1:]}, text
        else:
            assert answer(transport, location.base) == f"{origin.host} {origin.port}", text
        reached += 1
    transport.close()
    assert reached > count // 10


@pytest.mark.once
def test_row_41_a_redirect_takes_no_secret_elsewhere(peers: Peers) -> None:
    """The home origin redirects to 5,000 addresses, and is the only one that ever sees its secrets."""
    session = requests.Session()
    session.headers["X-Api-Key"] = "secret"
    session.cookies.set("id", "secret")
    home, followed, refused = ("home.test", 8080), 0, 0
    login = Login({"HF_ENDPOINT": "http://home.test:8080", "HF_TOKEN": "secret"})
    ways = [
        ("http://", {}),
        ("http://user:secret@", {}),
        ("http://", {"session": session}),
        ("http://", {"login": login}),
    ]
    transports = [(start, Transport(**options)) for start, options in ways]  # type: ignore[arg-type]
    for number, text in enumerate(generated(5_000, seed=2)):
        with contextlib.suppress(UnicodeEncodeError):
            peers.redirects[b"/%d" % number] = text.encode()
        if {"\r", "\n"} & set(text) or b"/%d" % number not in peers.redirects:
            continue  # not a header
        start, transport = transports[number % len(transports)]
        try:
            answered = answer(transport, f"{start}home.test:8080/{number}")
        except ndcache.TransferError as error:
            refused += isinstance(error, ndcache.RedirectError)
            continue
        followed += answered != "home.test 8080"
    for _, transport in transports:
        transport.close()
    session.close()
    assert followed > 300
    assert refused > 300
    assert any(b"secret" in head or b"Basic" in head for head in peers.seen[home])
    for who, heads in peers.seen.items():
        for head in heads:
            told = [name for name in (b"secret", b"Authorization", b"Cookie", b"X-Api-Key") if name in head]
            assert who == home or not told, (who, head)


def test_row_41_a_session_that_changes_the_url_is_stopped() -> None:
    """Nothing is sent if a library above the sockets reads another origin than the one that was checked."""
    transport = Transport()
    session = transport._sessions.get(with_secrets=True)
    for url in ("http://127.0.0.1:9/", "https://localhost/", "http://localhost:80/"):
        with (
            pytest.raises(WrongOriginError),
            watching(StallWatch(timeout=1), Origin("http", "localhost", 9), Routes()),
        ):
            session.get(url, timeout=1)
    transport.close()


def test_row_41_a_proxy_is_told_the_origin_that_was_checked(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.script = {"http://home.test/a": [reply(200, b"there")]}
    monkeypatch.setenv("HTTP_PROXY", scripted.url)
    transport = Transport()
    assert answer(transport, "http://home.test/a") == "there"
    with (
        pytest.raises(WrongOriginError),
        watching(StallWatch(timeout=1), Origin("http", "home.test", 80), Routes()),
    ):
        transport._sessions.get(with_secrets=True).get("http://evil.test/a", timeout=1)
    transport.close()


@pytest.mark.parametrize("given", ["variable", "session"])
@pytest.mark.parametrize(
    "proxy",
    [
        "http://user:secret@evil\\@127.0.0.1:9/",
        "http://",
        "user:p/w@127.0.0.1:9",
        "http://a:b@:8080",
        "http//user:secret@127.0.0.1:9",
    ],
)
def test_row_41_the_address_of_a_proxy_that_can_be_misread_is_refused(
    proxy: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: asked.append(args))
    with requests.Session() as session:
        if given == "session":
            session.proxies = {"http": proxy}
        else:
            monkeypatch.setenv("HTTP_PROXY", proxy)
        with pytest.raises(ndcache.ConnectError, match="proxy") as caught:
            ndcache.load("http://home.test/", session=session, retries=5)
    assert caught.value.attempts in (None, 1)
    assert not asked


@pytest.mark.parametrize(
    ("text", "origin", "credentials"),
    [
        ("proxy:3128", ("http", "proxy", 3128), None),
        ("proxy", ("http", "proxy", 80), None),
        ("proxy/", ("http", "proxy", 80), None),
        ("https://user:p@ss@proxy:3128/", ("https", "proxy", 3128), ("user", "p@ss")),
        ("user:pw@proxy:3128", ("http", "proxy", 3128), ("user", "pw")),
        ("socks5h://user:pw@127.0.0.1:1080", ("http", "127.0.0.1", 1080), ("user", "pw")),
    ],
)
def test_addresses_of_proxies(text: str, origin: tuple[str, str, int], credentials: tuple[str, str] | None) -> None:
    url = parse_proxy(text)
    assert (url.origin, url.credentials) == (origin, credentials)


def test_row_41_netrc_is_read_for_the_host_that_is_asked(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Old versions of requests take "other" in http://other:@host/ for the machine (CVE-2024-47081)."""
    (tmp_path / "netrc").write_text("machine other login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    scripted.script |= {
        "/a": [reply(302, b"", {"Location": scripted.url.replace("//", "//other:@") + "b"})],
        "/b": [reply(200, b"there")],
    }
    transport = Transport()
    assert answer(transport, scripted.url + "a") == "there"
    transport.close()
    assert [request.headers.get("authorization") for request in scripted.requests] == [None, None]
