"""Turns of the workers at short steps in Python, so that they do not fight for the interpreter's lock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from time import perf_counter, process_time

__all__ = ["Turns"]

#: Seconds after which a worker no longer waits for its turn.
_PATIENCE = 0.05
#: Seconds between two looks at how busy the process is.
_PERIOD = 0.05
#: Parts of one core. A process that uses less while workers wait for their turn waits for the disk, so there are more
#: turns from then on. A process that uses more has no use for more than one.
_IDLE, _BUSY = 0.5, 0.8
#: A pause of fewer seconds is too short to let others have the turn.
_SHORT = 0.0005


class Turns:
    """Let one worker at a time do short work in Python, and several while that work waits for the disk.

    Before and after its request, a small shard takes some eighty system calls, most of a microsecond. Each of them lets
    go of the interpreter's lock, and while other workers want it, getting it back takes two switches between threads:
    eight workers took 1.5 times as long as one. So a worker takes a turn for such work, and releases it before it waits
    for the server, or for the disk to sync.

    On a slow disk or a network file system, all these calls wait. If the process has little to do while workers wait
    for a turn, there are more turns at once. Nothing depends on turns: a worker that has waited too long does without.

    Used as a context manager, it is a turn that ends with the block, if it has not ended before.

    Parameters
    ----------
    most : int
        How many turns there may be at once.

    Attributes
    ----------
    wanted : int
        How many turns there are at once, as soon as those that are too many have ended.
    """

    # Turns are tokens in a queue, as slots are; see `Slots`.

    def __init__(self, most: int) -> None:
        self.wanted = 1
        self._most = most
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._tokens.put(None)
        self._count = 1  # tokens in the queue and in use
        self._lock = threading.Lock()
        self._this_thread = threading.local()
        self._looked_at = perf_counter(), process_time()
        self._has_waited = False  # whether a worker had to wait for its turn since then
        self._is_pause_short = True  # the last one in `paused`

    def take(self) -> None:
        """Wait for a turn, which this thread then has; do nothing if it has one."""
        if getattr(self._this_thread, "has_token", None) is None:
            self._has_waited = self._has_waited or self._tokens.empty()
            try:
                self._tokens.get(timeout=_PATIENCE)
                self._this_thread.has_token = True
            except Empty:
                self._this_thread.has_token = False

    def release(self) -> None:
        """End the turn of this thread, if it has one."""
        has_token: bool | None = getattr(self._this_thread, "has_token", None)
        if has_token is None:
            return
        self._this_thread.has_token = None
        with self._lock:
            self._look(perf_counter(), process_time())
            tokens = max(0, has_token + self.wanted - self._count)
            self._count += tokens - has_token
        for _ in range(tokens):
            self._tokens.put(None)

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.release()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let others have the turn during the block, which waits for the disk, unless that is quick; then take one."""
        if not self._is_pause_short:
            self.release()
        began = perf_counter()
        yield
        self._is_pause_short = perf_counter() - began < _SHORT
        self.take()

    def _look(self, now: float, cpu: float) -> None:
        """Change how many turns there are, if it is time."""
        before, cpu_before = self._looked_at
        if now - before < _PERIOD:
            return
        load = (cpu - cpu_before) / (now - before)
        if load > _BUSY:
            self.wanted = max(1, self.wanted // 2)
        elif load < _IDLE and self._has_waited:
            self.wanted = min(2 * self.wanted, self._most)
        self._looked_at, self._has_waited = (now, cpu), False
