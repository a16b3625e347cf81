"""HTTP as ndcache needs it: one GET at a time, bodies as they are, every failure an error of `ndcache.errors`.

requests does the work. On top of it come the rules that a loader of other people's files must keep: no
credentials to another origin, no way back from https, no decoding of bodies, timeouts everywhere, retries in
one place only, and a way to wake a thread that waits for a socket.
"""

from __future__ import annotations

import email.utils
import functools
import http.client
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

from ._version import __version__
from .errors import (
    AuthError,
    CancelledError,
    ConnectError,
    NdcacheError,
    NotFoundError,
    ProtocolError,
    RateLimitedError,
    RedirectError,
    ServerError,
    StallError,
    TLSError,
    TransferError,
    TruncatedError,
    redact,
)

__all__ = ["Response", "RetryPolicy", "Stop", "Transport"]

_MAX_REDIRECTS = 10
_DRAIN_BYTES = 1 << 14
#: What requests, urllib3 and http.client raise when something is wrong with the network or the server.
_FAILURES = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    ValueError,
)
_USER_AGENT = f"ndcache/{__version__}"


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently a failed request is tried again.

    Parameters
    ----------
    retries : int
        Tries after the first one.
    budget : float
        Seconds after the first failure in which a next try may begin.
    backoff, max_backoff : float
        The wait before try *n* + 1 is drawn evenly from 0 to ``min(max_backoff, backoff * 2**n)`` seconds
        ("full jitter").
    """

    retries: int = 6
    budget: float = 300.0
    backoff: float = 0.5
    max_backoff: float = 30.0

    def delay(self, error: NdcacheError, failures: int, spent: float) -> float | None:
        """Seconds to wait before the next try, or None if there must be none.

        Parameters
        ----------
        error : NdcacheError
            What the last try ended with.
        failures : int
            Tries that have failed so far, this one included.
        spent : float
            Seconds since the first failure.
        """
        allowed = min(self.retries, 1) if error.retry_once else self.retries
        if not error.retryable or failures > allowed:
            return None
        asked = error.retry_after if isinstance(error, RateLimitedError) else None
        if asked is not None:
            return asked if spent + asked <= self.budget else None
        wait = random.uniform(0, min(self.max_backoff, self.backoff * 2.0 ** (failures - 1)))
        return wait if spent + wait <= self.budget else None


@dataclass
class Stop:
    """The order to stop, for all threads of one load.

    The caller's thread sets it; the workers look at it, sleep on it, and have their sockets shut under them by it, so
    that none waits for a server that does not answer.

    Parameters
    ----------
    cancel : threading.Event, optional
        The caller's own event, looked at wherever this one is.
    """

    cancel: threading.Event | None = None
    _event: threading.Event = field(default_factory=threading.Event, init=False)
    _wakers: set[Callable[[], None]] = field(default_factory=set, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def set(self) -> None:
        """Stop everything: wake the sleepers, shut the sockets."""
        with self._lock:
            self._event.set()
            wakers = list(self._wakers)
        for wake in wakers:
            wake()

    def check(self) -> None:
        """Raise `CancelledError` if the order has been given."""
        if self.cancel is not None and self.cancel.is_set():
            self.set()
        if self._event.is_set():
            raise CancelledError("the load was cancelled", hint="The shards that had come are kept.")

    def sleep(self, seconds: float) -> None:
        """Wait, or raise `CancelledError` as soon as the order is given."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            self._event.wait(left if self.cancel is None else min(left, 0.1))
        self.check()

    def watch(self, wake: Callable[[], None]) -> None:
        """Call `wake` when the order is given (at once, if it has been)."""
        with self._lock:
            self._wakers.add(wake)
            given = self._event.is_set()
        if given:
            wake()

    def forget(self, wake: Callable[[], None]) -> None:
        """Do not call `wake` any more."""
        with self._lock:
            self._wakers.discard(wake)


