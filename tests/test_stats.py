"""The numbers of a load."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ndcache
from ndcache import stats as module
from ndcache.stats import LoadStats

from .helpers.models import simple_model
from .helpers.servers import FileServer


class Clock:
    """Replace `time` by a clock that the test moves."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def spent(stats: LoadStats) -> dict[str, float]:
    """Return the phases that took any time."""
    return {phase: seconds for phase, seconds in stats.seconds.items() if seconds}


def test_new_stats_are_zero() -> None:
    stats = LoadStats()
    assert (stats.nbytes, stats.network_bytes, stats.cache_bytes, stats.shards, stats.tensors) == (0,) * 5
    assert (stats.requests, stats.retries, stats.peak_bytes_in_flight) == (0,) * 3
    assert stats.gb_per_second == 0.0
    assert spent(stats) == {}
    assert dict(stats.integrity) == {}


def test_stats_share_nothing() -> None:
    one, other = LoadStats(), LoadStats()
    one.shard_done("a.bin", 1, from_cache=True, checked="md5")
    one.seconds["wait"] += 1
    assert other == LoadStats()
    assert one != other


def test_count() -> None:
    stats = LoadStats()
    stats.count(requests=1)
    stats.count(requests=2, retries=1, network_bytes=10)
    assert (stats.requests, stats.retries, stats.network_bytes) == (3, 1, 10)


def test_counting_an_unknown_field_raises() -> None:
    with pytest.raises(AttributeError):
        LoadStats().count(requets=1)


def test_count_from_many_threads() -> None:
    stats = LoadStats()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(16_000):
            pool.submit(stats.count, requests=1, network_bytes=3)
    assert (stats.requests, stats.network_bytes) == (16_000, 48_000)


def test_shards() -> None:
    stats = LoadStats()
    stats.shard_done("a.bin", 10, from_cache=False, checked="md5")
    stats.shard_done("b.bin", 5, from_cache=True, checked="size")
    stats.shard_done("c.bin", 0, from_cache=True, checked="size")
    assert (stats.shards, stats.nbytes, stats.cache_bytes) == (3, 15, 5)
    assert stats.integrity == dataclasses.asdict(stats)["integrity"] == {"md5": 1, "size": 2}
    assert stats.checked == {"a.bin": "md5", "b.bin": "size", "c.bin": "size"}


def test_printed_stats_are_seven_lines() -> None:
    stats = LoadStats(tensors=338, network_bytes=1000 << 20, requests=23, retries=2, resumed_bytes=3 << 20)
    stats.shard_done("a.bin", 1000 << 20, from_cache=False, checked="md5")
    stats.shard_done("b.bin", 24 << 20, from_cache=True, checked="size")
    stats.seconds.update(total=6.2, wait=5.9, place=0.2, manifest=0.0124, network=40.2, hash=3.0, backoff=125.0)
    assert str(stats).splitlines() == [
        "loaded      338 tensors of 2 shards",
        "time        6.2 s, 1.0 GiB, 165.2 MiB/s",
        "network     1,000.0 MiB in 23 requests, 2 of them retries",
        "cache       24.0 MiB, 3.0 MiB from interrupted downloads",
        "checked     1 by md5, 1 by size alone",
        "this thread wait 5.9 s, place 200 ms, manifest 12.4 ms",
        "workers     backoff 2 min 5 s, network 40.2 s, hash 3 s",
    ]
    assert len(str(LoadStats()).splitlines()) == 7


def test_mapped_files_have_no_rate(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    simple_model(tmp_path / "model", shards=2)
    url, times = serve(tmp_path / "model").url, []
    for copies in (False, False, True):
        stats = ndcache.load(url, cache_dir=tmp_path / "cache", copy=copies).stats
        times.append(str(stats).splitlines()[1])
        assert str(pickle.loads(pickle.dumps(stats))) == str(stats)
    assert [line.endswith("B/s") for line in times] == [True, False, True]
    assert times[1].endswith(" ms, 128.0 KiB, mapped")


def test_timed(clock: Clock) -> None:
    stats = LoadStats()
    for seconds in (1.0, 0.5):
        with stats.timed("place"):
            clock.now += seconds
    assert spent(stats) == {"place": 1.5}


def test_the_time_of_a_failing_block_counts(clock: Clock) -> None:
    stats = LoadStats()
    with pytest.raises(ZeroDivisionError), stats.timed("place"):
        clock.now += 2.0
        raise ZeroDivisionError
    assert spent(stats) == {"place": 2.0}


def test_timed_iterator(clock: Clock) -> None:
    def slow() -> Iterator[int]:
        for index in range(3):
            clock.now += 1.0
            yield index
        clock.now += 0.5  # until the iterator ends

    stats = LoadStats()
    seen = []
    for item in stats.timed_iterator("wait", slow()):
        clock.now += 10.0  # time spent with the items does not count
        seen.append(item)
    assert seen == [0, 1, 2]
    assert spent(stats) == {"wait": 3.5}


def test_timed_iterator_takes_any_item() -> None:
    assert list(LoadStats().timed_iterator("wait", iter([None, 0, ()]))) == [None, 0, ()]


def test_timed_iterator_passes_errors_on(clock: Clock) -> None:
    def broken() -> Iterator[int]:
        yield 1
        clock.now += 4.0
        raise ZeroDivisionError

    stats = LoadStats()
    items = stats.timed_iterator("wait", broken())
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert spent(stats) == {"wait": 4.0}


@pytest.mark.parametrize(("nbytes", "seconds", "rate"), [(2 * 10**9, 4.0, 0.5), (0, 1.0, 0.0), (5, 0.0, 0.0)])
def test_rate(nbytes: int, seconds: float, rate: float) -> None:
    stats = LoadStats(nbytes=nbytes)
    stats.seconds["total"] = seconds
    assert stats.gb_per_second == rate


def test_the_rate_changes_nothing() -> None:
    stats = LoadStats()
    assert stats.gb_per_second == 0.0
    assert spent(stats) == {}


def test_stats_can_be_pickled_and_copied() -> None:
    stats = LoadStats(nbytes=3, seconds={"total": 1.5})
    for again in (pickle.loads(pickle.dumps(stats)), copy.deepcopy(stats)):
        assert again == stats
        again.count(nbytes=1)
        assert (again.nbytes, stats.nbytes) == (4, 3)
