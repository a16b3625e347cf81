"""What is tried again, how often, and after how long."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .errors import NdcacheError, RateLimitedError
from .stats import LoadStats
from .stop import Stop

__all__ = ["RetryPolicy", "with_retries"]

logger = logging.getLogger("ndcache")

T = TypeVar("T")


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
        if asked is not None:
            return asked if spent + asked <= self.budget else None
        wait = random.uniform(0, min(self.max_backoff, self.backoff * 2.0 ** min(failures - 1, 64)))
        return wait if spent + wait <= self.budget else None


def with_retries(
    attempt: Callable[[], T],
    policy: RetryPolicy,
    stop: Stop,
    stats: LoadStats | None = None,
    progress: Callable[[], int] = lambda: 0,
) -> T:
    """`attempt()`, tried again as `policy` says. The last error knows how many tries there were.

    `progress` says how many bytes are there for good; bytes that come a second time do not count.
    """
    tries, failures, first_failure = 0, 0, 0.0
    kinds: Counter[type[NdcacheError]] = Counter()
    mark = progress()
    while True:
        try:
            return attempt()
        except NdcacheError as error:
            now = time.monotonic()
            if progress() - mark >= _PROGRESS_BYTES:
                mark, failures, first_failure = progress(), 0, now
            tries, failures = tries + 1, failures + 1
            kinds[type(error)] += 1
            first_failure = first_failure or now
            error.attempts = tries
            delay = policy.delay(error, failures, kinds[type(error)], now - first_failure)
            if delay is None:
                raise
            logger.warning("trying again in %.1f s (try %d): %s", delay, tries + 1, str(error))
        if stats is None:
            stop.sleep(delay)
        else:
            with stats.timed("backoff"):
                stop.sleep(delay)
            stats.count(retries=1)
