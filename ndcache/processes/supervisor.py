"""Start helper processes, follow their reports, and end them."""

from __future__ import annotations

import logging
import selectors
import signal
import subprocess
import time
from dataclasses import replace

from ..http.limits.token_bucket import TokenBucket
from ..progress import Arrivals
from ..stats import LoadStats
from .command import helper_arguments, helper_environ
from .messages import HelperReport, HelperRequest
from .process import HelperProcess, start_helper

__all__ = ["Supervisor"]

#: Seconds between two looks at whether the load has ended.
_LOOK = 0.05
#: Seconds in which helpers must end after the load has; then they are killed.
_GRACE = 0.75
#: Seconds without a report after which a helper is killed, so that its locks are free. Time in which this process does
#: not run either, because somebody stopped all of them, does not count.
_PATIENCE = 15.0
#: Errors that prevent the start of a process; a RuntimeError, if Python is shutting down.
_START_ERRORS = (OSError, RuntimeError, subprocess.SubprocessError)

logger = logging.getLogger("ndcache")


class Supervisor:
    """Start helper processes, follow their reports, and end them, all in one thread.

    Parameters
    ----------
    request : HelperRequest
    count : int
        How many helpers to start.
    stats : LoadStats
        The load's, which their bytes, requests and seconds are added to.
    arrivals : Arrivals
        The load's, which learns what they receive, and why they wait.
    bucket : TokenBucket or None
        The load's, which they share.

    Attributes
    ----------
    published : set of str
        The shards that they have put into the cache.
    problem : str or None
        Why a helper could not start.
    """

    def __init__(
        self,
        request: HelperRequest,
        count: int,
        stats: LoadStats,
        arrivals: Arrivals,
        bucket: TokenBucket | None = None,
    ) -> None:
        self.published: set[str] = set()
        self.problem: str | None = None
        self._request = request
        self._count = count
        self._stats = stats
        self._arrivals = arrivals
        self._bucket = bucket
        self._is_ending = False
        self._has_warned = False
        self._logged: set[str] = set()

    def end(self) -> None:
        """Let `run` end the helpers and return. Does not wait."""
        self._is_ending = True

    def run(self) -> None:
        """Start the helpers; return when all have ended."""
        if hasattr(signal, "pthread_sigmask"):
            # Helpers inherit the mask of this thread: Ctrl-C cannot end them while they start.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        helpers: list[HelperProcess] = []
        with selectors.DefaultSelector() as selector:
            try:
                self._start(helpers, selector)
                while not self._is_ending and any(helper.is_running for helper in helpers):
                    self._follow(helpers, selector)
            except Exception:
                logger.exception("helper processes are not used any more")
            finally:
                self._is_ending = True
                for helper in helpers:
                    helper.hang_up()
                    if not helper.has_begun:
                        helper.kill()
                deadline = time.monotonic() + _GRACE
                while any(helper.is_running for helper in helpers) and time.monotonic() < deadline:
                    self._read(helpers, selector)
                for helper in helpers:
                    helper.kill()

    def _start(self, helpers: list[HelperProcess], selector: selectors.BaseSelector) -> None:
        arguments, environ = helper_arguments(), helper_environ(self._request.environ)
        try:
            bucket = None if self._bucket is None else self._bucket.share()
            request = replace(self._request, bucket=bucket).encode()
            while len(helpers) < self._count and not self._is_ending:
                helpers.append(start_helper(arguments, environ, request, selector, bucket))
        except _START_ERRORS as error:
            self.problem = (
                f"a helper process could not start ({error}):"
                f" {1 + len(helpers)} of {1 + self._count} processes download"
            )

    def _follow(self, helpers: list[HelperProcess], selector: selectors.BaseSelector) -> None:
        """Read what has come, and kill helpers that do not report any more."""
        begun = time.monotonic()
        self._read(helpers, selector)
        spent = min(time.monotonic() - begun, 2 * _LOOK)
        for helper in helpers:
            helper.silence += spent
            if helper.is_running and helper.has_begun and helper.silence > _PATIENCE:
                helper.kill()
                self._ended(helper, "it did not report any more")

    def _read(self, helpers: list[HelperProcess], selector: selectors.BaseSelector) -> None:
        """Move what can be moved through the pipes, for a moment."""
        ready = {id(key.data) for key, _ in selector.select(_LOOK)}
        for helper in helpers:
            if not helper.is_running or not (id(helper) in ready or helper.has_exited):
                continue
            for report in helper.move():
                counts, seconds = report.since(helper.last)
                helper.last = report
                self._arrivals.note_helper(helper, report.coming, report.published, report.pause)
                self._stats.count(**counts)
                self._stats.add_seconds(seconds)
                self.published.update(report.published)
                if self._stats.trace is not None:
                    self._stats.trace.add_events(report.events)
                self._log(report)
            if not helper.is_running:
                self._ended(helper, helper.last_words)

    def _log(self, report: HelperReport) -> None:
        for level, text in report.log:
            if text not in self._logged:  # several helpers may say the same
                self._logged.add(text)
                logger.log(level, "%s", text)

    def _ended(self, helper: HelperProcess, why: str) -> None:
        """Note that a helper has ended; warn, once, if it should not have."""
        self._arrivals.note_helper(helper, {}, (), None)
        if not (helper.last.is_done or self._is_ending or self._has_warned):
            self._has_warned = True
            logger.warning("a helper process ended early (%s); the other processes go on", why)
