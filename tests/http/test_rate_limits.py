"""The limits of servers that answer 429 or 503, without sockets; row 49 of docs/faults.rst."""

from __future__ import annotations

import heapq
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

import ndcache
from ndcache.http.limits.origin import OriginLimit
from ndcache.http.limits.rate_limits import OriginActivity, origin_of
from ndcache.http.limits.state import LimitState, Start
from ndcache.http.retry import RetryPolicy, attempts
from ndcache.stats import LoadStats
from ndcache.workers.cancellation import Cancellation

T = TypeVar("T")


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


# --- in simulated time: an origin's limit against simulated servers --------------------------------------


class Connections:
    """A server that limits the requests at once."""

    def __init__(self, most: int) -> None:
        self.most = most

    def accepts(self, now: float, in_flight: int) -> bool:
        return in_flight < self.most


class Rate:
    """A server that limits the requests per second, after a burst."""

    def __init__(self, rate: float, burst: int = 0) -> None:
        self.rate, self.burst, self.excess, self.last = rate, burst, 0.0, -1e9

    def accepts(self, now: float, in_flight: int) -> bool:
        excess = max(self.excess - self.rate * (now - self.last) + 1, 0.0)
        if excess > self.burst + 1e-9:
            return False
        self.excess, self.last = excess, now
        return True


class Window:
    """A server that limits the requests in any period of some seconds; if `counts_all`, refused ones count, too."""

    def __init__(self, most: int, seconds: float, *, counts_all: bool = False) -> None:
        self.most, self.seconds, self.counts_all, self.times = most, seconds, counts_all, list[float]()

    def accepts(self, now: float, in_flight: int) -> bool:
        self.times = [time for time in self.times if time > now - self.seconds]
        is_free = len(self.times) < self.most
        if is_free or self.counts_all:
            self.times.append(now)
        return is_free


class Hiccup:
    """A server that refuses the requests with certain numbers, for no reason."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.count = numbers, 0

    def accepts(self, now: float, in_flight: int) -> bool:
        self.count += 1
        return self.count not in self.numbers


class Simulation:
    """A load of one model's shards by workers, in simulated time.

    Attributes
    ----------
    now : float
        Seconds that the load took.
    refused : int
        Refused requests.
    """

    def __init__(
        self, server: Any, shards: int, seconds: float, *, workers: int = 8, retry_after: float | None = None
    ) -> None:
        self.now, self.refused = 0.0, 0
        self._server, self._seconds, self._retry_after = server, seconds, retry_after
        self._limit = LimitState()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._left, self._bodies = shards, 0
        self._waiting = min(workers, shards)  # workers that have a shard and wait for their turn
        self._queue = shards - self._waiting
        while self._left:
            self._begin()
            self.now, _, event = heapq.heappop(self._events)
            event()
            assert self.now < 10_000

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), event))

    def _begin(self) -> None:
        while self._waiting:
            delay = self._limit.delay(self.now)
            if delay > 1e-9:
                if delay < 1e6:
                    self._after(delay, lambda: None)
                return
            self._waiting -= 1
            start = self._limit.start(self.now)
            self._after(0.001, lambda start=start: self._ask(start))  # type: ignore[misc]

    def _ask(self, start: Start) -> None:
        if not self._server.accepts(self.now, self._bodies):
            self._after(0.001, lambda: self._refuse(start))
            return
        self._bodies += 1
        self._after(0.001, lambda: self._limit.accepted(start, self.now))
        self._after(self._seconds, lambda: setattr(self, "_bodies", self._bodies - 1))
        self._after(0.001 + self._seconds, lambda: self._done(start))

    def _refuse(self, start: Start) -> None:
        self.refused += 1
        self._limit.refused(start, self.now, self._retry_after)
        self._limit.release(start)
        self._after(self._retry_after or 0.25, lambda: setattr(self, "_waiting", self._waiting + 1))

    def _done(self, start: Start) -> None:
        self._limit.release(start)
        self._left -= 1
        if self._queue:
            self._queue -= 1
            self._waiting += 1


@pytest.mark.parametrize("workers", [1, 2, 8, 16])
@pytest.mark.parametrize(
    ("server", "options", "shards", "seconds", "needed"),
    [
        (Connections, (1,), 20, 2.0, 40.0),
        (Connections, (2,), 12, 10.0, 60.0),
        (Connections, (2,), 100, 0.25, 12.5),
        (Connections, (5,), 60, 3.0, 36.0),
        (Rate, (1,), 30, 0.002, 30.0),
        (Rate, (3,), 60, 0.002, 20.0),
        (Rate, (3,), 60, 1.0, 20.0),
        (Rate, (3,), 60, 2.5, 22.5),
        (Rate, (3, 5), 60, 0.002, 18.0),
        (Rate, (3, 5), 60, 1.0, 19.0),
        (Rate, (50,), 400, 0.002, 8.0),
        (Window, (30, 10), 120, 0.002, 30.0),
    ],
)
def test_row_49_a_load_takes_little_longer_than_the_limit_demands(
    server: Any, options: tuple[float, ...], shards: int, seconds: float, needed: float, workers: int
) -> None:
    needed = max(needed, shards * (seconds + 0.002) / workers)
    simulation = Simulation(server(*options), shards, seconds, workers=workers)
    assert simulation.now <= 1.5 * needed
    assert simulation.refused <= workers + shards


@pytest.mark.parametrize("counts_all", [False, True])
def test_row_49_a_server_that_counts_refused_requests_and_says_when_to_retry(counts_all: bool) -> None:
    simulation = Simulation(Window(30, 10, counts_all=counts_all), 120, 0.002, retry_after=10)
    assert simulation.now <= 1.5 * 30
    assert simulation.refused <= 60


@pytest.mark.parametrize("seconds", [0.01, 0.5])
@pytest.mark.parametrize("at", [1, 20, 199])
def test_row_49_one_refusal_slows_the_load_down_only_briefly(seconds: float, at: int) -> None:
    calm, disturbed = Simulation(Hiccup(), 200, seconds), Simulation(Hiccup(at), 200, seconds)
    assert disturbed.refused == 1
    assert disturbed.now - calm.now < 2


@pytest.mark.parametrize("retry_after", [None, 0.0])
def test_row_49_no_request_follows_a_refusal_at_once(retry_after: float | None) -> None:
    limit = LimitState()
    for _ in range(5):
        limit.refused(limit.start(100.0), 100.0, retry_after)
    assert limit.delay(100.0) > 0.1
    start = limit.start(101.0)
    assert limit.delay(101.0) > 0.1  # nor two at the same time later
    limit.accepted(start, 101.0)
    assert limit.delay(101.0) > 0.1


def test_row_49_all_wait_for_as_long_as_the_server_asks() -> None:
    limit = LimitState()
    limit.refused(limit.start(100.0), 100.0, 7.0)
    assert limit.delay(100.0) == 7.0
    limit.refused(limit.start(107.0), 107.0, 1e9)  # no request waits so long: the load ends
    assert limit.delay(107.0) < 1


def test_a_server_that_never_refuses_is_never_waited_for() -> None:
    limit = LimitState()
    for now in range(1000):
        assert limit.delay(now / 1000) <= 0
        start = limit.start(now / 1000)
        limit.accepted(start, now / 1000)
        if now % 2:
            limit.release(start)
    assert limit.in_flight == 500


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://Host/a/b?c", "http://host"),
        ("HTTPS://user:pass@host:8443", "https://host:8443"),
        ("http://host?query@x", "http://host"),
        ("http://[::1]:80/a", "http://[::1]:80"),
        ("(unreadable URL)", "(unreadable URL)"),
    ],
)
def test_origins(url: str, origin: str) -> None:
    assert origin_of(url) == origin


# --- with threads -------------------------------------------------------------------------------------


def test_row_49_threads_that_wait_for_a_limit_can_be_cancelled() -> None:
    limit, cancellation, errors = OriginLimit(LimitState()), Cancellation(), list[BaseException]()
    permit = limit.acquire(cancellation)
    permit.answered(429, 200.0)
    permit.release()

    def wait() -> None:
        try:
            limit.acquire(cancellation)
        except ndcache.CancelledError as error:
            errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(limit._queue) == 8)
    begun = time.monotonic()
    cancellation.set()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begun < 1
    assert len(errors) == 8
    assert not limit._queue


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_row_37_a_forked_child_does_not_wait_for_a_lock_of_its_parent() -> None:
    script = """
