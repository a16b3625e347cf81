"""Retries: which errors are tried again, how often, and after how long."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import pytest

import ndcache
from ndcache.http.limits.rate_limits import OriginActivity
from ndcache.http.retry import RetryPolicy, attempts
from ndcache.stats import LoadStats
from ndcache.workers.cancellation import Cancellation

T = TypeVar("T")


def rate_limited(retry_after: float | None) -> ndcache.RateLimitedError:
    error = ndcache.RateLimitedError("later")
    error.retry_after = retry_after
    return error


@pytest.mark.parametrize(
    ("error", "failures", "spent", "lowest", "highest"),
    [
        (ndcache.ConnectError("x"), 1, 0, 0, 0.5),
        (ndcache.ConnectError("x"), 3, 0, 0, 2.0),
        (ndcache.ConnectError("x"), 6, 0, 0, 16.0),
        (rate_limited(7), 1, 0, 7, 7),
        (rate_limited(300), 1, 0, 300, 300),
        (rate_limited(None), 1, 0, 0, 0.5),
        (ndcache.ChecksumError("x"), 1, 0, 0, 0.5),
    ],
)
def test_errors_that_are_tried_again(
    error: ndcache.NdcacheError, failures: int, spent: float, lowest: float, highest: float
) -> None:
    for _ in range(100):
        delay = RetryPolicy().delay(error, failures, failures, spent)
        assert delay is not None
        assert lowest <= delay <= highest


@pytest.mark.parametrize(
    ("error", "failures", "spent"),
    [
        (ndcache.ConnectError("x"), 7, 0),
        (ndcache.ConnectError("x"), 1, 301),
        (ndcache.ChecksumError("x"), 2, 0),
        (ndcache.RemoteChangedError("x"), 1, 0),
        (ndcache.NotFoundError("x"), 1, 0),
        (ndcache.TLSError("x"), 1, 0),
        (ndcache.DiskFullError("x"), 1, 0),
        (rate_limited(301), 1, 0),
        (rate_limited(1e30), 1, 0),
    ],
)
def test_errors_that_are_not_tried_again(error: ndcache.NdcacheError, failures: int, spent: float) -> None:
    assert RetryPolicy().delay(error, failures, failures, spent) is None


class Flaky:
    """Work that fails some times, then returns a value."""

    def __init__(self, *errors: ndcache.NdcacheError) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "value"


QUICK = RetryPolicy(retries=3, backoff=0.0001)


def with_retries(
    work: Callable[[], T],
    policy: RetryPolicy = QUICK,
    *,
    cancellation: Cancellation | None = None,
    stats: LoadStats | None = None,
    progress: Callable[[], int] = lambda: 0,
) -> T:
    """Return what `work` returns in the end."""
    for attempt in attempts(policy, cancellation or Cancellation(), stats or LoadStats(), OriginActivity(), progress):
        with attempt:
            result = work()
    return result


def test_work_that_succeeds_after_some_failures() -> None:
    flaky, stats = Flaky(ndcache.ServerError("1"), ndcache.ConnectError("2")), LoadStats()
    assert with_retries(flaky, stats=stats) == "value"
    assert (flaky.calls, stats.retries) == (3, 2)


def test_the_last_error_says_how_often_it_was_tried() -> None:
    flaky = Flaky(*[ndcache.ServerError("failed") for _ in range(9)])
    with pytest.raises(ndcache.ServerError, match="after 4 tries") as caught:
        with_retries(flaky)
    assert (flaky.calls, caught.value.attempts) == (4, 4)


def test_after_progress_the_count_starts_afresh() -> None:
    """Seven failures, never more than three without a MiB of progress between them, with three retries allowed."""
    nbytes = 0

    def attempt() -> None:
        nonlocal nbytes
        nbytes += 400_000
        raise ndcache.ConnectError("broken")

    with pytest.raises(ndcache.ConnectError, match="after 4 tries"):
        with_retries(attempt, progress=lambda: 0)
    nbytes = 0
    with pytest.raises(ndcache.ConnectError) as caught:
        with_retries(attempt, progress=lambda: min(nbytes, 3_600_000))
    assert caught.value.attempts == 12  # at 1.2, 2.4 and 3.6 MB it starts afresh, and three more are allowed
    assert nbytes == 400_000 * 12


def test_progress_does_not_renew_the_single_retry() -> None:
    nbytes, calls = 0, 0

    def attempt() -> None:
        nonlocal nbytes, calls
        nbytes, calls = nbytes + (5 << 20), calls + 1
        raise ndcache.ChecksumError("wrong")

    with pytest.raises(ndcache.ChecksumError):
        with_retries(attempt, progress=lambda: nbytes)
    assert calls == 2


def test_each_kind_has_its_one_more_try() -> None:
    flaky = Flaky(ndcache.RangeError("1"), ndcache.ChecksumError("2"), ndcache.ConnectError("3"))
    assert with_retries(flaky) == "value"


def test_no_retries_means_none() -> None:
    flaky = Flaky(ndcache.RangeError("1"))
    with pytest.raises(ndcache.RangeError):
        with_retries(flaky, RetryPolicy(retries=0))


def test_an_error_that_is_not_ours_is_not_tried_again() -> None:
    calls = []

    def attempt() -> None:
        calls.append(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        with_retries(attempt)
    assert len(calls) == 1


def test_row_36_stopping_ends_the_wait_for_the_next_try() -> None:
    cancel = threading.Event()

    def attempt() -> None:
        cancel.set()
        raise rate_limited(200)

    with pytest.raises(ndcache.CancelledError):
        with_retries(attempt, cancellation=Cancellation(cancel))


def test_row_67_a_long_wait_shows_that_the_worker_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    slept, signs, calls = list[float](), list[float](), list[int]()
    monkeypatch.setattr(Cancellation, "sleep", lambda self, seconds: slept.append(seconds))
    policy = RetryPolicy(retries=1)
    waiting = functools.partial(signs.append, 1.0)
    for attempt in attempts(policy, Cancellation(), LoadStats(), OriginActivity(), waiting=waiting):
        with attempt:
            calls.append(1)
            if len(calls) == 1:
                raise rate_limited(25)
    assert sum(slept) == 25
    assert max(slept) <= 10
    assert len(signs) == 2


def test_no_frame_of_the_retries_is_on_the_stack_of_the_work() -> None:
    for attempt in attempts(QUICK, Cancellation(), LoadStats(), OriginActivity()):
        with attempt:
            frame = sys._getframe()
            assert frame.f_back is not None
            assert "ndcache/http" not in frame.f_back.f_code.co_filename
            break


def test_an_error_that_is_tried_again_is_not_kept() -> None:
    seen: list[weakref.ref[ndcache.ServerError]] = []
    for attempt in attempts(QUICK, Cancellation(), LoadStats(), OriginActivity()):
        with attempt:
            assert all(reference() is None for reference in seen)
            if len(seen) < 2:
                error = ndcache.ServerError("failed")
                seen.append(weakref.ref(error))
                try:
                    raise error
                finally:
                    del error
    assert len(seen) == 2
