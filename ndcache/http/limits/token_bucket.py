"""The limit of the bytes per second that one load receives, over all its workers and processes."""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from ...workers.cancellation import Cancellation

if sys.platform != "win32":
    import fcntl

__all__ = ["TokenBucket"]

#: Seconds of the rate that the bucket holds. So much is made up for after a moment in which nobody received anything.
_BURST = 0.25
#: Parts of a second at the full rate that one read may take, and the least and the most bytes of it.
_READS_PER_SECOND, _MIN_READ, _MAX_READ = 64, 1 << 10, 2 << 20
_TIME = struct.Struct("d")


class TokenBucket:
    """Let workers receive bytes at a rate.

    The state is one number: the time until which all bytes received so far have been paid for. A worker that has
    received bytes moves it on, and sleeps until then. The bucket is empty at the beginning.

    While processes share the bucket, the number lies in a file without a name, whose descriptor they inherit. Its lock
    is a record lock, which belongs to a process, and ends with it.

    Parameters
    ----------
    rate : float
        Bytes per second.
    handle : int, optional
        The descriptor of another process's bucket, see `share`. It is closed by `close`.
    clock : callable, optional
        Returns seconds. Processes that share a bucket have the same clock.

    Attributes
    ----------
    read_bytes : int
        The most bytes to receive before they are taken from the bucket.
    """

    def __init__(self, rate: float, handle: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.read_bytes = int(min(max(rate / _READS_PER_SECOND, _MIN_READ), _MAX_READ))
        self._rate = rate
        self._handle = handle
        self._clock = clock
        self._paid_until = clock()
        # Only workers acquire it, so that Ctrl-C never leaves it locked.
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> float:
        """Take bytes that have been received; return the seconds to wait before the next ones."""
        with self._lock, self._state_of_all():
            now = self._clock()
            self._paid_until = max(self._paid_until, now - _BURST) + nbytes / self._rate
            return max(0.0, self._paid_until - now)

    def throttle(self, nbytes: int, cancellation: Cancellation) -> float:
        """Take bytes that have been received, and sleep until more may come; return the seconds slept.

        Raises
        ------
        CancelledError
            `cancellation` was set.
        """
        seconds = self.take(nbytes)
        if seconds:
            cancellation.sleep(seconds)
        return seconds

    def share(self) -> int:
        """Return the descriptor by which another process uses the same bucket; it has to inherit it.

        Raises
        ------
        OSError
            There is no room for the file, or no descriptor is left.
        """
        with self._lock:
            if self._handle is None:
                with tempfile.TemporaryFile(buffering=0) as file:
                    file.write(_TIME.pack(self._paid_until))
                    self._handle = os.dup(file.fileno())
            return self._handle

    def close(self) -> None:
        """Close the descriptor, if there is one."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    @contextlib.contextmanager
    def _state_of_all(self) -> Iterator[None]:
        """Let the block change the state that all processes share."""
        handle = self._handle
        if handle is None or sys.platform == "win32":
            yield
            return
        fcntl.lockf(handle, fcntl.LOCK_EX)
        try:
            self._paid_until = _TIME.unpack(os.pread(handle, _TIME.size, 0))[0]
            yield
            os.pwrite(handle, _TIME.pack(self._paid_until), 0)
        finally:
            fcntl.lockf(handle, fcntl.LOCK_UN)
