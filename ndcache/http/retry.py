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
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..errors import NdcacheError, RateLimitedError
from ..stats import LoadStats
from ..workers.cancellation import Cancellation
from .rate_limits import Served, is_refusal

__all__ = ["RetryPolicy", "with_retries"]

logger = logging.getLogger("ndcache")

T = TypeVar("T")


#: Refusals in a row after which the waits of a file do not get longer, while others are served.
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


def with_retries(
    attempt: Callable[[], T],
    policy: RetryPolicy,
    cancellation: Cancellation,
    stats: LoadStats | None = None,
    progress: Callable[[], int] = lambda: 0,
    served: Served | None = None,
) -> T:
    """`attempt()`, tried again as `policy` says. The last error knows how many tries there were.

    `progress` says how many bytes are there for good; bytes that come a second time do not count. A try that a
    server refused, because there were too many, does not count if it has given something to anybody since the try
    before, as `served` knows.
    """
    tries, failures, first_failure, refusals, refused_before = 0, 0, 0.0, 0, 0
    kinds: Counter[type[NdcacheError]] = Counter()
    mark, since = progress(), time.monotonic()
    while True:
        try:
            return attempt()
        except NdcacheError as error:
            now = time.monotonic()
            if progress() - mark >= _PROGRESS_BYTES:
                mark, failures, first_failure, refusals = progress(), 0, now, 0
            is_refused = is_refusal(error)
            if is_refused and served is not None and served.has_given(error, since):
                failures, first_failure, refusals = 0, now, refusals + 1
            since = now
            tries, failures = tries + 1, failures + 1
            kinds[type(error)] += 1
            first_failure = first_failure or now
            error.attempts = tries
            counted, spent = max(failures, min(refusals, _MOST_COUNTED, policy.retries)), now - first_failure
            if is_refused and served is not None:
                in_a_row = served.refusals(error)
                if failures == 1:
                    refused_before = in_a_row - 1
                if spent >= policy.typical_patience:
                    counted = max(counted, in_a_row - refused_before)  # nobody got anything in the meantime
            delay = policy.delay(error, counted, kinds[type(error)], spent)
            if delay is None:
                raise
            if is_refused and served is not None:
                served.note_limit(error)
            level = logging.DEBUG if is_refused and served is not None else logging.WARNING
            logger.log(level, "trying again in %.1f s (try %d): %s", delay, tries + 1, str(error))
        if stats is None:
            cancellation.sleep(delay)
        else:
            with stats.timed("rate_limit" if is_refused else "backoff"):
                cancellation.sleep(delay)
            stats.count(retries=1)
