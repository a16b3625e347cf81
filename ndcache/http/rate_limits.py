"""Keep to the limits of servers that answer 429 or 503: fewer requests at once, and more time between them.

- Every request to an origin passes its `OriginLimit`, which all workers share: it waits its turn in a line, first come,
  first served. While a server has never refused anything, nobody waits.
- A refusal says that one of two things was too much, the number of requests under way or their pace: what was accepted
  before at the same setting is not to blame. What is to blame is cut: to what is under way, to half the pace.
- Then one request at a time tries a little more than is known to be accepted. If it is accepted, the next goes further;
  if not, the next trial waits twice as long. So a short disturbance is soon forgotten, and a limit is met closely.
- After a refusal all wait, for as long as Retry-After says if it says so; afterwards requests keep their distance.
- Whether a refused request is tried again is for `with_retries` to decide.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
from collections import deque
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal

from ..errors import NdcacheError, RateLimitedError, TransferError
from ..workers.cancellation import Cancellation

__all__ = ["Limits", "OriginLimit", "Permit", "Served", "is_refusal", "origin_of"]

logger = logging.getLogger("ndcache")

#: The statuses by which servers say that there are too many requests: nginx's own limits answer 503.
_STATUSES = (429, 503)

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^/?#]*@)?([^/?#]*)", re.IGNORECASE).match
#: The part of the interval that a trial of a faster pace keeps: the first one, and those after one and more successes.
_FASTER = (0.85, 0.8, 0.6, 0.5)
#: Longest wait for a turn before the thread looks whether it is to stop, in seconds.
_TICK = 0.1

Trial = Literal["more", "faster"]


def origin_of(url: str) -> str:
    """Return the scheme, host and port of a URL, to tell servers apart; nothing that is secret depends on it."""
    match = _ORIGIN(url)
    return (match[1] + match[2]).lower() if match else url


def is_refusal(error: NdcacheError) -> bool:
    """Whether an error says that a server gets too many requests."""
    return isinstance(error, TransferError) and error.status in _STATUSES


class Served:
    """Know what one load has got of each origin, and which origins limit it; `limits` are those that it keeps to."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._last: dict[str, float] = {}
        self._limiting: dict[str, object] = {}

    def gave(self, origin: str) -> None:
        """Note that something came from an origin just now."""
        self._last[origin] = monotonic()

    def has_given(self, error: NdcacheError, since: float) -> bool:
        """Whether the origin that an error is about has given something since then, to whichever worker."""
        return self._last.get(origin_of(error.url or ""), -math.inf) > since

    def refusals(self, error: NdcacheError) -> int:
        """Return how often in a row the origin of an error has refused requests, whichever worker's."""
        return self._limits.of(error.url or "").refusals

    def note_limit(self, error: NdcacheError) -> None:
        """Log that the origin of an error limits requests, once for each."""
        origin, me = origin_of(error.url or ""), object()
        if self._limiting.setdefault(origin, me) is not me:
            return
        asked = error.retry_after if isinstance(error, RateLimitedError) else None
        wait = f", wait {asked:,.0f} s" if asked else ""
        message = "%s limits requests (status %s%s): from now on it gets fewer at once, and with pauses"
        logger.warning(message, origin, error.status, wait)


class Limits:
    """The limits of each origin, for all loads that share them. Safe to use from several threads, and after a fork.

    Parameters
    ----------
    unit, longest_pause : float
        See `OriginLimit`.
    """

    def __init__(self, unit: float = 0.125, longest_pause: float = 300.0) -> None:
        self._unit, self._longest_pause = unit, longest_pause
        self._origins: dict[tuple[int, str], OriginLimit] = {}

    def of(self, url: str) -> OriginLimit:
        """Return the limit of the origin that a request for `url` goes to."""
        # By process: another thread could hold a limit's lock at the moment of a fork, and so for ever in the child.
        key = os.getpid(), origin_of(url)
        found = self._origins.get(key)
        return found or self._origins.setdefault(key, OriginLimit(self._unit, self._longest_pause))


