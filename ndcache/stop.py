"""How all threads of one load are stopped at once, those that wait for a server included."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import CancelledError

__all__ = ["Stop"]


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
