"""Decide what is tried again, how often, and after how long.

A server that limits requests (429, 503) refuses what it will give a moment later: as long as it gives others something,
that is no failure, and not counted. It is only asked less and less often, so that a file that alone is refused does not
slow down the rest. A server that gives nothing to anybody is given up after as many refusals, and as long, as if a
single file had been asked for: many files that wait for their turn to be refused do not make the load hang on.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from ..errors import NdcacheError, RateLimitedError
from ..stats import LoadStats
from ..workers.cancellation import Cancellation
from .rate_limits import OriginActivity, is_refusal

__all__ = ["Attempt", "RetryPolicy", "attempts", "with_retries"]

logger = logging.getLogger("ndcache")

T = TypeVar("T")


#: Refusals in a row after which the waits of a file do not get longer, while others are activity.
_MOST_COUNTED = 4
#: Bytes of progress after which all failures so far are forgotten.
_PROGRESS_BYTES = 1 << 20


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently a failed request is tried again.

    Both limits are about failures in a row: after each MiB of progress they start afresh.

    Parameters
    ----------
    retries : int
        Tries after the first one. Errors that no further try is likely to mend get one at most.
    budget : float
        Seconds after the first failure in which a next try may begin.
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
        """Seconds that all waits of a file take on average."""
        waits = (min(self.max_backoff, self.backoff * 2.0**n) / 2 for n in range(min(self.retries, 64)))
        return min(sum(waits), self.budget)

    def delay(self, error: NdcacheError, failures: int, of_this_kind: int, spent: float) -> float | None:
        """Seconds to wait before the next try, or None if there must be none.

        Parameters
        ----------
        error : NdcacheError
            What the last try ended with.
        failures : int
            Tries in a row that have failed so far, this one included.
        of_this_kind : int
            How many tries have ended with an error of this type since the beginning, this one included.
        spent : float
            Seconds since the first of these failures.
        """
        if not error.retryable or failures > self.retries:
            return None
        if error.max_retries is not None and of_this_kind > error.max_retries:
            return None
        asked = error.retry_after if isinstance(error, RateLimitedError) else None
        wait = random.uniform(0, min(self.max_backoff, self.backoff * 2.0 ** min(failures - 1, 64)))
        wait = max(wait, asked or 0.0)  # for as long as it asks, but a server that asks for no wait is not hurried
        return wait if spent + wait <= self.budget else None


def attempts(
    policy: RetryPolicy,
    cancellation: Cancellation,
    stats: LoadStats | None = None,
    activity: OriginActivity | None = None,
    progress: Callable[[], int] = lambda: 0,
) -> Iterator[Attempt]:
    """Yield attempts at some work until one succeeds, and wait between them.

    An error that `policy` does not forgive leaves the block of its attempt, and knows how many attempts there were::

        for attempt in attempts(policy, cancellation, stats, activity):
            with attempt:
                result = work()
        return result

    Parameters
    ----------
    policy : RetryPolicy
    cancellation : Cancellation
        Ends the wait for the next attempt with `CancelledError`.
    stats : LoadStats, optional
        Counts the retries, and the time between them.
    activity : OriginActivity, optional
        Knows whether a server that refuses a request (429, 503) gives others something meanwhile: if it does, the
        refusal does not count as a failure.
    progress : callable
        Return how many bytes of the work are done for good; bytes that come a second time do not count.
    """
    attempt = Attempt(policy, activity, progress)
    while True:
        yield attempt
        if attempt.delay is None:
            return
        if stats is None:
            cancellation.sleep(attempt.delay)
        else:
            with stats.timed("rate_limit" if attempt.is_refused else "backoff"):
                cancellation.sleep(attempt.delay)
            stats.count(retries=1)


class Attempt:
    """The current attempt at some work, as a context manager that ends an error after which there is another one.

    Attributes
    ----------
    delay : float or None
        Seconds to wait before the next attempt; None if there is none.
    is_refused : bool
        Whether the server refused the last attempt because it gets too many requests.
    """

    delay: float | None = None
    is_refused: bool = False

    def __init__(self, policy: RetryPolicy, activity: OriginActivity | None, progress: Callable[[], int]) -> None:
        self._policy = policy
        self._activity = activity
        self._progress = progress
        self._tries = 0
        self._kinds: Counter[type[NdcacheError]] = Counter()
        self._last_time = time.monotonic()
        # Since the last progress: failures, refusals that do not count as such, and how many others had before.
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
        counted, spent = self._count(error)
        self.delay = self._policy.delay(error, counted, self._kinds[type(error)], spent)
        if self.delay is None:
            return False
        level = logging.WARNING
        if self.is_refused and self._activity is not None:
            self._activity.warn_of_limit(error)
            level = logging.DEBUG
        logger.log(level, "trying again in %.1f s (try %d): %s", self.delay, self._tries + 1, str(error))
        return True

    def _count(self, error: NdcacheError) -> tuple[int, float]:
        """Return how many failures in a row there were with this one, and the seconds since the first of them."""
        now = time.monotonic()
        if self._progress() - self._mark >= _PROGRESS_BYTES:
            self._mark, self._failures, self._first_failure, self._refusals = self._progress(), 0, now, 0
        activity = self._activity if self.is_refused else None
        if activity is not None and activity.was_active(error, self._last_time):
            self._failures, self._first_failure, self._refusals = 0, now, self._refusals + 1
        self._last_time = now
        self._failures += 1
        self._first_failure = self._first_failure or now
        spent = now - self._first_failure
        counted = max(self._failures, min(self._refusals, _MOST_COUNTED, self._policy.retries))
        if activity is not None:
            in_a_row = activity.refusals(error)
            if self._failures == 1:
                self._refused_before = in_a_row - 1
            if spent >= self._policy.typical_patience:
                counted = max(counted, in_a_row - self._refused_before)  # nobody got anything in the meantime
        return counted, spent


def with_retries(
    work: Callable[[], T],
    policy: RetryPolicy,
    cancellation: Cancellation,
    stats: LoadStats | None = None,
    progress: Callable[[], int] = lambda: 0,
    activity: OriginActivity | None = None,
) -> T:
    """Return `work()`, tried again as `attempts` says."""
    for attempt in attempts(policy, cancellation, stats, activity, progress):
        with attempt:
            result = work()
    return result
