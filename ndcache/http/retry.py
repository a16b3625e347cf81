"""Retry failed requests: which ones, how often, and after how long.

A server that limits requests (429, 503) refuses now what it will send a moment later. While it sends something to any
worker, its refusals do not count as failures; the request is only repeated less and less often, so that a single
refused file does not slow down the others. If it sends nothing to any worker, the load gives up as soon as it
would for a single file: many waiting files do not prolong it.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from ..errors import NdcacheError, RateLimitedError, ServerError
from ..progress import Arrivals
from ..stats import LoadStats
from ..workers.cancellation import Cancellation
from .limits.rate_limits import OriginActivity, is_refusal, origin_of, refusal_reason

__all__ = ["Attempt", "RetryPolicy", "attempts"]

logger = logging.getLogger("ndcache")

#: Refusals in a row after which the waits for a file stop growing, while other files receive something.
_MAX_COUNTED_REFUSALS = 4
#: Bytes of progress after which all failures so far are forgotten.
_PROGRESS_BYTES = 1 << 20
#: Seconds between two calls of `waiting`.
_WAITING_SECONDS = 10.0


@dataclass(frozen=True)
class RetryPolicy:
    """Limit how often a failed request is tried again, and how long that may take.

    Both limits count failures in a row: after each MiB of progress they start again.

    Parameters
    ----------
    retries : int
        Attempts after the first one. After errors that are unlikely to pass, there is one more at most.
    budget : float
        Seconds after the first failure in which another attempt may begin.
    backoff, max_backoff : float
        The wait after the *n*-th failure is drawn evenly from 0 to ``min(max_backoff, backoff * 2**(n - 1))`` seconds
        ("full jitter").
    """

    retries: int = 6
    budget: float = 300.0
    backoff: float = 0.5
    max_backoff: float = 30.0

    @property
    def typical_patience(self) -> float:
        """Return the seconds that all waits for one file take on average."""
        waits = (min(self.max_backoff, self.backoff * 2.0**n) / 2 for n in range(min(self.retries, 64)))
        return min(sum(waits), self.budget)

    def delay(self, error: NdcacheError, failures: int, of_this_kind: int, spent: float) -> float | None:
        """Return the seconds to wait before the next attempt, or None if there must be none.

        Parameters
        ----------
        error : NdcacheError
            The error of the last attempt.
        failures : int
            Failures in a row so far, this one included.
        of_this_kind : int
            Errors of this type since the beginning, this one included.
        spent : float
            Seconds since the first of these failures.
        """
        if not error.retryable or failures > self.retries:
            return None
        if error.max_retries is not None and of_this_kind > error.max_retries:
            return None
        asked = error.retry_after if isinstance(error, RateLimitedError) else None
        wait = random.uniform(0, min(self.max_backoff, self.backoff * 2.0 ** min(failures - 1, 64)))
        wait = max(wait, asked or 0.0)  # a server that asks for 0 s gets our own wait nevertheless
        return wait if spent + wait <= self.budget else None


def attempts(
    policy: RetryPolicy,
    cancellation: Cancellation,
    stats: LoadStats,
    activity: OriginActivity,
    progress: Callable[[], int] = lambda: 0,
    waiting: Callable[[], None] | None = None,
    arrivals: Arrivals | None = None,
) -> Iterator[Attempt]:
    """Yield attempts at some work until one succeeds, and wait between them.

    If `policy` allows no other attempt, the error is raised, with the number of attempts in it.

    While the work runs, no function of this module is on the stack::

        for attempt in attempts(policy, cancellation, stats, activity):
            with attempt:
                result = work()
        return result

    Parameters
    ----------
    policy : RetryPolicy
    cancellation : Cancellation
        Ends the wait for the next attempt with `CancelledError`.
    stats : LoadStats
        Counts the retries, and the time between them.
    activity : OriginActivity
        Knows whether a server that refuses a request (429, 503) sends something to other workers meanwhile: if it does,
        the refusal does not count as a failure.
    progress : callable
        Return how many bytes have been received; those that are received again do not count.
    waiting : callable, optional
        Called every few seconds of a long wait.
    arrivals : Arrivals, optional
        Learns why there is another attempt, until it is over.
    """
    attempt = Attempt(policy, activity, progress)
    arrivals = arrivals or Arrivals()
    try:
        while True:
            yield attempt
            if attempt.delay is None:
                return
            arrivals.pause(attempt, attempt.reason, is_wanted=attempt.is_refused)
            with stats.timed("rate_limit" if attempt.is_refused else "backoff"):
                if waiting is not None:
                    while attempt.delay > _WAITING_SECONDS:
                        waiting()
                        cancellation.sleep(_WAITING_SECONDS)
                        attempt.delay -= _WAITING_SECONDS
                cancellation.sleep(attempt.delay)
            stats.count(retries=1)
    finally:
        arrivals.go_on(attempt)


class Attempt:
    """The current attempt at some work, as a context manager that suppresses an error if another attempt follows.

    Attributes
    ----------
    delay : float or None
        Seconds to wait before the next attempt; None if there is none.
    is_refused : bool
        Whether the server refused the last attempt because it gets too many requests.
    reason : str
        Why there is another attempt, for a bar.
    """

    delay: float | None = None
    reason: str = ""
    is_refused: bool = False

    def __init__(self, policy: RetryPolicy, activity: OriginActivity, progress: Callable[[], int]) -> None:
        self._policy = policy
        self._activity = activity
        self._progress = progress
        self._tries = 0
        self._kinds: Counter[type[NdcacheError]] = Counter()
        self._last_time = time.monotonic()
        # Since the last progress: failures, refusals that do not count as such, and the origin's refusals before them.
        self._mark = progress()
        self._failures = 0
        self._first_failure = 0.0
        self._refusals = 0
        self._refused_before = 0

    def __enter__(self) -> None:
        self.delay = None

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> bool:
        if not isinstance(error, NdcacheError):
            return False
        self.is_refused = is_refusal(error)
        self._tries += 1
        self._kinds[type(error)] += 1
        error.attempts = self._tries
        failures, spent = self._count(error)
        self.delay = self._policy.delay(error, failures, self._kinds[type(error)], spent)
        if self.delay is None:
            return False
        if self.is_refused:
            self._activity.warn_of_limit(error)
        self.reason = _reason(error, self._tries + 1)
        level = logging.DEBUG if self.is_refused else logging.WARNING
        logger.log(level, "trying again in %.1f s (try %d): %s", self.delay, self._tries + 1, str(error))
        return True

    def _count(self, error: NdcacheError) -> tuple[int, float]:
        """Return how many failures in a row there were with this one, and the seconds since the first of them."""
        now = time.monotonic()
        if self._progress() - self._mark >= _PROGRESS_BYTES:
            self._mark, self._failures, self._first_failure, self._refusals = self._progress(), 0, now, 0
        if self.is_refused and self._activity.was_active(error, self._last_time):
            self._failures, self._first_failure, self._refusals = 0, now, self._refusals + 1
        self._last_time = now
        self._failures += 1
        self._first_failure = self._first_failure or now
        spent = now - self._first_failure
        failures = max(self._failures, min(self._refusals, _MAX_COUNTED_REFUSALS, self._policy.retries))
        if self.is_refused:
            in_a_row = self._activity.refusals(error)
            if self._failures == 1:
                self._refused_before = in_a_row - 1
            if spent >= self._policy.typical_patience:
                failures = max(failures, in_a_row - self._refused_before)  # no worker has received anything since
        return failures, spent


def _reason(error: NdcacheError, tries: int) -> str:
    """Return why there is another attempt, for a bar."""
    if is_refusal(error):
        return refusal_reason(error.retry_after if isinstance(error, RateLimitedError) else None)
    host = origin_of(error.url or "").partition("://")[2] or "the server"
    if isinstance(error, ServerError):
        return f"{host} answered with status {error.status}, attempt {tries}"
    return f"reconnecting to {host}, attempt {tries}"
