"""urllib3 connections that show their sockets, so that a thread which waits for one can be woken."""

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

from ..urls.redact import printable
from ..urls.url import Origin
from ..workers.stall import StallWatch
from .connect import Address, Routes, connect_to_first, look_up
from .raw_response import RawResponse

__all__ = ["WatchedAdapter", "WrongOriginError", "waker", "watch_adapter", "watching"]

_current = threading.local()


def _shut(sock: socket.socket) -> None:
    try:
        # Not sock.shutdown(): SSLSocket's would pull its state away from the thread that reads.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass  # not connected any more


def waker(raw: requests.Response) -> Callable[[], None]:
    """For a session of the caller's, whose connections cannot be watched: from the headers on."""

    def wake() -> None:
        try:
            raw.raw.shutdown()
        except (AttributeError, OSError, RuntimeError, ValueError):
            pass  # over, or not a socket at all

    return wake


@contextmanager
def watching(watch: StallWatch, origin: Origin, routes: Routes) -> Iterator[None]:
    """Tell `watch` how to wake this thread while it makes a request in the block, and afterwards.

    The request goes to `origin` or nowhere. New connections begin with the addresses of `routes`.
    """
    _current.watch, _current.origin, _current.routes = watch, origin, routes
    try:
        yield
    finally:
        _current.watch = _current.origin = _current.routes = None


class _WithoutQueries(logging.Filter):
    """Takes the queries, which may be signatures, out of what urllib3 logs of our requests, and whatever holds them."""

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(_current, "watch", None) is not None:
            record.msg, record.args = printable(re.sub(r"\?[^\s'\"]+", "?…", record.getMessage())), None
            record.exc_info = None
        return True


for _name in ("urllib3.connection", "urllib3.connectionpool", "urllib3.util.retry"):
    logging.getLogger(_name).addFilter(_WithoutQueries())


class _Watched(HTTPConnection):
    """A connection that shows its socket to whoever watches this thread."""

    response_class = RawResponse
    _is_used = False
    _connecting: socket.socket | None = None

    def connect(self) -> None:
        try:
            super().connect()
        finally:
            if self._connecting is not None:
                self._connecting.close()
        self._is_used = False
        self._show()

    def request(self, *args: Any, **kwargs: Any) -> None:
        watch: StallWatch | None = getattr(_current, "watch", None)
        if watch is not None:
            watch.is_reused = self.sock is not None and self._is_used
        self._show()
        super().request(*args, **kwargs)
        self._is_used = True

    def _new_conn(self) -> socket.socket:
        """Like urllib3's own, but each socket can be shut while it connects, and while TLS shakes hands."""
        watch: StallWatch | None = getattr(_current, "watch", None)
        try:
            with watch.paused() if watch is not None else contextlib.nullcontext():
                sock = self._connected(watch)
        except socket.gaierror as error:
            raise NameResolutionError(self.host, self, error) from error
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"{self.host} did not answer in {self.timeout} s") from error
        except OSError as error:
            raise NewConnectionError(self, f"no connection to {self.host}: {error}") from error
        if watch is not None:
            # The socket itself is given over to TLS, which makes another one of it.
            self._connecting = sock.dup()
            watch.add_waker(functools.partial(_shut, self._connecting))
        return sock

    def _connected(self, watch: StallWatch | None) -> socket.socket:
        """Connect to the first of the host's addresses that answers."""
        host, port = self._dns_host.strip("[]"), self.port
        routes: Routes = getattr(_current, "routes", None) or Routes()

        def open_socket(address: Address) -> socket.socket:
            sock = socket.socket(address.family, address.kind, address.protocol)
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

        addresses = routes.order(host, port, look_up(host, port))
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

    def _show(self) -> None:
        watch: StallWatch | None = getattr(_current, "watch", None)
        if watch is not None and self.sock is not None:
            watch.is_connected = True
            watch.add_waker(functools.partial(_shut, self.sock))
            watch.restart()  # for the handshake that was, and the answer that is to come


class _WatchedTLS(_Watched, HTTPSConnection):
    def request(self, *args: Any, **kwargs: Any) -> None:
        super().request(*args, **kwargs)
        # An end without notice is not the end of a body (RFC 9112, 9.8), though ssl takes it for one by default, and
        # still does for what the caller does with a session that was given to us.
        is_ours = getattr(_current, "watch", None) is not None
        self.sock.suppress_ragged_eofs = not is_ours  # type: ignore[union-attr]


class _OpenFirst(queue.LifoQueue[Any]):
    """Gives a connection that is open before one that would have to be opened: a server may limit their number.

    One that the server closed lies above the others in urllib3's own queue: if it is refused, it lies there again.
    """

    def _put(self, item: HTTPConnection | None) -> None:
        self.queue.insert(0 if item is None or item.sock is None else len(self.queue), item)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Watched
    QueueCls = _OpenFirst


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _WatchedTLS
    QueueCls = _OpenFirst


class WrongOriginError(Exception):
    """A request was about to go to another origin than the one that was judged."""


def _check_origin(scheme: str | None, host: str | None, port: int | None) -> None:
    """Raise unless a request goes to the origin that it is for: all above have read its URL, each in its own way."""
    origin: Origin | None = getattr(_current, "origin", None)
    if origin is None:
        return
    found = (scheme or "", (host or "").strip("[]"), port or origin.port)
    if found != origin:
        raise WrongOriginError(f"to {found[0]}://{found[1]}:{found[2]}")


_POOLS = {"http": _Pool, "https": _TLSPool}


def watch_adapter(session: requests.Session, url: str, proxy: str | None) -> None:
    """Let a session of the caller's make connections for `url` that can be watched, if its adapter is requests' own.

    `proxy` is the address of the proxy that they go through, if they do.
    """
    with contextlib.suppress(ValueError):  # of an address that is none: the request itself will say so
        adapter = session.get_adapter(url)
        if type(adapter) is not HTTPAdapter or type(adapter.poolmanager) is not urllib3.PoolManager:
            return
        manager = adapter.poolmanager
        if proxy is not None:
            address = requests.utils.prepend_scheme_if_needed(proxy, "http")  # type: ignore[no-untyped-call]
            manager = adapter.proxy_manager_for(address)
        is_usual = type(manager) in (urllib3.PoolManager, urllib3.ProxyManager)  # not that of a SOCKS proxy
        if is_usual and manager.pool_classes_by_scheme.get("http") is not _Pool:
            manager.pool_classes_by_scheme = dict(_POOLS)
            manager.clear()  # of those that are kept; what is in use goes on


class WatchedAdapter(HTTPAdapter):
    """The adapter of our own sessions: its connections can be watched, and go to the origin that was judged.

    The adapters of a caller's session do not check that: it may ask others for a token within a request of ours.
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
        # Else the pools' finalizers would do it, in which Ctrl-C is lost. A pool that is in use stays one.
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