@dataclass(eq=False)
class Permit:
    """One request that may be made. It ends with `done`, whatever became of the request.

    Attributes
    ----------
    limit : OriginLimit
    started : float
        When, by ``time.monotonic()``.
    others : int
        Requests to the origin that were under way then.
    before : float
        When the one before it started that was not refused.
    trial : str or None
        What the request has beyond what is known to be accepted.
    """

    limit: OriginLimit
    started: float
    others: int
    before: float
    trial: Trial | None = None

    @property
    def gap(self) -> float:
        return self.started - self.before

    def answered(self, status: int, retry_after: float | None = None) -> None:
        """Tell the status of the answer, and how long it asks to wait."""
        if status in _STATUSES:
            self.limit.refused(self, monotonic(), retry_after)
        elif status < 500:
            self.limit.accepted(self, monotonic())

    def done(self) -> None:
        """Tell that the request is over, with its body."""
        self.limit.done(self)


@dataclass(eq=False)
class OriginLimit:
    """Know what one origin accepts, as far as that can be told.

    Times are seconds of ``time.monotonic()``. The methods that take `now` neither wait nor read the clock.

    Parameters
    ----------
    unit : float
        Seconds between requests after the first refusal; other times are multiples of it.
    longest_pause : float
        Of a server that asks for a longer pause, the load ends, so that nobody has to keep it.

    Attributes
    ----------
    most : float
        Requests that may be under way at once.
    interval : float
        Seconds from the start of one to that of the next.
    under_way : int
        Requests that have begun and are not done.
    refusals : int
        Those in a row; what was refused at one time counts as one.
    """

    unit: float = 0.125
    longest_pause: float = 300.0
    most: float = field(default=math.inf, init=False)
    interval: float = field(default=0.0, init=False)
    under_way: int = field(default=0, init=False)
    refusals: int = field(default=0, init=False)
    #: Whether as many, and so fast, were accepted since it was changed.
    _is_most_known: bool = field(default=False, init=False)
    _is_interval_known: bool = field(default=False, init=False)
    _last_start: float = field(default=-math.inf, init=False)
    _pause_until: float = field(default=-math.inf, init=False)
    _cut_at: float = field(default=-math.inf, init=False)  # when something was cut last
    #: One trial at a time; when the next may be, how long after one that is refused, and how many went well in a row.
    _trial: Permit | None = field(default=None, init=False)
    _trial_at: float = field(default=-math.inf, init=False)
    _trial_wait: float = field(default=0.0, init=False)
    _successes: int = field(default=0, init=False)
    #: How many requests were accepted, and since when: over a time with refusals, that is the rate of the server.
    _accepted: int = field(default=-1, init=False)
    _since: float | None = field(default=None, init=False)
    _line: deque[object] = field(default_factory=deque, init=False)

    def __post_init__(self) -> None:
        self._trial_wait = 4 * self.unit
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def enter(self, cancellation: Cancellation) -> Permit:
        """Wait until a request may be made.

        Raises
        ------
        CancelledError
            `cancellation` was set.
        """
        with self._lock:
            now = monotonic()
            if not self._line and self.delay(now) <= 0:
                return self.start(now)
            me = object()
            self._line.append(me)
            try:
                while True:
                    cancellation.check()
                    delay = math.inf
                    if self._line[0] is me and (delay := self.delay(now := monotonic())) <= 0:
                        return self.start(now)
                    self._changed.wait(min(delay, _TICK))
            finally:
                self._line.remove(me)
                self._changed.notify_all()

    def delay(self, now: float) -> float:
        """Return in how many seconds the next request may begin, if nothing happens before."""
        pause, gap = self._pause_until - now, now - self._last_start
        trial = max(pause, math.inf if self._trial is not None else self._trial_at - now)
        if self.under_way >= self.most:
            return max(trial, self.interval - gap)
        if self.interval == 0:
            return pause
        return min(max(pause, self.interval - gap), max(trial, self.interval * self._faster - gap))

    def start(self, now: float) -> Permit:
        """Begin a request; it may be, as `delay` has just said."""
        gap = now - self._last_start
        trial: Trial | None = None
        if self.under_way >= self.most:
            trial = "more"
        elif gap < self.interval:
            trial = "faster"
        permit = Permit(self, now, self.under_way, self._last_start, trial)
        if trial is not None:
            self._trial = permit
        self.under_way += 1
        self._last_start = now
        if self._since is None:
            self._since = now
        return permit

    def accepted(self, permit: Permit, now: float) -> None:
        """Learn from a request that was answered otherwise."""
        with self._lock:
            self._accepted += 1
            if self._cut_at == -math.inf:
                return  # there is no limit
            self._end_trial(permit)
            if permit.started >= self._cut_at:  # else it says nothing about the settings that are now
                self._learn(permit, now)
            self._changed.notify_all()

    def refused(self, permit: Permit, now: float, retry_after: float | None = None) -> None:
        """Learn from a request that was answered with 429 or 503."""
        pause = retry_after or 0.0
        pause = pause if pause <= self.longest_pause else 0.0
        with self._lock:
            self._pause_until = max(self._pause_until, now + pause)
            self._end_trial(permit)
            if self._last_start == permit.started:
                self._last_start = permit.before  # servers do not count what they refuse, but want a distance
                self._pause_until = max(self._pause_until, now + self.interval / 4)
            if permit.started < self._cut_at:  # one of several at the same time, of which the first counts
                if not self._is_most_known:
                    self._cut_most()
            elif not self._was_trial_only(permit, now, pause):
                self._cut(now)
            self._changed.notify_all()

    def done(self, permit: Permit) -> None:
        """Forget a request that is over."""
        with self._lock:
            self.under_way -= 1
            self._end_trial(permit)
            if self._line:
                self._changed.notify_all()

    @property
    def _faster(self) -> float:
        return _FASTER[min(self._successes, len(_FASTER) - 1)]

    def _end_trial(self, permit: Permit) -> None:
        if self._trial is permit:
            self._trial = None

    def _learn(self, permit: Permit, now: float) -> None:
        self._is_most_known = self._is_most_known or permit.others + 1 >= self.most
        self._is_interval_known = self._is_interval_known or permit.gap <= self.interval * 1.2
        if self.refusals > 1 and self._since is not None:
            # The last pause may have been far too long: who counts by the minute refuses all until the minute is over.
            self.interval = min(self.interval, max((now - self._since) / max(self._accepted, 1), self.unit))
            self._since, self._accepted = now, 0
        self.refusals = 0
        if permit.trial is None:
            return
        if permit.trial == "more":
            self.most = max(self.most, permit.others + 2**self._successes)
            self._is_most_known = self._successes == 0
        else:
            self.interval = permit.gap if permit.gap > self.unit / 12 else 0.0
        self._successes += 1
        self._trial_at, self._trial_wait = now, 4 * self.unit

    def _was_trial_only(self, permit: Permit, now: float, pause: float) -> bool:
        """Whether a refusal says no more than that what is known to be accepted is the limit."""
        self.refusals += 1
        self._successes = 0
        if permit.trial is None:
            return False
        # A trial is not worth it where it costs all others a pause that is long.
        self._trial_at = now + max(self._trial_wait, 8 * pause)
        self._trial_wait = min(2 * self._trial_wait, 128 * self.unit)
        return permit.trial == "faster" or self._is_interval_known

    def _cut(self, now: float) -> None:
        self._cut_at = now
        if not self._is_most_known or self.refusals > 1:
            self._cut_most()
        # A pace that was accepted until now is nearly right: networks deliver two requests closer than they were sent.
        is_nearly_right = self._is_interval_known and self.refusals == 1
        self.interval = min(max((1.2 if is_nearly_right else 2) * self.interval, self.unit), 20 * self.unit)
        self._is_interval_known = False
        self._trial_at = max(self._trial_at, now + 2 * self.interval)
        self._pause_until = max(self._pause_until, now + self.interval)

    def _cut_most(self) -> None:
        others = self.under_way - 1
        if others > 0 or self.most == math.inf:
            self.most = min(self.most, max(others, 1))
            self._is_most_known = False
