"""Turns: how many workers have one, and when there are more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ndcache.workers import turns as module
from ndcache.workers.turns import Turns


class Clocks:
    """The time, and the time for which the process has used a core."""

    def __init__(self) -> None:
        self.now = self.used = 0.0

    def pass_time(self, seconds: float, load: float) -> None:
        self.now += seconds
        self.used += seconds * load


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """Replace the clocks, so that time passes only when a test says so."""
    clocks = Clocks()
    monkeypatch.setattr(module, "perf_counter", lambda: clocks.now)
    monkeypatch.setattr(module, "process_time", lambda: clocks.used)
    return clocks


@pytest.fixture
def elsewhere() -> Iterator[Callable[[Callable[[], object]], object]]:
    """Return a function that makes a call in another thread, which is the same for all calls."""
    with ThreadPoolExecutor(1) as executor:
        yield lambda call: executor.submit(call).result(30)


def tokens(turns: Turns) -> int:
    """Return how many turns are free."""
    return turns._tokens.qsize()


def test_one_thread_at_a_time_has_a_turn(clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 60)
    turns, inside, most = Turns(8), [0], [0]

    def work() -> None:
        for _ in range(50):
            with turns:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                threading.Event().wait(0)  # lets others run
                inside[0] -= 1

    with ThreadPoolExecutor(8) as executor:
        for future in [executor.submit(work) for _ in range(8)]:
            future.result(60)
    assert most == [1]
    assert tokens(turns) == 1


def test_a_thread_has_one_turn_however_often_it_takes_it(clocks: Clocks) -> None:
    turns = Turns(8)
    turns.release()
    assert tokens(turns) == 1
    turns.take()
    turns.take()
    assert tokens(turns) == 0
    turns.release()
    turns.release()
    assert tokens(turns) == 1


def test_a_thread_that_has_waited_too_long_goes_on_without(
    clocks: Clocks, elsewhere: Callable[[Callable[[], object]], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.01)
    turns = Turns(8)
    elsewhere(turns.take)
    turns.take()
    turns.release()
    assert tokens(turns) == 0
    elsewhere(turns.release)
    assert tokens(turns) == 1


def test_there_are_more_turns_while_the_process_is_idle_and_one_when_it_is_busy(
    clocks: Clocks, elsewhere: Callable[[Callable[[], object]], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.01)
    turns = Turns(6)

    def wait_in_vain(load: float) -> int:
        """Take a turn while another thread has all of them; return how many there are afterwards."""
        with turns:
            elsewhere(turns.take)
            clocks.pass_time(0.1, load)
        elsewhere(turns.release)
        assert tokens(turns) == turns._count
        return turns._count

    assert [wait_in_vain(0.1) for _ in range(2)] == [2, 2]  # the second time, nobody had to wait
    turns._has_waited = True
    assert wait_in_vain(0.1) == 4
    turns._has_waited = True
    assert [wait_in_vain(0.6), turns.wanted] == [4, 4]
    turns._has_waited = True
    assert wait_in_vain(0.1) == 6
    assert [wait_in_vain(1.0) for _ in range(4)] == [4, 2, 1, 1]


def test_an_idle_process_in_which_nobody_waits_has_one_turn(clocks: Clocks) -> None:
    turns = Turns(8)
    for _ in range(20):
        with turns:
            clocks.pass_time(0.1, 0.0)
    assert turns.wanted == tokens(turns) == 1


def test_others_have_the_turn_during_long_pauses(clocks: Clocks) -> None:
    turns = Turns(8)

    def pause(seconds: float) -> int:
        """Return how many turns are free during a pause."""
        with turns, turns.paused():
            clocks.pass_time(seconds, 1.0)
            return tokens(turns)

    assert [pause(0.0), pause(0.01), pause(0.01), pause(0.0), pause(0.0)] == [0, 0, 1, 1, 0]
    assert tokens(turns) == 1


def test_a_turn_follows_a_pause(clocks: Clocks) -> None:
    turns = Turns(8)
    with turns.paused():
        assert tokens(turns) == 1
    assert tokens(turns) == 0
    turns.release()
