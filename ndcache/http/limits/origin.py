"""The queue in which the requests of one process to one origin wait until its limits allow them."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic

from ...workers.cancellation import Cancellation
from .shared import SharedState
from .state import LimitState, Start

__all__ = ["STATUSES", "OriginLimit", "Permit"]

#: The statuses of servers that get too many requests; nginx's own limits answer 503.
STATUSES = (429, 503)

#: Seconds that a thread waits for its turn before it checks whether it was cancelled.
_TICK = 0.1
#: Seconds until it looks whether requests of other processes have ended: at least, and for each process, so that many
#: of them together do not look too often.
_LOOK, _LOOK_OF_EACH = 0.02, 0.005
#: Seconds between two notes that the origin sends something.
_NOTE = 0.25


@dataclass(eq=False)
class Permit:
    """Permission for one request. It must be released, however the request ends.

    Attributes
    ----------
    limit : OriginLimit
    start : Start
    """

    limit: OriginLimit
    start: Start

    def answered(self, status: int, retry_after: float | None = None) -> None:
        """Tell the limit the status of the response, and the seconds that it asks to wait."""
        if status in STATUSES:
            self.limit.refused(self.start, retry_after)
        elif status < 500:
            self.limit.accepted(self.start)

    def release(self) -> None:
        """Tell the limit that the request is over, with its body."""
        self.limit.release(self.start)


class OriginLimit:
    """The requests of this process to one origin, which wait until the origin's limits allow them.

    Parameters
    ----------
    state : LimitState
    shared : SharedState, optional
        Shares the state with other processes.

    Attributes
    ----------
    state : LimitState
        As it was when it was last used.
    """

    def __init__(self, state: LimitState, shared: SharedState | None = None) -> None:
        self.state = state
        self._shared = shared
        self._name = "" if shared is None else shared.name
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._queue: deque[object] = deque()
        self._noted = float("-inf")

    def acquire(self, cancellation: Cancellation, waiting: Callable[[], None] = lambda: None) -> Permit:
        """Wait until a request may be made, and return the permission for it.

        Parameters
        ----------
        cancellation : Cancellation
        waiting : callable, optional
            Called several times a second while it waits. It must be quick.

        Raises
        ------
        CancelledError
            `cancellation` was set.
        """
        with self._lock:
            since, mine = monotonic(), object()
            if self._is_free(since):
                return Permit(self, self.state.start(since, self._name))
            self._queue.append(mine)
            try:
                while True:
                    cancellation.check()
                    waiting()
                    tick = _TICK
                    if self._queue[0] is mine:
                        permit, tick = self._try(since)
                        if permit is not None:
                            return permit
                    self._changed.wait(tick)
            finally:
                self._queue.remove(mine)
                self._changed.notify_all()

    def accepted(self, start: Start) -> None:
        """Learn from a request that was not refused."""
        with self._lock:
            if self._is_free(now := monotonic()):
                self.state.accepted(start, now)
                return
            with self._updated() as now:
                self.state.accepted(start, now)
            self._changed.notify_all()

    def refused(self, start: Start, retry_after: float | None = None) -> None:
        """Learn from a request that was refused with 429 or 503."""
        with self._lock, self._updated(is_refused=True) as now:
            self.state.refused(start, now, retry_after)
            self._changed.notify_all()

    def release(self, start: Start) -> None:
        """Count a request as over."""
        with self._lock:
            if self._is_free(monotonic()):
                self.state.release(start)
                return
            with self._updated():
                self.state.release(start)
                if not self._queue and not self.state.member(self._name).in_flight:
                    del self.state.members[self._name]
            self._changed.notify_all()

    def sends(self, now: float) -> None:
        """Note that the origin sends something: others learn that it serves somebody, and that this process lives."""
        if self.state.is_limited and now - self._noted >= _NOTE:
            self._noted = now
            with self._lock, self._updated() as now:
                self.state.served = now

    def _is_free(self, now: float) -> bool:
        """Return whether no server has refused a request yet, as far as this process knows without a load."""
        return not (self._queue or self.state.is_limited or (self._shared is not None and self._shared.is_due(now)))

    def _try(self, since: float) -> tuple[Permit | None, float]:
        """Begin a request that waits since some time, if the limits allow it; else say after how long to try again."""
        with self._updated() as now:
            delay = self.state.delay(now)
            must_yield = self.state.must_yield(self._name, since, now)
            if delay <= 0 and not must_yield:
                return Permit(self, self.state.start(now, self._name)), 0.0
            self.state.member(self._name, now).waiting_since = since
        members = len(self.state.members)
        if members > 1 and (must_yield or self.state.in_flight >= self.state.max_in_flight):
            return None, min(max(_LOOK, members * _LOOK_OF_EACH), _TICK)
        return None, min(delay, _TICK)

    @contextlib.contextmanager
    def _updated(self, *, is_refused: bool = False) -> Iterator[float]:
        """Let the block use the state as all processes know it, and change it for all; yield the time."""
        state = self.state
        if self._shared is not None:
            with self._shared.update(state, creates=state.is_limited or is_refused) as now:
                yield now
        else:
            state.forget_if_old(now := monotonic())
            yield now
            state.used = now