class Response:
    """The answer to one GET, its body not yet read. Use it in a ``with`` block.

    Attributes
    ----------
    status : int
    headers : mapping
        Case-insensitive.
    url : str
        Where it came from in the end, after redirects.
    location : str or None
        Where it redirects to.
    """

    def __init__(
        self, raw: requests.Response, stop: Stop, finish: Callable[[], None], location: str | None = None
    ) -> None:
        self.status: int = raw.status_code
        self.headers: Mapping[str, str] = raw.headers
        self.url: str = raw.url
        self.location = location
        self._raw = raw
        self._stop = stop
        self._finish = finish

    @property
    def content_length(self) -> int | None:
        """The body's length as announced; None if it is not."""
        text = self.headers.get("Content-Length")
        if text is None or "Transfer-Encoding" in self.headers:
            return None
        if not re.fullmatch(r"[0-9]{1,19}", text):
            raise ProtocolError(f"the server sent the Content-Length {text[:40]!r}", url=self.url, status=self.status)
        return int(text)

    def read_some(self, limit: int) -> bytes:
        """What has come of the body, 1 to `limit` bytes; waits for it if need be, and is empty at the end.

        Raises
        ------
        TransferError
            The body broke off, as the HTTP framing shows it. A body without framing just ends: count its bytes.
        """
        try:
            data: bytes = self._raw.raw.read1(limit, decode_content=False)
        except _FAILURES as error:
            self._stop.check()
            _raise_transfer_error(error, self.url)
        if not data:
            self._stop.check()  # a socket that was shut looks like the end of the body
        return data

    def read(self, limit: int) -> bytes:
        """The whole body, which must not be over `limit` bytes; one byte more is read to find out."""
        body = bytearray()
        while len(body) <= limit and (data := self.read_some(min(limit + 1 - len(body), 1 << 16))):
            body += data
        return bytes(body)

    def __enter__(self) -> Response:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and (self.content_length or 0) <= _DRAIN_BYTES:
                # A connection is given back for reuse when its body has been read to the end.
                self.read(_DRAIN_BYTES)
        except NdcacheError:
            pass
        finally:
            self._raw.close()
            self._finish()


class Transport:
    """Sessions, and the one way to make a request. Safe to share between threads, and after a fork.

    Parameters
    ----------
    session : requests.Session, optional
        The caller's; its headers, cookies and auth go to the origin that was asked for and no other.
    timeout : tuple of float
        Seconds to connect, and to wait for the next bytes.
    max_connections : int
        Connections kept for reuse.
    bearer : tuple of str, optional
        An origin and the token to send to it (Hugging Face).
    """

    def __init__(
        self,
        *,
        session: requests.Session | None = None,
        timeout: tuple[float, float] = (10.0, 30.0),
        max_connections: int = 8,
        bearer: tuple[str, str] | None = None,
    ) -> None:
        self._given = session
        self._timeout = timeout
        self._max_connections = max_connections
        self._bearer = bearer
        self._made: dict[int, tuple[requests.Session, requests.Session]] = {}
        self._lock = threading.Lock()

    def get(self, url: str, headers: Mapping[str, str], stop: Stop) -> Response:
        """Ask for `url`; the answer is 200, 206, 304 or 416, anything else is raised.

        Parameters
        ----------
        url : str
            May hold a user and password.
        headers : mapping
            Sent to every hop.
        stop : Stop
            Wakes the calling thread, here and in `Response.read_some`.

        Raises
        ------
        TransferError
            As one of its subclasses.
        CancelledError
            `stop` was set.
        """
        stop.check()
        first, seen = url, set[str]()
        while True:
            seen.add(url)
            response = self._send(url, headers, stop, same_origin=_origin(url) == _origin(first))
            if response.status in (301, 302, 303, 307, 308) and response.location:
                with response:
                    url = _follow(url, response.location, seen)
                continue
            try:
                _raise_for_status(response)
            except BaseException:
                response.__exit__(Exception)
                raise
            return response

    def close(self) -> None:
        """Close the connections that were kept."""
        with self._lock:
            for own, bare in self._made.values():
                for session in {own, bare} - {self._given}:
                    session.close()
            self._made.clear()

    def _send(self, url: str, headers: Mapping[str, str], stop: Stop, same_origin: bool) -> Response:
        own, bare = self._sessions()
        session = own if same_origin else bare
        held: list[str] = []

        def hold_redirect(answer: requests.Response, **_: Any) -> None:
            # Even when it must not follow, requests reads the whole body of an answer that has a Location.
            if target := answer.headers.pop("Location", None):
                held.append(target)

        try:
            with _watching(stop) as finish:
                raw = session.get(
                    url,
                    headers={"Accept-Encoding": "identity", **headers},
                    auth=self._auth(url) if same_origin else _no_auth,
                    timeout=self._timeout,
                    stream=True,
                    allow_redirects=False,
                    hooks={"response": [*session.hooks["response"], hold_redirect]},
                )
        except _FAILURES as error:
            stop.check()
            _raise_transfer_error(error, url)
        if session is self._given:
            stop.watch(wake := _waker(raw))
            return Response(raw, stop, lambda: stop.forget(wake), *held)
        return Response(raw, stop, finish, *held)

    def _auth(self, url: str) -> Callable[[Any], Any] | None:
        if self._bearer is None or _origin(url) != _origin(self._bearer[0]):
            return None
        return _Bearer(self._bearer[1])

    def _sessions(self) -> tuple[requests.Session, requests.Session]:
        """The session for the origin asked for, and one without secrets for where it redirects."""
        with self._lock:
            pid = os.getpid()  # a forked child must not share its parent's sockets
            if pid not in self._made:
                bare = self._session()
                if self._given is None:
                    self._made[pid] = (bare, bare)
                else:
                    bare.proxies, bare.verify = dict(self._given.proxies), self._given.verify
                    bare.trust_env = self._given.trust_env
                    self._made[pid] = (self._given, bare)
            return self._made[pid]

    def _session(self) -> requests.Session:
        session = requests.Session()
        session.headers.clear()
        session.headers["User-Agent"] = _USER_AGENT
        adapter = _Adapter(pool_maxsize=self._max_connections, max_retries=0)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        return session


