"""Digests of a file that several threads write in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from ...format.integrity import Hasher, new_hasher
from .ranges import ByteRanges

__all__ = ["BUFFER_BYTES", "InOrderHasher"]

#: The most bytes to read back at once.
BUFFER_BYTES = 1 << 20


class InOrderHasher:
    """Hash the bytes of a file in their order, whatever order they are written in.

    Bytes that are next in order are hashed as they are written, from memory. All others are read back from the file
    once the gap before them is closed.

    Parameters
    ----------
    ranges : ByteRanges
        The bytes that have been written; the writer adds to it.
    read : callable
        Take a number of bytes and an offset; return one byte of the file or more, up to that number.
    """

    def __init__(self, ranges: ByteRanges, read: Callable[[int, int], bytes]) -> None:
        self._ranges = ranges
        self._read = read
        self._hashers: dict[str, Hasher] = {}
        self._hashed = 0  # all hashers have been fed the bytes before this offset
        self._lock = threading.Lock()

    def add(self, algorithm: str, check: Callable[[], None]) -> None:
        """Compute one more digest; read back the bytes that have been hashed already.

        Parameters
        ----------
        algorithm : str
        check : callable
            Called now and then; may raise to stop.
        """
        if algorithm in self._hashers:
            return
        with self._lock:
            hasher = new_hasher(algorithm)
            for start in range(0, self._hashed, BUFFER_BYTES):
                check()
                self._read_into([hasher], start, min(self._hashed, start + BUFFER_BYTES))
            self._hashers[algorithm] = hasher

    def feed(self, data: bytes | memoryview, start: int) -> None:
        """Hash `data`, just written at `start`, if it is next in order and no other thread is hashing."""
        if self._lock.acquire(blocking=False):
            try:
                if self._hashed == start:
                    for hasher in self._hashers.values():
                        hasher.update(data)
                    self._hashed += len(data)
            finally:
                self._lock.release()

    def catch_up(self, check: Callable[[], None], *, wait: bool = False) -> None:
        """Read back and hash what was written out of order, up to the first gap.

        Parameters
        ----------
        check : callable
            Called now and then; may raise to stop.
        wait : bool
            Whether to wait while another thread is hashing, so that all is hashed in the end. Default False.
        """
        if self._lock.acquire(blocking=wait):
            try:
                while self._hashed < (end := self._ranges.prefix):
                    check()
                    end = min(end, self._hashed + BUFFER_BYTES)
                    self._read_into(self._hashers.values(), self._hashed, end)
                    self._hashed = end
            finally:
                self._lock.release()

    def hexdigest(self, algorithm: str) -> str:
        """Return the digest of what has been hashed, by an algorithm that was added."""
        return str(self._hashers[algorithm].hexdigest())

    @property
    def hexdigests(self) -> dict[str, str]:
        """Return all digests of what has been hashed, by algorithm."""
        return {algorithm: self.hexdigest(algorithm) for algorithm in self._hashers}

    def _read_into(self, hashers: Iterable[Hasher], start: int, end: int) -> None:
        hashers = list(hashers)
        while hashers and start < end:
            data = self._read(end - start, start)
            for hasher in hashers:
                hasher.update(data)
            start += len(data)
