"""Slots: how many tasks may run, and releasing them early."""

from __future__ import annotations

import threading

from ndcache.workers.slots import Slots


def test_a_slot_is_free_again_after_its_release() -> None:
    slots, has_slot = Slots(1), threading.Event()
    slots.acquire()

    def wait() -> None:
        slots.acquire()
        has_slot.set()
        slots.release()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not has_slot.is_set()
    slots.release()
    assert has_slot.wait(30)
    thread.join()


def test_only_the_thread_that_holds_a_slot_releases_it() -> None:
    slots = Slots(1)
    slots.acquire()
    thread = threading.Thread(target=slots.release)
    thread.start()
    thread.join()
    assert slots._free.empty()
    slots.release()
    slots.release()
    assert slots._free.qsize() == 1


def test_waking_ends_one_wait_and_gives_no_slot() -> None:
    slots, has_woken = Slots(0), threading.Event()

    def wait() -> None:
        assert not slots.acquire()
        assert not slots.is_held
        has_woken.set()
        slots.release()

    thread = threading.Thread(target=wait)
    thread.start()
    slots.wake()
    assert has_woken.wait(30)
    thread.join()
    assert not slots.acquire(timeout=0.01), "no slot has been added"
    slots.wake()
    slots.add()
    assert [slots.acquire(timeout=30), slots.acquire(timeout=30)] == [False, True]
    assert slots.is_held
