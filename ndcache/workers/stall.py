"""Detection of stalled requests, whose server sends nothing or almost nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["StallWatch"]

#: Bytes per second below which a request counts as stalled.
_MIN_RATE = 1024
#: How often the number of received bytes is sampled in each timeout.
_SAMPLES = 20


@dataclass(eq=False)
class StallWatch:
    """Watch one request for stalls. Another thread polls it, and ends the request if it has stalled.

    Attributes
    ----------
    timeout : float
        Seconds over which the server must send at least 1 KiB per second on average.
    wakers : list of callables
        Called to end the wait for the server; see `add_waker`.
    is_waiting : bool
        Whether the request's thread is waiting now. Time spent on writing and hashing is not the server's fault.
    is_stalled : bool
        Whether the wait was ended because too few bytes came.
    is_reused : bool
        Whether the request went out on a connection that had been used before.
    is_connected : bool
        Whether the connection is ready, TLS included.
    before_wait : callable
        The request's own thread calls this before it waits for the server.
    is_woken : bool
        Whether the wait was ended, for whatever reason.
    """

    timeout: float
    wakers: list[Callable[[], None]] = field(default_factory=list)
    is_waiting: bool = True
    is_stalled: bool = False
    is_reused: bool = False
    is_connected: bool = False
    before_wait: Callable[[], None] = lambda: None
    is_woken: bool = field(default=False, init=False)
    _nbytes: int = 0
    _samples: deque[tuple[float, int]] = field(default_factory=deque)  # time, and bytes received until then

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Restart the stall timer."""
        self._samples = deque([(time.monotonic(), self._nbytes)])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the stall timer during the block, which has a timeout of its own."""
        self.is_waiting = False
        try:
            yield
        finally:
            self.restart()
            self.is_waiting = True

    def received(self, nbytes: int) -> None:
        """Count bytes that came."""
        self._nbytes += nbytes

    def add_waker(self, waker: Callable[[], None]) -> None:
        """Add a way to end the wait; use it at once if the wait has been ended already."""
        self.wakers.append(waker)
        if self.is_woken:  # Checked after the waker is in the list; `wake` does these in reverse order.
            waker()

    def wake(self) -> None:
        """End the wait."""
        self.is_woken = True
        for waker in list(self.wakers):
            waker()

    def poll(self) -> None:
        """End the wait if the request has stalled."""
        if not self.is_waiting:
            self.restart()
            return
        now = time.monotonic()
        while len(self._samples) > 1 and self._samples[1][0] <= now - self.timeout:
            self._samples.popleft()
        since, before = self._samples[0]
        if since <= now - self.timeout and self._nbytes - before < _MIN_RATE * self.timeout:
            self.is_stalled = True
            self.wake()
            self.restart()
        elif now - self._samples[-1][0] >= self.timeout / _SAMPLES:
            self._samples.append((now, self._nbytes))
