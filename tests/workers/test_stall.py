"""Detecting stalled requests, with a clock that the tests set."""

from __future__ import annotations

import pytest

from ndcache.workers import stall
from ndcache.workers.stall import StallWatch


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("arrivals", "is_stalled"),
    [
        # Seconds, and the bytes that came in them; one poll after each.
        ([(9, 0)], False),
        ([(11, 0)], True),
        ([(11, 10 * 1024 - 1)], True),
        ([(11, 10 * 1024)], False),
        ([(5, 10 * 1024), (6, 0)], False),
        ([(5, 10 * 1024), (5, 0), (5, 0)], True),
        ([(1, 1 << 30), *[(0.1, 1)] * 95], False),
        ([(1, 1 << 30), *[(0.1, 1)] * 110], True),  # a fast start helps no longer
        ([(0.1, 200)] * 300, False),
        ([*[(0.1, 200)] * 300, *[(0.1, 50)] * 110], True),
    ],
)
def test_row_13_a_request_that_only_drips_has_stalled(
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


def test_the_samples_of_a_long_request_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stall, "time", clock)
    watch = StallWatch(10)
    for _ in range(100_000):
        clock.now += 0.01
        watch.received(1 << 20)
        watch.poll()
    assert len(watch._samples) < 30


def test_row_13_time_spent_elsewhere_does_not_count_as_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
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
