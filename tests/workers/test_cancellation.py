"""Stopping everything that one load does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import ndcache
from ndcache.workers import stall
from ndcache.workers.cancellation import Cancellation
from ndcache.workers.stall import StallWatch


def test_row_36_the_callers_event_stops_too() -> None:
    cancel = threading.Event()
    cancellation = Cancellation(cancel)
    cancellation.check()
    cancel.set()
    with pytest.raises(ndcache.CancelledError):
        cancellation.sleep(1000)


def test_row_36_sleepers_wake() -> None:
    cancellation = Cancellation()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(cancellation.sleep, 1000)
        cancellation.set()
        with pytest.raises(ndcache.CancelledError):
            future.result(30)


def test_row_36_waits_are_ended_when_it_is_set_and_at_once_afterwards() -> None:
    cancellation = Cancellation()
    ended: list[str] = []
    before, forgotten, after = (
        StallWatch(60, [lambda name=name: ended.append(name)]) for name in ("before", "forgotten", "after")
    )
    cancellation.add(before)
    cancellation.add(forgotten)
    cancellation.remove(forgotten)
    assert ended == []
    cancellation.set()
    assert ended == ["before"]
    cancellation.add(after)
    assert ended == ["before", "after"]
    assert not any(watch.is_stalled for watch in (before, forgotten, after))


def test_row_36_a_waker_that_comes_too_late_is_called_at_once() -> None:
    cancellation, watch, ended = Cancellation(), StallWatch(60), []
    cancellation.add(watch)
    cancellation.set()  # the request's connection is still being made
    watch.add_waker(lambda: ended.append(True))
    assert ended == [True]


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("arrivals", "is_stalled"),
    [
        # Seconds, and bytes that came in them; one look after each.
        ([(9, 0)], False),
        ([(11, 0)], True),
        ([(11, 10 * 1024 - 1)], True),
        ([(11, 10 * 1024)], False),
        ([(5, 10 * 1024), (6, 0)], False),
        ([(5, 10 * 1024), (5, 0), (5, 0)], True),
        ([(1, 1 << 30), *[(0.1, 1)] * 95], False),
        ([(1, 1 << 30), *[(0.1, 1)] * 110], True),  # a fast start does not excuse it for longer
        ([(0.1, 200)] * 300, False),
        ([*[(0.1, 200)] * 300, *[(0.1, 50)] * 110], True),
    ],
)
def test_row_13_a_drip_is_a_wait_in_vain(
    monkeypatch: pytest.MonkeyPatch, arrivals: list[tuple[float, int]], is_stalled: bool
) -> None:
    clock = Clock()
    monkeypatch.setattr(stall, "time", clock)
    ended: list[bool] = []
    watch = StallWatch(10, [lambda: ended.append(True)])
    for seconds, nbytes in arrivals:
        clock.now += seconds
        watch.received(nbytes)
        watch.poll()
    assert watch.is_stalled == is_stalled == bool(ended)


def test_what_is_remembered_of_a_long_wait_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stall, "time", clock)
    watch = StallWatch(10)
    for _ in range(100_000):
        clock.now += 0.01
        watch.received(1 << 20)
        watch.poll()
    assert len(watch._samples) < 30


def test_row_13_time_in_which_the_thread_does_something_else_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stall, "time", clock)
    watch = StallWatch(10)
    watch.is_waiting = False
    clock.now += 60
    watch.poll()
    watch.is_waiting = True
    clock.now += 9
    watch.poll()
    assert not watch.is_stalled
    clock.now += 2
    watch.poll()
    assert watch.is_stalled


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_row_37_a_fork_does_not_stop_what_its_parent_does() -> None:
    script = """
import os
from ndcache.workers import cancellation, stall, threads
ended = []
one = cancellation.Cancellation()
one.add(stall.StallWatch(60, [lambda: ended.append("shut")]))
with one._lock:  # as of a thread that looks just then
    if os.fork() == 0:
        threads._main_thread_ends()
        one.set()
        os._exit(len(ended))
_, status = os.wait()
one.check()
print(os.waitstatus_to_exitcode(status), ended)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[0] == "0 []"
