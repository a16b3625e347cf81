"""urllib3 connections whose sockets are known, so that another thread can wake one that waits for a server."""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util import parse_url
from urllib3.util.ssltransport import SSLTransport

from ..urls.redact import printable
from ..urls.url import Origin
from ..workers.stall import StallWatch
from .connect import Address, Routes, connect_to_first, resolve
from .raw_response import RawResponse
from .tls import close_abandoned

__all__ = ["WatchedAdapter", "WrongOriginError", "waker", "watch_adapter", "watching"]

_current = threading.local()


def _shut(sock: socket.socket | SSLTransport) -> None:
    while isinstance(sock, SSLTransport):  # TLS through a proxy that speaks TLS itself
        sock = sock.socket
    try:
        # Not sock.shutdown(): SSLSocket's would drop the TLS state that the reading thread is using.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass  # not connected any more


def waker(raw: requests.Response) -> Callable[[], None]:
    """Return a function that wakes the thread that reads the body, for connections that cannot be watched."""

    def wake() -> None:
        try:
            raw.raw.shutdown()
        except (AttributeError, OSError, RuntimeError, ValueError):
            pass  # closed already, or not a socket at all

    return wake


@contextmanager
def watching(watch: StallWatch, origin: Origin, routes: Routes) -> Iterator[None]:
    """Let `watch` wake this thread while it makes a request in the block, and afterwards.

    A request to another origin than `origin` fails. New connections try the addresses of `routes` first.
    """
    _current.watch, _current.origin, _current.routes = watch, origin, routes
    try:
        yield
    except BaseException:
        response: RawResponse | None = getattr(_current, "response", None)
        if response is not None:
            response.close()  # urllib3 drops one whose lengths contradict each other, and leaves its socket open
        raise
    finally:
        _current.watch = _current.origin = _current.routes = _current.response = None


class _WithoutQueries(logging.Filter):
    """Remove queries, which may be signatures, from the log records of urllib3 about our requests."""

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(_current, "watch", None) is not None:
            record.msg, record.args = printable(re.sub(r"\?[^\s'\"]+", "?…", record.getMessage())), None
            record.exc_info = None
        return True


for _name in ("urllib3.connection", "urllib3.connectionpool", "urllib3.util.retry"):
    logging.getLogger(_name).addFilter(_WithoutQueries())


class _CurrentResponse(RawResponse):
    """A response that `watching` can close if the request fails; other requests get one that is not ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, lends_buffer=getattr(_current, "watch", None) is not None, **kwargs)
        _current.response = self


class _WatchedConnection(HTTPConnection):
    """A connection that gives its socket to the `StallWatch` of this thread."""

    response_class = _CurrentResponse
    _is_used = False
    _connecting: socket.socket | None = None

    def connect(self) -> None:
        try:
            super().connect()
        except OSError as error:
            close_abandoned(error)
            raise
        finally:
            if self._connecting is not None:
                self._connecting.close()
        self._is_used = False
        self._give_to_watch()

    def request(self, *args: Any, **kwargs: Any) -> None:
        watch: StallWatch | None = getattr(_current, "watch", None)
        if watch is not None:
            watch.is_reused = self.sock is not None and self._is_used
        self._give_to_watch()
        super().request(*args, **kwargs)
        self._is_used = True
        if watch is not None:
            watch.before_wait()

    def _new_conn(self) -> socket.socket:
        """Connect as urllib3 does, but let the socket be shut while it connects, and during the TLS handshake."""
        watch: StallWatch | None = getattr(_current, "watch", None)
        if watch is not None:
            watch.before_wait()
        try:
            with watch.paused() if watch is not None else contextlib.nullcontext():
                sock = self._connect_first(watch)
        except socket.gaierror as error:
            raise NameResolutionError(self.host, self, error) from error
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"{self.host} did not answer in {self.timeout} s") from error
        except OSError as error:
            raise NewConnectionError(self, f"no connection to {self.host}: {error}") from error
        if watch is not None:
            # A duplicate, as TLS makes a new socket from this one.
            try:
                self._connecting = sock.dup()
            except OSError:  # no descriptor is left
                sock.close()
                raise
            watch.add_waker(functools.partial(_shut, self._connecting))
        return sock

    def _connect_first(self, watch: StallWatch | None) -> socket.socket:
        """Connect to the first of the host's addresses that answers."""
        host, port = self._dns_host.strip("[]"), self.port
        routes: Routes = getattr(_current, "routes", None) or Routes()

        def open_socket(address: Address) -> socket.socket:
            sock = socket.socket(address.family, address.type, address.proto)
            try:
                for option in self.socket_options or ():
                    sock.setsockopt(*option)
                sock.setblocking(False)
                if self.source_address:
                    sock.bind(self.source_address)
            except BaseException:
                sock.close()
                raise
            if watch is not None:
                watch.add_waker(functools.partial(_shut, sock))
            return sock

        addresses = routes.order(host, port, resolve(host, port))
        try:
            sock, winner = connect_to_first(
                addresses, self.timeout, open_socket, lambda: watch is not None and watch.is_woken
            )
        except OSError:
            routes.remember(host, port, None)
            raise
        if winner != addresses[0]:
            routes.remember(host, port, winner)
        sock.settimeout(self.timeout)
        return sock

    def _give_to_watch(self) -> None:
        watch: StallWatch | None = getattr(_current, "watch", None)
        if watch is not None and self.sock is not None:
            watch.is_connected = True
            watch.add_waker(functools.partial(_shut, self.sock))
            watch.restart()  # the handshake is over, and the response gets a timeout of its own