class _Bearer(requests.auth.AuthBase):
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Given as ``auth``, it also keeps requests from looking into netrc."""
    return request


# --- waking threads -----------------------------------------------------------------------------------

_current = threading.local()


def _shut(sock: socket.socket) -> None:
    try:
        # Not sock.shutdown(): SSLSocket's would pull its state away from the thread that reads.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass  # not connected any more


def _waker(raw: requests.Response) -> Callable[[], None]:
    """For a session of the caller's, whose connections cannot be watched: from the headers on."""

    def wake() -> None:
        try:
            raw.raw.shutdown()
        except (AttributeError, OSError, RuntimeError, ValueError):
            pass  # over, or not a socket at all

    return wake


@contextmanager
def _watching(stop: Stop) -> Iterator[Callable[[], None]]:
    """Have `stop` shut the socket that this thread's next request uses, until the yielded function is called."""
    wakers: list[Callable[[], None]] = []

    def watch(sock: socket.socket) -> None:
        wakers.append(functools.partial(_shut, sock))
        stop.watch(wakers[-1])

    def finish() -> None:
        for wake in wakers:
            stop.forget(wake)

    _current.watch = watch
    try:
        yield finish
    except BaseException:
        finish()
        raise
    finally:
        _current.watch = None


class _Watched(HTTPConnection):
    """A connection that shows its socket to whoever watches this thread."""

    def connect(self) -> None:
        super().connect()
        self._show()

    def request(self, *args: Any, **kwargs: Any) -> None:
        self._show()
        super().request(*args, **kwargs)

    def _show(self) -> None:
        watch = getattr(_current, "watch", None)
        if watch is not None and self.sock is not None:
            watch(self.sock)