import os
from ndcache.http.limits.rate_limits import RateLimits
from ndcache.workers.cancellation import Cancellation
shared = RateLimits()
with shared.of("http://host/")._lock:  # held as by a thread that makes a request at that moment
    if os.fork() == 0:
        shared.of("http://host/").acquire(Cancellation()).release()
        os._exit(0)
    print(os.wait()[1])
"""
    assert subprocess.check_output([sys.executable, "-c", script], text=True, timeout=60) == "0\n"


QUICK = RetryPolicy(retries=2, backoff=0.001)


class ActiveFor(OriginActivity):
    """Activity of an origin that sends something to others between each two of so many tries."""

    def __init__(self, tries: int) -> None:
        super().__init__()
        self._tries = tries

    def was_active(self, error: ndcache.NdcacheError, since: float) -> bool:
        self._tries -= 1
        return self._tries >= 0


def with_retries(work: Callable[[], T], policy: RetryPolicy, activity: OriginActivity) -> T:
    """Return what `work` returns in the end."""
    for attempt in attempts(policy, Cancellation(), LoadStats(), activity):
        with attempt:
            result = work()
    return result


def refused(status: int = 429) -> ndcache.NdcacheError:
    kind = ndcache.RateLimitedError if status == 429 else ndcache.ServerError
    return kind("too many", status=status)


def test_row_49_refusals_are_not_counted_while_others_are_served() -> None:
    errors = [refused() for _ in range(20)]

    def attempt() -> str:
        if errors:
            raise errors.pop()
        return "value"

    assert with_retries(attempt, QUICK, ActiveFor(20)) == "value"


@pytest.mark.parametrize("served", [0, 5, 50])
def test_row_49_refusals_are_counted_once_nobody_is_served(served: int) -> None:
    calls = []

    def attempt() -> None:
        calls.append(1)
        raise refused(503)

    with pytest.raises(ndcache.ServerError):
        with_retries(attempt, QUICK, ActiveFor(served))
    assert len(calls) == served + 1 + QUICK.retries - (served > 0)


def test_refusals_are_not_tried_again_without_retries() -> None:
    calls = []

    def attempt() -> None:
        calls.append(1)
        raise refused()

    with pytest.raises(ndcache.RateLimitedError):
        with_retries(attempt, RetryPolicy(retries=0), ActiveFor(1))
    assert len(calls) == 1
