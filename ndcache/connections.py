"""urllib3 connections that show their sockets, so that a thread which waits for one can be woken."""

from __future__ import annotations

import functools
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

from .stop import Watch

__all__ = ["WatchedAdapter", "waker", "watching"]

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
def watching(watch: Watch) -> Iterator[None]:
    """Have `watch` know how to wake this thread while it makes a request in the block, and afterwards."""
    _current.watch = watch
    try:
        yield
    finally:
        _current.watch = None


class _Watched(HTTPConnection):
    """A connection that shows its socket to whoever watches this thread."""

    _is_used = False

    def connect(self) -> None:
        super().connect()
        self._is_used = False
        self._show()

    def request(self, *args: Any, **kwargs: Any) -> None:
        watch: Watch | None = getattr(_current, "watch", None)
        if watch is not None:
            watch.reused = self.sock is not None and self._is_used
        self._show()
        super().request(*args, **kwargs)
        self._is_used = True

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


class WatchedAdapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> urllib3.ProxyManager:
        manager: urllib3.ProxyManager = super().proxy_manager_for(*args, **kwargs)
        if type(manager) is urllib3.ProxyManager:  # a SOCKS manager has connections of its own
            manager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
        return manager
