"""Mistakes in the user's settings end a load at once, and the message names the setting; row 48 of docs/faults.rst."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import trustme

import ndcache
from ndcache import Loader, RetryPolicy
from ndcache.http.transport import Transport
from ndcache.workers.cancellation import Cancellation

from ..helpers.servers import Connection, Request, ScriptedServer, reply, then_close

#: A policy whose retries must not be used.
PATIENT = RetryPolicy(retries=3, backoff=0.01)
NOWHERE = "http://models.example/m/"


@pytest.fixture
def secure(scripted: ScriptedServer, tmp_path: Path) -> ScriptedServer:
    """Serve with TLS; the certificate of the authority is in ``ca.pem``."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    scripted.wrap(context)
    return scripted


@pytest.fixture
def proxy() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


def fail(url: str, error: type[ndcache.NdcacheError], *words: str, **options: Any) -> ndcache.NdcacheError:
    """Load `url`, which must fail with `error` in a single try; its message has all `words` and no secret."""
    with pytest.raises(error) as caught:
        ndcache.load(url, retries=PATIENT, **options)
    found = caught.value
    assert type(found) is error
    assert not found.retryable
    assert found.attempts in (None, 1)
    assert not found.others
    for word in words:
        assert word in str(found)
    cause: BaseException | None = found
    while cause is not None:
        assert "secret" not in str(cause) + repr(cause)
        cause = cause.__cause__
    return found


# --- certificate files ---------------------------------------------------------------------------------


def missing(path: Path) -> Path:
    return path / "missing.pem"


def empty(path: Path) -> Path:
    (path / "empty.pem").touch()
    return path / "empty.pem"


def not_pem(path: Path) -> Path:
    (path / "not.pem").write_text("no certificate\n")
    return path / "not.pem"


def directory(path: Path) -> Path:
    (path / "certificates").mkdir()
    (path / "certificates" / "ca.pem").write_bytes((path / "ca.pem").read_bytes())  # without its hashed name
    return path / "certificates"


def pipe(path: Path) -> Path:
    os.mkfifo(path / "pipe")
    return path / "pipe"


BUNDLES = [
    (missing, "does not exist"),
    (empty, "PEM"),
    (not_pem, "PEM"),
    (directory, "directory without certificates"),
    pytest.param(pipe, "is a pipe", marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")),
]


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "session.verify"])
@pytest.mark.parametrize(("make", "words"), BUNDLES, ids=lambda value: getattr(value, "__name__", ""))
def test_row_48_an_authority_bundle_that_cannot_be_used(
    secure: ScriptedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    make: Callable[[Path], Path],
    words: str,
) -> None:
    path = make(tmp_path)
    with requests.Session() as session:
        if name == "session.verify":
            session.verify = str(path)
        else:
            monkeypatch.setenv(name, str(path))
        fail(secure.url, ndcache.TLSError, name, str(path), words, session=session)
    assert secure.connections <= 1


