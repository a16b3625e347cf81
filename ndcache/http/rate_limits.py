"""Keep to the limits of servers that answer 429 or 503: fewer requests at once, and more time between them.

- Every request to an origin passes its `OriginLimit`, which all workers share: requests wait in a queue, first come,
  first served. Until a server refuses a request, none has to wait.
- A refusal means that one of two settings was too high: the requests in flight, or their rate. A setting that was
  accepted before is not to blame, so the other one is cut: to the requests in flight, or to half the rate.
- Then one request at a time tries a little more than is known to be accepted. If it is accepted, the next one goes
  further; if not, the next trial waits twice as long. So a short disturbance is soon forgotten, and a lasting limit is
  met closely.
- After a refusal all requests wait, for the time of Retry-After if there is one, and then start at intervals.
- `http.retry` decides whether a refused request is tried again.
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

__all__ = ["OriginActivity", "OriginLimit", "Permit", "RateLimits", "is_refusal", "origin_of"]

logger = logging.getLogger("ndcache")

#: The statuses of servers that get too many requests; nginx's own limits answer 503.
_STATUSES = (429, 503)

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^/?#]*@)?([^/?#]*)", re.IGNORECASE).match
#: Factors by which a trial of a higher rate shortens the interval: the first trial, then those after each success.
_FASTER = (0.85, 0.8, 0.6, 0.5)
#: Seconds that a thread waits for its turn before it checks whether it was cancelled.
_TICK = 0.1

Trial = Literal["more", "faster"]


def origin_of(url: str) -> str:
    """Return the scheme, host and port of a URL, to tell servers apart. Nothing secret may depend on it."""
    match = _ORIGIN(url)
    return (match[1] + match[2]).lower() if match else url


def is_refusal(error: NdcacheError) -> bool:
    """Return whether an error means that a server gets too many requests."""
    return isinstance(error, TransferError) and error.status in _STATUSES


class OriginActivity:
    """The recent activity of the origins that one load asks, and which of them limit requests.

    Parameters
    ----------
    limits : RateLimits, optional
        The limits that the load keeps to.
    """

    def __init__(self, limits: RateLimits | None = None) -> None:
        self._limits = limits or RateLimits()
        self._last: dict[str, float] = {}
        self._limiting: dict[str, object] = {}

    def record(self, origin: str) -> None:
        """Note that an origin has just sent something."""
        self._last[origin] = monotonic()

    def was_active(self, error: NdcacheError, since: float) -> bool:
        """Return whether the origin of an error has sent something to any worker after the time `since`."""
        return self._last.get(origin_of(error.url or ""), -math.inf) > since

    def refusals(self, error: NdcacheError) -> int:
        """Return how often in a row the origin of an error has refused requests, of any worker."""
        return self._limits.of(error.url or "").refusals

    def warn_of_limit(self, error: NdcacheError) -> None:
        """Log that an origin limits requests, once for each origin."""
        origin, mine = origin_of(error.url or ""), object()
        if self._limiting.setdefault(origin, mine) is not mine:
            return
        asked = error.retry_after if isinstance(error, RateLimitedError) else None
        wait = f", wait {asked:,.0f} s" if asked else ""
        message = "%s limits requests (status %s%s): from now on it gets fewer at once, and with pauses"
        logger.warning(message, origin, error.status, wait)


class RateLimits:
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
        # By process: a lock that another thread holds at the moment of a fork stays locked in the child forever.
        key = os.getpid(), origin_of(url)
        found = self._origins.get(key)
        return found or self._origins.setdefault(key, OriginLimit(self._unit, self._longest_pause))


@dataclass(eq=False)
class Permit:
    """Permission for one request. It must be released, however the request ends.

    Attributes
    ----------
    limit : OriginLimit
    started : float
        The request's start, by ``time.monotonic()``.
    others_in_flight : int
        Other requests to the origin that were in flight at its start.
    previous_start : float
        The start of the last request before it that was not refused.
    trial : str or None
        What the request tries beyond what is known to be accepted: "more" requests in flight, or a "faster" rate.
    """

    limit: OriginLimit
    started: float
    others_in_flight: int
    previous_start: float
    trial: Trial | None = None

    @property
    def gap(self) -> float:
        """Return the seconds since the previous start."""
        return self.started - self.previous_start

    def answered(self, status: int, retry_after: float | None = None) -> None:
        """Tell the limit the status of the response, and the seconds that it asks to wait."""
        if status in _STATUSES:
            self.limit.refused(self, monotonic(), retry_after)
        elif status < 500:
            self.limit.accepted(self, monotonic())

    def release(self) -> None:
        """Tell the limit that the request is over, with its body."""
        self.limit.release(self)


@dataclass(eq=False)
class OriginLimit:
    """The limits of one origin, as far as its responses show them.

    Times are seconds of ``time.monotonic()``. The methods that take `now` neither wait nor read the clock.

    Parameters
    ----------
    unit : float
        Seconds between requests after the first refusal; other times are multiples of it.
    longest_pause : float
        Longer pauses that a server asks for are ignored, because the load then ends anyway.

    Attributes
    ----------
    max_in_flight : float
        Requests that may be in flight at once.
    interval : float
        Seconds from the start of one request to that of the next.
    in_flight : int
        Requests that have begun and are not over.
    refusals : int
        Refusals in a row; those of requests that were in flight together count as one.
    """

    unit: float = 0.125
    longest_pause: float = 300.0
    max_in_flight: float = field(default=math.inf, init=False)
    interval: float = field(default=0.0, init=False)
    in_flight: int = field(default=0, init=False)
    refusals: int = field(default=0, init=False)
    #: Whether `max_in_flight` requests, or the rate of `interval`, have been accepted since this setting changed.
    _is_max_known: bool = field(default=False, init=False)
    _is_interval_known: bool = field(default=False, init=False)
    _last_start: float = field(default=-math.inf, init=False)
    _pause_until: float = field(default=-math.inf, init=False)
    _last_cut: float = field(default=-math.inf, init=False)  # when a setting was cut last
    #: The current trial, when the next one may be, the wait after a refused one, and how many succeeded in a row.
    _trial: Permit | None = field(default=None, init=False)
    _trial_at: float = field(default=-math.inf, init=False)
    _trial_wait: float = field(default=0.0, init=False)
    _successes: int = field(default=0, init=False)
    #: How many requests were accepted, and since when: after refusals, this shows the rate that the server allows.
    _accepted: int = field(default=-1, init=False)
    _since: float | None = field(default=None, init=False)
    _queue: deque[object] = field(default_factory=deque, init=False)

    def __post_init__(self) -> None:
        self._trial_wait = 4 * self.unit
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def acquire(self, cancellation: Cancellation) -> Permit:
        """Wait until a request may be made, and return the permission for it.

        Raises
        ------
        CancelledError
            `cancellation` was set.
        """
        with self._lock:
            now = monotonic()
            if not self._queue and self.delay(now) <= 0:
                return self.start(now)
            mine = object()
            self._queue.append(mine)
            try:
                while True:
                    cancellation.check()
                    delay = math.inf
                    if self._queue[0] is mine and (delay := self.delay(now := monotonic())) <= 0:
                        return self.start(now)
                    self._changed.wait(min(delay, _TICK))
            finally:
                self._queue.remove(mine)
                self._changed.notify_all()

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may begin, if nothing else happens."""
        pause, gap = self._pause_until - now, now - self._last_start
        trial = max(pause, math.inf if self._trial is not None else self._trial_at - now)
        if self.in_flight >= self.max_in_flight:
            return max(trial, self.interval - gap)
        if self.interval == 0:
            return pause
        return min(max(pause, self.interval - gap), max(trial, self.interval * self._faster - gap))

    def start(self, now: float) -> Permit:
        """Begin a request; `delay` must have returned 0 or less."""
        gap = now - self._last_start
        trial: Trial | None = None
        if self.in_flight >= self.max_in_flight:
            trial = "more"
        elif gap < self.interval:
            trial = "faster"
        permit = Permit(self, now, self.in_flight, self._last_start, trial)
        if trial is not None:
            self._trial = permit
        self.in_flight += 1
        self._last_start = now
        if self._since is None:
            self._since = now
        return permit

    def accepted(self, permit: Permit, now: float) -> None:
        """Learn from a request that was not refused."""
        with self._lock:
            self._accepted += 1
            if self._last_cut == -math.inf:
                return  # there is no limit
            self._end_trial(permit)
            if permit.started >= self._last_cut:  # else it says nothing about the current settings
                self._learn(permit, now)
            self._changed.notify_all()

    def refused(self, permit: Permit, now: float, retry_after: float | None = None) -> None:
        """Learn from a request that was refused with 429 or 503."""
        pause = retry_after or 0.0
        pause = pause if pause <= self.longest_pause else 0.0
        with self._lock:
            self._pause_until = max(self._pause_until, now + pause)
            self._end_trial(permit)
            if self._last_start == permit.started:
                # Servers do not count a request that they refuse, but the next one still needs some distance.
                self._last_start = permit.previous_start
                self._pause_until = max(self._pause_until, now + self.interval / 4)
            if permit.started < self._last_cut:  # one of several refused together: only the first one counts
                if not self._is_max_known:
                    self._cut_max()
            elif not self._was_trial_only(permit, now, pause):
                self._cut(now)
            self._changed.notify_all()

    def release(self, permit: Permit) -> None:
        """Count a request as over."""
        with self._lock:
            self.in_flight -= 1
            self._end_trial(permit)
            if self._queue:
                self._changed.notify_all()

    @property
    def _faster(self) -> float:
        return _FASTER[min(self._successes, len(_FASTER) - 1)]

    def _end_trial(self, permit: Permit) -> None:
        if self._trial is permit:
            self._trial = None

    def _learn(self, permit: Permit, now: float) -> None:
        self._is_max_known = self._is_max_known or permit.others_in_flight + 1 >= self.max_in_flight
        self._is_interval_known = self._is_interval_known or permit.gap <= self.interval * 1.2
        if self.refusals > 1 and self._since is not None:
            # The last pause may have been far too long: a server that counts by the minute refuses all until its end.
            self.interval = min(self.interval, max((now - self._since) / max(self._accepted, 1), self.unit))
            self._since, self._accepted = now, 0
        self.refusals = 0
        if permit.trial is None:
            return
        if permit.trial == "more":
            self.max_in_flight = max(self.max_in_flight, permit.others_in_flight + 2**self._successes)
            self._is_max_known = self._successes == 0
        else:
            self.interval = permit.gap if permit.gap > self.unit / 12 else 0.0
        self._successes += 1
        self._trial_at, self._trial_wait = now, 4 * self.unit

    def _was_trial_only(self, permit: Permit, now: float, pause: float) -> bool:
        """Return whether a refusal only confirms that the settings known to be accepted are the limit."""
        self.refusals += 1
        self._successes = 0
        if permit.trial is None:
            return False
        # Where a server asks for long pauses, a trial may cost all other requests such a pause: make fewer trials.
        self._trial_at = now + max(self._trial_wait, 8 * pause)
        self._trial_wait = min(2 * self._trial_wait, 128 * self.unit)
        return permit.trial == "faster" or self._is_interval_known

    def _cut(self, now: float) -> None:
        self._last_cut = now
        if not self._is_max_known or self.refusals > 1:
            self._cut_max()
        # A rate that was accepted until now is nearly right: networks may deliver two requests closer together than
        # they were sent.
        is_nearly_right = self._is_interval_known and self.refusals == 1
        self.interval = min(max((1.2 if is_nearly_right else 2) * self.interval, self.unit), 20 * self.unit)
        self._is_interval_known = False
        self._trial_at = max(self._trial_at, now + 2 * self.interval)
        self._pause_until = max(self._pause_until, now + self.interval)

    def _cut_max(self) -> None:
        others_in_flight = self.in_flight - 1
        if others_in_flight > 0 or self.max_in_flight == math.inf:
            self.max_in_flight = min(self.max_in_flight, max(others_in_flight, 1))
            self._is_max_known = False