class _WatchedTLSConnection(_WatchedConnection, HTTPSConnection):
    def request(self, *args: Any, **kwargs: Any) -> None:
        super().request(*args, **kwargs)
        # A TLS connection that ends without notice may have been cut off (RFC 9112, 9.8). By default, ssl ignores that;
        # it still does for the caller's own requests with a session that was given to us.
        is_ours = getattr(_current, "watch", None) is not None
        self.sock.suppress_ragged_eofs = not is_ours  # type: ignore[union-attr]


class _OpenConnectionsFirst(queue.LifoQueue[Any]):
    """A queue of idle connections that prefers open ones to closed ones, as a server may limit their number.

    In urllib3's own queue, a connection that the server closed stays on top. If the server refuses to reopen it, it
    goes back there, and open ones remain unused.
    """

    def _put(self, item: HTTPConnection | None) -> None:
        self.queue.insert(0 if item is None or item.sock is None else len(self.queue), item)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _WatchedConnection
    QueueCls = _OpenConnectionsFirst


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _WatchedTLSConnection
    QueueCls = _OpenConnectionsFirst


class WrongOriginError(Exception):
    """A request was about to go to another origin than the one that was checked."""


def _check_origin(scheme: str | None, host: str | None, port: int | None) -> None:
    """Raise unless the request of this thread goes to its origin.

    Each library above the sockets has parsed the URL in its own way, and one may have read another origin.
    """
    origin: Origin | None = getattr(_current, "origin", None)
    if origin is None:
        return
    found = (scheme or "", (host or "").strip("[]"), port or origin.port)
    if found != origin:
        raise WrongOriginError(f"to {found[0]}://{found[1]}:{found[2]}")


_POOLS = {"http": _Pool, "https": _TLSPool}


def watch_adapter(session: requests.Session, url: str, proxy: str | None) -> None:
    """Let a caller's session make connections for `url` that can be watched, if its adapter is requests' own.

    `proxy` is the address of the proxy that the connections go through, if there is one.
    """
    with contextlib.suppress(ValueError):  # the address is invalid, and the request itself will raise that
        adapter = session.get_adapter(url)
        if type(adapter) is not HTTPAdapter or type(adapter.poolmanager) is not urllib3.PoolManager:
            return
        manager = adapter.poolmanager
        if proxy is not None:
            address = requests.utils.prepend_scheme_if_needed(proxy, "http")  # type: ignore[no-untyped-call]
            manager = adapter.proxy_manager_for(address)
        is_usual = type(manager) in (urllib3.PoolManager, urllib3.ProxyManager)  # not the manager of a SOCKS proxy
        if is_usual and manager.pool_classes_by_scheme.get("http") is not _Pool:
            manager.pool_classes_by_scheme = dict(_POOLS)
            manager.clear()  # drops idle connections; those in use go on


class WatchedAdapter(HTTPAdapter):
    """The adapter of our own sessions: its connections can be watched, and go to the origin that was checked.

    The adapters of a caller's session do not check the origin: the session may ask another server for a token within a
    request of ours.
    """

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = dict(_POOLS)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> urllib3.ProxyManager:
        manager: urllib3.ProxyManager = super().proxy_manager_for(*args, **kwargs)
        if type(manager) is urllib3.ProxyManager:  # a SOCKS manager has connections of its own
            manager.pool_classes_by_scheme = dict(_POOLS)
        return manager

    # requests calls the next two just before it hands a request over to urllib3. They have returned before it waits for
    # the server, so that they cost no frame there.

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        if conn.proxy is None or url[:5].lower() != "http:":  # else the proxy is told the URL, see `request_url`
            _check_origin(conn.scheme, conn.host, conn.port)
        super().cert_verify(conn, url, verify, cert)  # type: ignore[no-untyped-call]

    def request_url(self, request: requests.PreparedRequest, proxies: Any) -> str:
        url = super().request_url(request, proxies)
        if url[:5].lower() == "http:":  # for a proxy, which is told the whole URL
            target = parse_url(url)
            _check_origin(target.scheme, target.host, target.port)
        return url

    def close(self) -> None:
        # Otherwise the pools' finalizers would close them, and Ctrl-C is lost within one. A pool in use stays usable.
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            for key in manager.pools.keys():  # noqa: SIM118 - it cannot be iterated over
                if (pool := manager.pools.get(key)) is not None:
                    _close_idle(pool)
        super().close()


def _close_idle(pool: urllib3.HTTPConnectionPool) -> None:
    with contextlib.suppress(Empty):
        while (idle := pool.pool) is not None:
            if (connection := idle.get(block=False)) is not None:
                connection.close()