def test_row_48_a_missing_authority_bundle_does_not_matter_for_http(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/missing.pem")
    with pytest.raises(ndcache.NotFoundError):
        ndcache.load(scripted.url)


@pytest.mark.parametrize(
    ("cert", "words"),
    [
        ("missing.pem", "missing.pem does not exist"),
        (("ca.pem", "missing.key"), "missing.key does not exist"),
        ("ca.pem", "not a certificate and its key"),
        (("ca.pem", "ca.pem"), "not a certificate and its key"),
        ("", "cannot be read"),
        (("ca.pem/key.pem", "ca.pem"), "does not exist"),
    ],
    ids=str,
)
def test_row_48_a_client_certificate_that_cannot_be_used(
    secure: ScriptedServer, tmp_path: Path, cert: Any, words: str
) -> None:
    with requests.Session() as session:
        session.verify = str(tmp_path / "ca.pem")
        paths = [str(tmp_path / name) for name in ([cert] if isinstance(cert, str) else cert)]
        session.cert = paths[0] if isinstance(cert, str) else (paths[0], paths[1])
        fail(secure.url, ndcache.TLSError, "session.cert", words, session=session)


def test_row_17_the_hint_tells_that_ssl_cert_file_is_not_read(
    secure: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/ca.pem")
    fail(secure.url, ndcache.TLSError, "authority", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE is not read")


# --- proxies --------------------------------------------------------------------------------------------

NO_ADDRESS = "is not the address of a proxy"
WRONG_PROXIES = [
    ("http://", NO_ADDRESS),
    ("http:///x", NO_ADDRESS),
    ("http://:80:80", NO_ADDRESS),
    ("http://user:secret@:80", NO_ADDRESS),
    ("http://127.0.0.1:99999", NO_ADDRESS),
    ("127.0.0.1:port", NO_ADDRESS),
    ("http://[::1", NO_ADDRESS),
    ("http://a..b:80", NO_ADDRESS),
    ('"http://127.0.0.1:9"', NO_ADDRESS),
    ("http://127.0.0.1:port", "_PROXY is not the address of a proxy"),
    ("http://user:secret@a..b:80", NO_ADDRESS),
    ("ftp://127.0.0.1:21", "kind"),
    ("s3://bucket", "kind"),
    ("socks9://user:secret@127.0.0.1:21", "kind"),
    ("http://no-such-host.invalid:3128", "http://no-such-host.invalid:3128"),
    ("http://user:secret@no-such-host.invalid:3128", "not known"),
    ("http://user:secret@127.0.0.1:9", "the proxy http://127.0.0.1:9"),
    ("user:secret@127.0.0.1:9", NO_ADDRESS),
    ("localhost:9", "localhost:9"),
    ("127.0.0.1:9", "refuses connections"),
    ("https://user:secret@127.0.0.1:9", "refuses connections"),
]


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(("value", "words"), WRONG_PROXIES)
def test_row_48_a_proxy_address_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, scheme: str, value: str, words: str
) -> None:
    name = f"{scheme}_PROXY".upper()
    monkeypatch.setenv(name, value)
    error = fail(NOWHERE.replace("http", scheme), ndcache.ConnectError, name, words)
    assert "models.example" not in error.message  # the server is not at fault


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_row_48_the_variable_of_a_wrong_proxy_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, name: str) -> None:
    if name.lower() == "http_proxy":
        name = name.replace("http", scheme).replace("HTTP", scheme.upper())
    monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
    fail(NOWHERE.replace("http", scheme), ndcache.ConnectError, f"({name})")


@pytest.mark.parametrize("key", ["http", "http://models.example", "all", "all://models.example"])
def test_row_48_a_wrong_proxy_of_the_session_is_named(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with requests.Session() as session:
        session.trust_env = False
        session.proxies = {key: "http://user:secret@127.0.0.1:9", "https": "http://127.0.0.1:2"}
        fail(NOWHERE, ndcache.ConnectError, f"session.proxies[{key!r}]", "http://127.0.0.1:9", session=session)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("kind", ["socks4", "socks5", "socks5h"])
def test_row_48_socks_without_its_package(monkeypatch: pytest.MonkeyPatch, scheme: str, kind: str) -> None:
    if importlib.util.find_spec("socks") is not None:
        pytest.skip("PySocks is installed")
    monkeypatch.setenv("ALL_PROXY", f"{kind}://user:secret@127.0.0.1:9")
    fail(NOWHERE.replace("http", scheme), ndcache.ConnectError, "ALL_PROXY", 'pip install "requests[socks]"')


REFUSAL = reply(407, b"", {"Proxy-Authenticate": 'Basic realm="corp"', "Connection": "close"})


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("given", ["", "user:secret@"])
def test_row_48_a_proxy_that_wants_a_password(
    proxy: ScriptedServer, monkeypatch: pytest.MonkeyPatch, scheme: str, given: str
) -> None:
    name = f"{scheme}_PROXY".upper()
    monkeypatch.setenv(name, f"http://{given}127.0.0.1:{proxy.port}")
    target = "models.example:443" if scheme == "https" else f"{NOWHERE}tensor-cache.json"
    proxy.script[target] = [then_close(REFUSAL)]
    error = fail(NOWHERE.replace("http", scheme), ndcache.AuthError, name, "password", "407")
    assert error.status == 407
    assert len(proxy.requests) == 1
    assert ("proxy-authorization" in proxy.requests[0].headers) == bool(given)


@pytest.mark.parametrize(("status", "tries"), [(403, 1), (405, 1), (502, 3), (503, 3)])
def test_row_48_a_proxy_that_refuses_to_connect_to_the_server(
    proxy: ScriptedServer, monkeypatch: pytest.MonkeyPatch, status: int, tries: int
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    proxy.script["models.example:443"] = [then_close(reply(status))]
    with pytest.raises(ndcache.ConnectError, match=f"status {status}"):
        ndcache.load("https://models.example/", retries=RetryPolicy(2, backoff=0.01))
    assert len(proxy.requests) == tries


def test_row_48_a_proxy_without_tls(proxy: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy answers a TLS hello in plain text."""
    monkeypatch.setenv("HTTPS_PROXY", f"https://user:secret@127.0.0.1:{proxy.port}")

    def read_request(connection: Connection) -> None:
        connection.sock.recv(1 << 16)
        connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    monkeypatch.setattr(Connection, "read_request", read_request)
    fail("https://models.example/", ndcache.ConnectError, "Write http:// instead of https:// in HTTPS_PROXY")
    assert proxy.connections == 1


def test_row_48_a_proxy_with_an_unknown_certificate(secure: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", secure.url)
    fail("https://models.example/", ndcache.TLSError, "the proxy", "HTTPS_PROXY", "authority")


def test_row_17_a_server_with_an_unknown_certificate_behind_a_proxy(
    secure: ScriptedServer, proxy: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(connection: Connection, request: Request) -> None:
        connection.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        connection.pass_on(secure.port)

    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    proxy.script[f"127.0.0.1:{secure.port}"] = [step]
    error = fail(secure.url, ndcache.TLSError, "no secure connection to 127.0.0.1", "authority")
    assert "proxy" not in str(error).lower()


def test_row_12_a_proxy_that_worked_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, policy = ScriptedServer(), RetryPolicy(3, backoff=0.01)
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    url = f"http://host-{proxy.port}.example/"
    with pytest.raises(ndcache.NotFoundError):
        ndcache.load(url)
    proxy.close()
    with pytest.raises(ndcache.ConnectError, match="the proxy") as caught:
        ndcache.load(url, retries=policy)
    assert caught.value.attempts == 4


# --- credentials and headers ---------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["secret\u2026", "\u201csecret\u201d", "secret\nsecret", "\u5bc6"])
def test_row_48_a_token_that_cannot_be_sent(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_ENDPOINT", scripted.url)
    fail("hf://owner/model", ndcache.AuthError, "HF_TOKEN")
    assert not scripted.requests


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_row_48_a_password_in_the_url_that_cannot_be_sent(
    secure: ScriptedServer, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    url = secure.url.replace("https", scheme).replace("//", "//user:secret%E2%80%A6@")
    fail(url, ndcache.AuthError, "the user or password in the URL")


@pytest.mark.parametrize("value", ["secret\n", "secret\r\nX: y", "secret\u2026", " secret"])
def test_row_48_a_header_of_the_session_that_cannot_be_sent(scripted: ScriptedServer, value: str) -> None:
    with requests.Session() as session:
        session.headers["X-Api-Key"] = value
        fail(scripted.url, ndcache.AuthError, "the session's header 'X-Api-Key'", session=session)
    assert not scripted.requests


def test_row_48_a_password_of_the_session_that_cannot_be_sent(scripted: ScriptedServer) -> None:
    with requests.Session() as session:
        session.auth = ("user", "secret\u2026")
        fail(scripted.url, ndcache.AuthError, "session.auth", session=session)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_row_48_a_password_of_a_proxy_that_cannot_be_sent(
    proxy: ScriptedServer, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", f"http://user:secret\u2026@127.0.0.1:{proxy.port}")
    fail(NOWHERE.replace("http", scheme), ndcache.AuthError, "the user or password of the proxy")


def test_row_48_netrc_with_a_letter_that_cannot_be_sent(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\u2026\n", "utf-8")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    scripted.script["/tensor-cache.json"] = [reply(401)]  # Python 3.10 cannot read the file
    fail(scripted.url, ndcache.AuthError, str(tmp_path / "netrc"))


def test_row_48_netrc_that_is_damaged(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("\nmachine 127.0.0.1 login user pass secret\n", "utf-8")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    scripted.script["/tensor-cache.json"] = [reply(401)]
    fail(scripted.url, ndcache.AuthError, f"{tmp_path / 'netrc'} (line 2) cannot be read")


def test_row_48_netrc_that_is_not_text(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_bytes(b"machine 127.0.0.1 login user password \xff\xfe\x00\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    scripted.script["/tensor-cache.json"] = [reply(401)]
    fail(scripted.url, ndcache.AuthError, str(tmp_path / "netrc"))


# --- the first request of a load -----------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://no-such-host.invalid/", "http://127.0.0.1:9/"])
@pytest.mark.parametrize("retries", [0, 6])
def test_row_12_a_server_that_has_never_answered_is_tried_twice(url: str, retries: int) -> None:
    with pytest.raises(ndcache.ConnectError) as caught:
        ndcache.load(url, retries=RetryPolicy(retries, backoff=0.01))
    assert (caught.value.attempts or 1) == min(retries, 1) + 1


def test_row_12_a_server_that_has_answered_is_waited_for(scripted: ScriptedServer) -> None:
    with pytest.raises(ndcache.NotFoundError):
        ndcache.load(scripted.url)
    scripted.close()
    with pytest.raises(ndcache.ConnectError) as caught:
        ndcache.load(scripted.url, retries=RetryPolicy(4, backoff=0.01))
    assert caught.value.attempts == 5


def test_row_12_a_redirect_to_a_dead_server_is_retried(scripted: ScriptedServer) -> None:
    scripted.script["/tensor-cache.json"] = [reply(302, b"", {"Location": "http://127.0.0.1:9/"})]
    with pytest.raises(ndcache.ConnectError) as caught:
        ndcache.load(scripted.url, retries=RetryPolicy(4, backoff=0.01))
    assert caught.value.attempts == 5


def test_row_12_a_name_server_out_of_reach_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(ndcache.ConnectError) as caught:
        ndcache.load("http://host.example/", retries=RetryPolicy(3, backoff=0.01))
    assert caught.value.attempts == 4


def test_row_12_each_shard_of_a_dead_source_comes_from_the_mirror_without_waiting(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    """The loader remembers that a source failed, although it tries it only twice."""
    ndcache.dump({f"{n}": np.full(100, n) for n in range(3)}, tmp_path / "model", shard_bytes=800)
    digest = hashlib.sha256((tmp_path / "model" / "tensor-cache.json").read_bytes()).digest()
    sri = "sha256-" + base64.b64encode(digest).decode()
    for path in (tmp_path / "model").iterdir():
        scripted.script[f"/{path.name}"] = [reply(200, path.read_bytes())]
    with Loader(
        mirrors=scripted.url, integrity={"tensor-cache.json": sri}, retries=RetryPolicy(backoff=0.01)
    ) as loader:
        weights = loader.load("http://127.0.0.1:9/")
    assert len(weights) == 3


def test_settings_are_not_examined_while_requests_succeed(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/missing.pem")
    scripted.script["/a"] = [reply(200, b"there")]
    transport = Transport()
    with transport.get(scripted.url + "a", {}, Cancellation()) as response:
        assert response.read(10) == b"there"
    transport.close()
