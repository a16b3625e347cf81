"""Cancelling all threads of a load."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import ndcache
from ndcache.workers.cancellation import Cancellation
from ndcache.workers.stall import StallWatch


def test_row_36_the_callers_event_cancels() -> None:
    cancel = threading.Event()
    cancellation = Cancellation(cancel)
    cancellation.check()
    cancel.set()
    with pytest.raises(ndcache.CancelledError):
        cancellation.sleep(1000)


def test_row_36_cancelling_wakes_sleepers() -> None:
    cancellation = Cancellation()
    with ThreadPoolExecutor(1) as pool:
        futures = [pool.submit(cancellation.sleep, seconds) for seconds in (1000, 1e30, float("inf"))]
        cancellation.set()
        for future in futures:
            with pytest.raises(ndcache.CancelledError):
                future.result(30)


def test_row_36_cancelling_wakes_requests_and_later_ones_at_once() -> None:
    cancellation = Cancellation()
    ended: list[str] = []
    before, forgotten, after = (
        StallWatch(60, [functools.partial(ended.append, name)]) for name in ("before", "forgotten", "after")
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


def test_row_36_a_waker_added_after_cancelling_is_called_at_once() -> None:
    cancellation, watch, ended = Cancellation(), StallWatch(60), []
    cancellation.add(watch)
    cancellation.set()  # the request's connection is still being made
    watch.add_waker(lambda: ended.append(True))
    assert ended == [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_row_37_a_forked_process_does_not_cancel_its_parents_load() -> None:
    script = """
import functools
import os
from ndcache.workers import cancellation, stall, threads
ended = []
one = cancellation.Cancellation()
one.add(stall.StallWatch(60, [lambda: ended.append("shut")]))
with one._lock:  # as if a thread held it just then
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


def test_row_63_loads_may_begin_while_python_cancels_abandoned_ones() -> None:
    script = """
import sys
import threading
from ndcache.workers import cancellation
has_ended = threading.Event()
def begin_loads():
    while not has_ended.is_set():
        loads = [cancellation.Cancellation() for _ in range(100)]
threads = [threading.Thread(target=begin_loads) for _ in range(2)]
for thread in threads:
    thread.start()
sys.setswitchinterval(1e-6)
try:
    for _ in range(500):
        cancellation._cancel_abandoned()
finally:
    has_ended.set()
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)
