"""Stopping everything that one load does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import ndcache
from ndcache.stop import Stop


def test_the_callers_event_stops_too() -> None:
    cancel = threading.Event()
    stop = Stop(cancel)
    stop.check()
    cancel.set()
    with pytest.raises(ndcache.CancelledError):
        stop.sleep(1000)


def test_sleepers_wake() -> None:
    stop = Stop()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(stop.sleep, 1000)
        stop.set()
        with pytest.raises(ndcache.CancelledError):
            future.result(30)


def test_what_is_watched_is_called_once_it_is_set_and_at_once_afterwards() -> None:
    stop = Stop()
    called: list[str] = []
    forgotten = lambda: called.append("forgotten")  # noqa: E731 - it must be the same object twice
    stop.watch(lambda: called.append("before"))
    stop.watch(forgotten)
    stop.forget(forgotten)
    assert called == []
    stop.set()
    assert called == ["before"]
    stop.watch(lambda: called.append("after"))
    assert called == ["before", "after"]
