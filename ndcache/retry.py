"""What is tried again, how often, and after how long."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .errors import NdcacheError, RateLimitedError
from .stats import LoadStats
from .stop import Stop

__all__ = ["RetryPolicy", "with_retries"]

logger = logging.getLogger("ndcache")

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently a failed request is tried again.

    Parameters
    ----------
    retries : int
        Tries after the first one.
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

    def delay(self, error: NdcacheError, failures: int, spent: float) -> float | None:
        """Seconds to wait before the next try, or None if there must be none.

        Parameters
        ----------
        error : NdcacheError
            What the last try ended with.
        failures : int
            Tries that have failed so far, this one included.
        spent : float
            Seconds since the first failure.
        """
        allowed = min(self.retries, 1) if error.retry_once else self.retries
        if not error.retryable or failures > allowed:
            return None
        asked = error.retry_after if isinstance(error, RateLimitedError) else None
        if asked is not None:
            return asked if spent + asked <= self.budget else None
        wait = random.uniform(0, min(self.max_backoff, self.backoff * 2.0 ** (failures - 1)))
        return wait if spent + wait <= self.budget else None


def with_retries(attempt: Callable[[], T], policy: RetryPolicy, stop: Stop, stats: LoadStats | None = None) -> T:
    """`attempt()`, tried again as `policy` says. The last error knows how many tries there were."""
    failures, first_failure = 0, 0.0
    while True:
        try:
            return attempt()
        except NdcacheError as error:
            failures += 1
            now = time.monotonic()
            first_failure = first_failure or now
            error.attempts = failures
            delay = policy.delay(error, failures, now - first_failure)
            if delay is None:
                raise
            logger.warning("trying again in %.1f s (try %d): %s", delay, failures + 1, error)
        stop.sleep(delay)
        if stats is not None:
            stats.count(retries=1)
