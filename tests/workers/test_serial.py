"""Serial queues: order, closing and cancelling."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from ndcache.workers.serial import SerialQueue


def test_tasks_run_one_after_the_other_in_the_serving_thread() -> None:
    queue = SerialQueue(has_thread=True)
    thread = threading.Thread(target=queue.serve)

    def task(index: int) -> tuple[int, threading.Thread]:
        return index, threading.current_thread()

    futures = [queue.submit(task, index) for index in range(3)]
    thread.start()
    assert [future.result(30) for future in futures] == [(index, thread) for index in range(3)]
    queue.close()
    thread.join(30)
    assert not thread.is_alive()


def test_errors_are_those_of_the_future() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        SerialQueue(has_thread=False).submit(fail).result(0)


def test_cancelled_tasks_never_run() -> None:
    queue = SerialQueue(has_thread=True)
    future = queue.submit(lambda: 1)
    queue.cancel()
    with pytest.raises(CancelledError):
        future.result(0)


def test_row_63_a_task_submitted_to_a_closed_queue_runs_at_once() -> None:
    queue = SerialQueue(has_thread=True)
    first = queue.submit(lambda: 1)
    queue.close()
    assert queue.submit(lambda: 2).result(0) == 2
    assert first.result(0) == 1
    queue.cancel()
    assert SerialQueue(has_thread=False).submit(lambda: 3).result(0) == 3
