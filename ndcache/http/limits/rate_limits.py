"""The limits and the activity of all origins that loads ask.

- Every request to an origin passes its `OriginLimit`, which all workers share: requests wait in a queue, first come,
  first served. Until a server refuses a request, none has to wait. Several processes wait for each other as well as
  they can: see `limits.shared`.
- `limits.state` says how refusals change the limits.
- `http.retry` decides whether a refused request is tried again.
"""

from __future__ import annotations

import logging
import math
import os
import re
from time import monotonic

from ...errors import NdcacheError, RateLimitedError, TransferError
from ...files.folder import Folder
from .origin import STATUSES, OriginLimit
from .shared import SharedState
from .state import LimitState

__all__ = ["OriginActivity", "RateLimits", "is_refusal", "origin_of", "refusal_reason"]

logger = logging.getLogger("ndcache")

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^/?#]*@)?([^/?#]*)", re.IGNORECASE).match


def origin_of(url: str) -> str:
    """Return the scheme, host and port of a URL, to tell servers apart. Nothing secret may depend on it."""
    match = _ORIGIN(url)
    return (match[1] + match[2]).lower() if match else url


def is_refusal(error: NdcacheError) -> bool:
    """Return whether an error means that a server gets too many requests."""
    return isinstance(error, TransferError) and error.status in STATUSES


def refusal_reason(seconds: float | None) -> str:
    """Return why requests wait, for a bar, if the server may have asked for a pause of some seconds."""
    return f"the server asks us to wait {seconds:,.0f} s" if seconds and seconds >= 1 else "the server limits requests"


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
        self._last[origin] = now = monotonic()
        self._limits.sends(origin, now)

    def was_active(self, error: NdcacheError, since: float) -> bool:
        """Return whether the origin of an error has sent something to any worker after the time `since`.

        Workers of other processes count, too, if they share the limit.
        """
        url = error.url or ""
        return max(self._last.get(origin_of(url), -math.inf), self._limits.of(url).state.served) > since

    def refusals(self, error: NdcacheError) -> int:
        """Return how often in a row the origin of an error has refused requests, of any worker."""
        return self._limits.of(error.url or "").state.refusals

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
        See `LimitState`.
    folder : Folder, optional
        Where the limits are shared with other processes; by default they are not.
    """

    def __init__(self, unit: float = 0.125, longest_pause: float = 300.0, folder: Folder | None = None) -> None:
        self._unit, self._longest_pause, self._folder = unit, longest_pause, folder
        self._origins: dict[tuple[int, str], OriginLimit] = {}

    def of(self, url: str) -> OriginLimit:
        """Return the limit of the origin that a request for `url` goes to."""
        # By process: a lock that another thread holds at the moment of a fork stays locked in the child forever.
        key = os.getpid(), origin_of(url)
        found = self._origins.get(key)
        if found is None:
            shared = None if self._folder is None else SharedState(self._folder, key[1])
            found = self._origins.setdefault(key, OriginLimit(LimitState(self._unit, self._longest_pause), shared))
        return found

    def sends(self, origin: str, now: float) -> None:
        """Tell the limit of an origin that the origin sends something."""
        limit = self._origins.get((os.getpid(), origin))
        if limit is not None:
            limit.sends(now)
