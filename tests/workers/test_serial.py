"""Serial queues: order, closing and cancelling."""

from __future__ import annotations

import _thread
import threading

import pytest

import ndcache
from ndcache.workers.serial import SerialQueue


def test_tasks_run_one_after_the_other_in_the_serving_thread() -> None:
    queue = SerialQueue(has_thread=True)
    thread = threading.Thread(target=queue.serve)

    def task(index: int) -> tuple[int, threading.Thread]:
        return index, threading.current_thread()

    tasks = [queue.submit(task, index) for index in range(3)]
    thread.start()
    assert [each.result() for each in tasks] == [(index, thread) for index in range(3)]
    queue.close()
    thread.join(30)
    assert not thread.is_alive()


def test_errors_are_those_of_the_task() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        SerialQueue(has_thread=False).submit(fail).result()


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_wait_leaves_the_result_to_others() -> None:
    # Ctrl-C in `Future.result` could leave the future's lock locked, and then closing a GPU would wait for ever.
    queue, release = SerialQueue(has_thread=True), threading.Event()
    task = queue.submit(release.wait)
    thread = threading.Thread(target=queue.serve)
    thread.start()
    interrupter = threading.Thread(target=_thread.interrupt_main)
    with pytest.raises(KeyboardInterrupt):
        interrupter.start()
        task.result()
    interrupter.join()
    assert not task.is_done
    release.set()
    assert task.result()
    assert task.is_done
    queue.close()
    thread.join(30)


def test_cancelled_tasks_never_run() -> None:
    queue = SerialQueue(has_thread=True)
    task = queue.submit(lambda: 1)
    queue.cancel()
    with pytest.raises(ndcache.CancelledError):
        task.result()


def test_row_63_a_task_submitted_to_a_closed_queue_runs_at_once() -> None:
    queue = SerialQueue(has_thread=True)
    first = queue.submit(lambda: 1)
    queue.close()
    assert queue.submit(lambda: 2).result() == 2
    assert first.result() == 1
    queue.cancel()
    assert SerialQueue(has_thread=False).submit(lambda: 3).result() == 3
