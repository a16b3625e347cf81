"""The HTTP response that urllib3 reads from a socket: interim responses, and fast bodies over TLS."""

from __future__ import annotations

import http.client
import socket
import ssl
from typing import Any

__all__ = ["RawResponse"]

#: Bytes of the largest TLS record (RFC 8446, 5.1).
_RECORD_BYTES = 1 << 14
#: The most interim responses to one request that are skipped.
_MAX_INTERIM = 1000


class RawResponse(http.client.HTTPResponse):
    """The final response, after interim ones (1xx). Over TLS, its body is read many records at a time."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._tls_socket = sock if isinstance(sock, ssl.SSLSocket) else None
        self._buffer = memoryview(b"")
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

    def read1(self, n: int = -1) -> bytes:
        """Return up to `n` bytes that have arrived, and wait only if there are none.

        Over TLS, a single read gives a single record of at most 16 KiB, so read on while there is more. If that fails,
        return the bytes before the failure, and raise it in the next call.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._tls_socket is None or n <= _RECORD_BYTES:
            return super().read1(n)
        first = super().read1(_RECORD_BYTES)
        return self._read_on(self._tls_socket, first, n) if first and self.length != 0 else first

    def isclosed(self) -> bool:
        # A connection that has failed must not be used again.
        return super().isclosed() and self._failure is None

    def _read_on(self, sock: ssl.SSLSocket, first: bytes, limit: int) -> bytes:
        """Return `first` and the bytes that have arrived already, at most `limit` in all."""
        if len(self._buffer) < limit:
            self._buffer = memoryview(bytearray(limit))
        self._buffer[: len(first)] = first
        received, timeout = len(first), sock.gettimeout()
        sock.settimeout(0)
        try:
            while received < limit and (size := self._bytes_in_a_row(limit - received)):
                count = self._fill(self._buffer[received : received + size])
                received += count
                if count < size:
                    break
        except ssl.SSLWantReadError:
            pass
        except (OSError, http.client.HTTPException) as error:
            self._failure = error
        finally:
            sock.settimeout(timeout)
        return bytes(self._buffer[:received])

    def _fill(self, free: memoryview) -> int:
        """Read bytes of the body until `free` is full or no more have arrived."""
        received, size, read_into = 0, len(free), self.fp.readinto1
        try:
            while received < size and (count := read_into(free[received:])):
                received += count
        except ssl.SSLWantReadError:
            pass
        except OSError as error:
            self._failure = error
        if self.chunked:
            self.chunk_left = (self.chunk_left or 0) - received
        elif self.length is not None:
            self.length -= received
        return received

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
