"""The HTTP response that urllib3 reads from a socket: interim responses, and bodies that are read in a tight loop.

Each read of a socket gives what has arrived, with TLS a record of at most 16 KiB. After each read, a thread needs the
interpreter's lock, for which all workers compete. So there is as little Python as possible between two reads: they go
from the socket itself into a buffer that the thread uses again and again, and few threads read TLS records at once.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import itertools
import os
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

from urllib3.util.ssltransport import SSLTransport

__all__ = ["RawResponse"]

#: Read into a buffer, which may stay partly empty, and return how many bytes came.
_Read: TypeAlias = Callable[[memoryview], int]

#: Bytes of the largest TLS record (RFC 8446, 5.1).
_RECORD_BYTES = 1 << 14
#: The least bytes that are asked for in a tight loop. One read of so many from the buffered file, which has read the
#: headers, empties its buffer.
_LOOP_BYTES = max(_RECORD_BYTES, io.DEFAULT_BUFFER_SIZE)
#: The private name of the object behind an `ssl.SSLSocket`.
_TLS_OBJECT = "_sslobj"
#: The most interim responses to one request that are skipped.
_MAX_INTERIM = 1000
#: Raised by a socket without a timeout for which nothing has arrived.
_NOTHING_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

#: How many threads read TLS records in their loops at once. With more, they compete for the interpreter's lock: on 16
#: cores, 16 threads that also compute md5 receive 1.8 GB/s without a limit, 2.4 with 3 at once, 1.9 with 4, 1.5 with 1.
_TLS_LOOPS = 3
_numbers = itertools.count()


class _ThisThread(threading.local):
    """Keep a buffer and a number for the next response of this thread."""

    def __init__(self) -> None:
        self.buffer = memoryview(b"")
        self.number = next(_numbers)


_this_thread = _ThisThread()
_turns = [threading.Lock() for _ in range(_TLS_LOOPS)]


def _renew_turns() -> None:
    """Forget the locks that threads of the parent process held at the moment of a fork."""
    _turns[:] = [threading.Lock() for _ in range(_TLS_LOOPS)]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_turns)


class RawResponse(http.client.HTTPResponse):
    """The final response, after interim ones (1xx), whose body is read many pieces at a time.

    Parameters
    ----------
    sock : socket.socket or SSLTransport
    lends_buffer : bool
        Whether `read1` may return memory that it uses again in its next call in the same thread. Default False, as in
        `http.client`.
    """

    def __init__(self, sock: socket.socket, *args: Any, lends_buffer: bool = False, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._socket = sock if lends_buffer and isinstance(sock, (socket.socket, SSLTransport)) else None
        self._has_read_ahead = True  # the buffered file may have some of the body, which came with the headers
        self._failure: Exception | None = None

    def _read_status(self) -> tuple[str, int, str]:
        # A server may send any number of 1xx responses (RFC 9110, 15.2), but http.client skips only 100. 101 is not
        # skipped: it switches to another protocol, which nobody asked for.
        for _ in range(_MAX_INTERIM):
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 <= status < 200 or status == 101:
                return version, status, reason
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException("too many interim responses")

    def read1(self, n: int = -1) -> bytes | memoryview:  # type: ignore[override]
        """Return up to `n` bytes that have arrived, and wait only if there are none.

        If reading fails after some bytes, return them, and raise the failure in the next call.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._socket is None or n < _LOOP_BYTES or self.fp is None or self.length == 0:
            return super().read1(n)
        buffer = _buffer(n)
        if self.chunked or self._has_read_ahead:
            first = super().read1(_LOOP_BYTES)
            received = len(first)
            buffer[:received] = first
            self._has_read_ahead = False
        else:
            received = _reader(self._socket)(buffer[: n if self.length is None else min(n, self.length)])
            self._count(received)
        if 0 < received < n and self.length != 0:
            received = self._read_on(self._socket, buffer[:n], received)
        return buffer[:received]

    def isclosed(self) -> bool:
        # A connection that has failed must not be used again.
        return super().isclosed() and self._failure is None

    def _read_on(self, sock: socket.socket | SSLTransport, buffer: memoryview, received: int) -> int:
        """Read on into `buffer`, which has `received` bytes, as long as there is more; return how many it has then."""
        limit, timeout = len(buffer), sock.gettimeout()
        read = self.fp.readinto1 if self.chunked else _reader(sock)
        with _turn(sock):
            sock.settimeout(0)
            try:
                while received < limit and (size := self._bytes_in_a_row(limit - received)):
                    count = self._fill(buffer[received : received + size], read)
                    received += count
                    if count < size:
                        break
            except _NOTHING_YET:
                pass
            except (OSError, http.client.HTTPException) as error:
                self._failure = error
            finally:
                sock.settimeout(timeout)
        return received

    def _fill(self, free: memoryview, read: _Read) -> int:
        """Read bytes of the body until `free` is full or no more have arrived."""
        received, size = 0, len(free)
        try:
            while received < size and (count := read(free[received:])):
                received += count
        except _NOTHING_YET:
            pass
        except OSError as error:
            self._failure = error
        self._count(received)
        return received

    def _count(self, received: int) -> None:
        if self.chunked:
            self.chunk_left = (self.chunk_left or 0) - received
        elif self.length is not None:
            self.length -= received

    def _bytes_in_a_row(self, limit: int) -> int:
        """Return how many bytes of the body follow without a chunk line between them, up to `limit`.

        Return 0 if the next chunk line has not arrived completely: reading a part of it without waiting would lose it.
        """
        if self.fp is None:
            return 0
        if not self.chunked:
            return limit if self.length is None else min(limit, self.length)
        if self.chunk_left == 0:  # the end of the chunk has not been read yet
            if self.fp.peek()[:2] != b"\r\n":
                return 0
            self.fp.read(2)
            self.chunk_left = None
        if self.chunk_left is None:
            line = self.fp.peek()
            if b"\n" not in line or line.startswith(b"0"):  # the last chunk is followed by more lines
                return 0
        left: int = self._get_chunk_left()  # type: ignore[attr-defined]
        return min(limit, left)


def _reader(sock: socket.socket | SSLTransport) -> _Read:
    """Return a function that reads from a socket.

    For TLS, that is the object behind an `ssl.SSLSocket`, if it has one: 16 threads read 1.2 times as much through it
    as through `SSLSocket.recv_into`, which adds two Python frames to each record.
    """
    read: Callable[[int, memoryview], int] | None = getattr(getattr(sock, _TLS_OBJECT, None), "read", None)
    return sock.recv_into if read is None else functools.partial(read, _RECORD_BYTES)  # type: ignore[return-value]


def _turn(sock: socket.socket | SSLTransport) -> contextlib.AbstractContextManager[object]:
    """Return what to hold during a loop that does not wait for the server."""
    return _turns[_this_thread.number % _TLS_LOOPS] if type(sock) is not socket.socket else contextlib.nullcontext()


def _buffer(nbytes: int) -> memoryview:
    """Return the buffer of this thread, of at least `nbytes`."""
    if len(_this_thread.buffer) < nbytes:
        _this_thread.buffer = memoryview(bytearray(nbytes))
    return _this_thread.buffer