class _WatchedTLS(_Watched, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Watched


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _WatchedTLS


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> urllib3.ProxyManager:
        manager: urllib3.ProxyManager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
        return manager


# --- redirects and statuses ---------------------------------------------------------------------------


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    return scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(scheme)


def _follow(url: str, target: str, seen: set[str]) -> str:
    try:
        new = urljoin(url, target)
        scheme, host, _ = _origin(new)
    except ValueError as error:
        raise RedirectError("the server redirects to an unreadable address", url=url) from error
    if scheme not in ("http", "https") or not host:
        raise RedirectError(f"the server redirects to {scheme or 'nowhere'}:", url=url)
    if scheme == "http" and _origin(url)[0] == "https":
        raise RedirectError(f"the server redirects from https to {redact(new)}", url=url)
    if new in seen or len(seen) > _MAX_REDIRECTS:
        raise RedirectError("the server redirects in a circle, or too often", url=url)
    return new


def _raise_for_status(response: Response) -> None:
    status, url = response.status, response.url
    if status in (200, 206, 304, 416):
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            raise ProtocolError(
                f"the server sent a body encoded as {encoding[:40]!r} although none was asked for",
                url=url,
                status=status,
            )
        return
    wait = response.headers.get("Retry-After")
    if status == 429 or (status == 503 and wait is not None):
        error = RateLimitedError("the server asks to come back later", url=url, status=status)
        error.retry_after = _seconds(wait)
        raise error
    if status in (401, 403):
        raise AuthError(f"the server refuses access (status {status})", url=url, status=status, hint=_login(url))
    if status in (404, 410):
        raise NotFoundError(f"the server has no such file (status {status})", url=url, status=status)
    if status == 408 or status >= 500:
        raise ServerError(f"the server failed (status {status})", url=url, status=status, hint="Try again later.")
    raise ProtocolError(f"the server answered with status {status}", url=url, status=status)


def _login(url: str) -> str:
    if (urlsplit(url).hostname or "").endswith("huggingface.co"):
        return "For a gated or private repository, accept its terms on its page and set HF_TOKEN."
    return "Give credentials through the session option, or check the URL."


def _seconds(value: str | None) -> float | None:
    """Retry-After, as seconds from now; None for garbage."""
    if value is None:
        return None
    if re.fullmatch(r"[0-9]{1,10}", value.strip()):
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None


# --- failures -----------------------------------------------------------------------------------------


def _raise_transfer_error(error: Exception, url: str) -> NoReturn:
    """Raise `error`, of whatever library, as ours."""
    chain = list(_causes(error))
    # Their own text may hold the whole URL, signature and all; the cause at the bottom does not.
    cause = next((e for e in reversed(chain) if not isinstance(e, _MAY_SHOW_URLS)), None)
    raise _transfer_error(chain, url) from cause


_MAY_SHOW_URLS = (requests.RequestException, urllib3.exceptions.PoolError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what lies below it, wherever requests and urllib3 have put it."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        below = (getattr(current, "reason", None), *current.args, current.__cause__, current.__context__)
        waiting += [item for item in below if isinstance(item, BaseException)]


def _transfer_error(chain: list[BaseException], url: str) -> TransferError:
    def has(*kinds: type[BaseException]) -> BaseException | None:
        return next((e for e in chain if isinstance(e, kinds)), None)

    host = urlsplit(url).hostname or "the host"
    if has(requests.exceptions.ProxyError, urllib3.exceptions.ProxyError):
        return ConnectError("the proxy could not be used", url=url, hint="Check HTTPS_PROXY, HTTP_PROXY and NO_PROXY.")
    if has(requests.exceptions.SSLError, urllib3.exceptions.SSLError, ssl.SSLCertVerificationError):
        detail = has(ssl.SSLError) or chain[-1]
        return TLSError(
            f"no secure connection to {host}: {_reason(detail)}",
            url=url,
            hint="For a private certificate authority, set REQUESTS_CA_BUNDLE to its file.",
        )
    if has(socket.gaierror, urllib3.exceptions.NameResolutionError):
        return ConnectError(f"the host {host} is not known", url=url, hint="Check its spelling and the network.")
    if has(ConnectionRefusedError):
        return ConnectError(f"{host} refuses connections", url=url, hint="Is the server running?")
    if has(urllib3.exceptions.NewConnectionError) and not has(TimeoutError):
        return ConnectError(f"{host} cannot be reached: {_reason(chain[-1])}", url=url, hint="Check the network.")
    if has(requests.exceptions.ConnectTimeout, urllib3.exceptions.ConnectTimeoutError):
        return ConnectError(f"{host} did not answer in time", url=url, hint="Check the network.")
    if has(urllib3.exceptions.ReadTimeoutError, requests.exceptions.ReadTimeout, TimeoutError):
        return StallError("the server stopped sending", url=url, hint="Try again later.")
    if has(http.client.IncompleteRead, urllib3.exceptions.IncompleteRead):
        return TruncatedError("the body ended early", url=url)
    if has(http.client.RemoteDisconnected, ConnectionError) or isinstance(chain[-1], ssl.SSLError):
        return ConnectError(f"the connection to {host} broke", url=url, hint="Try again.")
    if has(http.client.HTTPException, urllib3.exceptions.HTTPError, ValueError):
        return ProtocolError(f"the answer is not proper HTTP: {_reason(chain[-1])}", url=url)
    return ConnectError(f"{host} cannot be reached: {_reason(chain[-1])}", url=url)


def _reason(error: BaseException) -> str:
    text = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
    return text[:160] or type(error).__name__
