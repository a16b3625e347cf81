"""urllib3 connections that show their sockets, so that a thread which waits for one can be woken."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, LocationParseError, NameResolutionError, NewConnectionError
from urllib3.util import parse_url
from urllib3.util.connection import allowed_gai_family

from .shown import printable
from .stop import Watch
from .urls import Origin

__all__ = ["WatchedAdapter", "WrongOriginError", "waker", "watch_adapters", "watching"]

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
def watching(watch: Watch, origin: Origin) -> Iterator[None]:
    """Have `watch` know how to wake this thread while it makes a request in the block, and afterwards.

    The request goes to `origin` or nowhere.
    """
    _current.watch, _current.origin = watch, origin
    try:
        yield
    finally:
        _current.watch = _current.origin = None


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
        watch: Watch | None = getattr(_current, "watch", None)
        if watch is not None:
            watch.reused = self.sock is not None and self._is_used
        self._show()
        super().request(*args, **kwargs)
        self._is_used = True

    def _new_conn(self) -> socket.socket:
        """Like urllib3's own, but each socket can be shut while it connects, and while TLS shakes hands."""
        watch: Watch | None = getattr(_current, "watch", None)
        try:
            with watch.pausing() if watch is not None else contextlib.nullcontext():
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

    def _connected(self, watch: Watch | None) -> socket.socket:
        """A socket connected to the first of the host's addresses that answers."""
        host, failure = self._dns_host.strip("[]"), OSError("the host has no address")
        try:
            host.encode("idna")
        except UnicodeError:
            raise LocationParseError(f"{host!r}, label empty or too long") from None
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, self.port, allowed_gai_family(), socket.SOCK_STREAM
        ):
            if watch is not None and watch.is_woken:
                break
            sock = None
            try:
                sock = socket.socket(family, kind, protocol)
                if watch is not None:
                    watch.add_waker(functools.partial(_shut, sock))
                for option in self.socket_options or ():
                    sock.setsockopt(*option)
                sock.settimeout(self.timeout)
                if self.source_address:
                    sock.bind(self.source_address)
                sock.connect(address)
                return sock
            except BaseException as error:
                if sock is not None:
                    sock.close()
                if not isinstance(error, OSError):
                    raise
                failure = error
        try:
            raise failure
        finally:
            del failure  # which holds this frame

    def _show(self) -> None:
        watch: Watch | None = getattr(_current, "watch", None)
        if watch is not None and self.sock is not None:
            watch.add_waker(functools.partial(_shut, self.sock))
            watch.restart()  # for the handshake that was, and the answer that is to come


class _WatchedTLS(_Watched, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Watched


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _WatchedTLS


class WrongOriginError(Exception):
    """A request was about to go to another origin than the one that was judged."""


def _check_origin(pool: HTTPConnectionPool, url: str) -> None:
    """Raise unless a request goes to the origin that it is for: all above have read its URL, each in its own way.

    Sessions of the caller's have pools without this, as they may ask others for a token, within a request of ours.
    """
    origin: Origin | None = getattr(_current, "origin", None)
    if origin is None:
        return
    is_at_proxy = pool.proxy is not None and url[:5].lower() == "http:"  # which is told the whole URL
    target = parse_url(url) if is_at_proxy else pool
    found = (target.scheme or "", (target.host or "").strip("[]"), target.port or origin.port)
    if found != origin:
        raise WrongOriginError(f"to {found[0]}://{found[1]}:{found[2]}")


class _OwnPool(_Pool):
    def urlopen(self, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
        _check_origin(self, url)
        return super().urlopen(method, url, *args, **kwargs)


class _OwnTLSPool(_TLSPool):
    def urlopen(self, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
        _check_origin(self, url)
        return super().urlopen(method, url, *args, **kwargs)


_OWN_POOLS = {"http": _OwnPool, "https": _OwnTLSPool}


def watch_adapters(session: requests.Session) -> None:
    """Have a session of the caller's make connections that can be watched, if its adapters are those of requests."""
    for adapter in session.adapters.values():
        if type(adapter) is not HTTPAdapter or type(adapter.poolmanager) is not urllib3.PoolManager:
            continue
        if adapter.poolmanager.pool_classes_by_scheme.get("http") is not _Pool:
            adapter.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
            adapter.poolmanager.clear()  # of those that are kept; what is in use goes on


class WatchedAdapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _OWN_POOLS

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> urllib3.ProxyManager:
        manager: urllib3.ProxyManager = super().proxy_manager_for(*args, **kwargs)
        if type(manager) is urllib3.ProxyManager:  # a SOCKS manager has connections of its own
            manager.pool_classes_by_scheme = _OWN_POOLS
        return manager
