"""Progress reports, with their exact texts and order, and the bar."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import sys
import threading
from typing import Any

import pytest

from ndcache import progress
from ndcache.progress import Bar, ProgressReport, Reporter

MIB = 1 << 20
TAIL = " It can take a while when we first visit this page to populate the cache. Later refreshes will become faster."


class Clock:
    """Replace `time` by a clock that the test sets."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def run(sizes: list[int], *, cache_only: bool, clock: Clock | None = None, step: float = 0.0) -> list[ProgressReport]:
    """Return all reports of a successful load."""
    reports: list[ProgressReport] = []
    reporter = Reporter(reports.append, sizes, cache_only=cache_only)
    reporter.start()
    for size in sizes:
        if clock is not None:
            clock.now += step
        reporter.shard_done(size)
    reporter.close()
    return reports


def test_texts_of_a_fetch(clock: Clock) -> None:
    reports = run([32 * MIB] * 3, cache_only=False, clock=clock, step=1.5)
    assert [report.text for report in reports] == [
        "Start to fetch params",
        "Fetching param cache[0/3]: 0MB fetched. 0% completed, 0 secs elapsed." + TAIL,
        "Fetching param cache[1/3]: 32MB fetched. 33% completed, 2 secs elapsed." + TAIL,
        "Fetching param cache[2/3]: 64MB fetched. 66% completed, 3 secs elapsed." + TAIL,
        "Fetching param cache[3/3]: 96MB fetched. 100% completed, 5 secs elapsed." + TAIL,
    ]
    assert [report.phase for report in reports] == ["start", *["fetch"] * 4]
    assert [report.progress for report in reports] == [0.0, 0.0, 1 / 3, 2 / 3, 1.0]


def test_texts_of_a_load_from_cache(clock: Clock) -> None:
    reports = run([MIB, 3 * MIB], cache_only=True, clock=clock, step=0.25)
    assert [report.text for report in reports] == [
        "Start to fetch params",
        "Loading model from cache[0/2]: 0MB loaded. 0% completed, 0 secs elapsed.",
        "Loading model from cache[1/2]: 1MB loaded. 25% completed, 1 secs elapsed.",
        "Loading model from cache[2/2]: 4MB loaded. 100% completed, 1 secs elapsed.",
    ]
    assert [report.phase for report in reports] == ["start", "load", "load", "load"]
    assert all(report.cache_only for report in reports)


@pytest.mark.parametrize(
    ("nbytes", "megabytes"),
    [(0, 0), (1, 1), (MIB - 1, 1), (MIB, 1), (MIB + 1, 2), (10**7, 10), (96 * MIB, 96), ((1 << 60) + 1, (1 << 40) + 1)],
)
def test_megabytes_are_rounded_up(nbytes: int, megabytes: int) -> None:
    assert f": {megabytes}MB loaded." in run([nbytes], cache_only=True)[-1].text


@pytest.mark.parametrize(
    ("first", "total", "percent"),
    [
        (1, 1000, 0),
        (999, 1000, 99),
        (29, 100, 29),  # with floats: 28.999
        (57, 100, 57),
        (1, 3, 33),
        ((1 << 60) - 1, 1 << 60, 99),  # with floats: 100
        (0, 5, 0),
        (5, 5, 100),
    ],
)
def test_percent_is_rounded_down(first: int, total: int, percent: int) -> None:
    report = run([first, total - first], cache_only=True)[2]
    assert f" {percent}% completed" in report.text


@pytest.mark.parametrize(("elapsed", "seconds"), [(0.0, 0), (0.001, 1), (1.0, 1), (1.0001, 2), (59.5, 60)])
def test_seconds_are_rounded_up(clock: Clock, elapsed: float, seconds: int) -> None:
    clock.now = 0.0
    report = run([1], cache_only=True, clock=clock, step=elapsed)[-1]
    assert report.text.endswith(f" {seconds} secs elapsed.")
    assert report.time_elapsed == elapsed


def test_text_and_fields_agree() -> None:
    for report in run([1] * 100, cache_only=True)[1:]:
        assert f" {math.ceil(report.time_elapsed)} secs elapsed." in report.text


@pytest.mark.parametrize("cache_only", [True, False])
@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0], [5, 0], [0, 5], [3, 4, 5], [1] * 24])
def test_order(sizes: list[int], cache_only: bool) -> None:
    reports = run(sizes, cache_only=cache_only)
    positions = [re.search(r"\[(\d+)/(\d+)\]", report.text) for report in reports]
    assert positions[0] is None
    assert [found and found[0] for found in positions[1:]] == [f"[{n}/{len(sizes)}]" for n in range(len(sizes) + 1)]
    assert [report.shards_done for report in reports] == [0, *range(len(sizes) + 1)]
    assert {report.shards_total for report in reports} == {len(sizes)}
    assert {report.bytes_total for report in reports} == {sum(sizes)}
    assert [report.bytes_done for report in reports[1:]] == [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    fractions = [report.progress for report in reports]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.0
    assert fractions[-1] == 1.0
    assert "100% completed" in reports[-1].text
    for report in reports[1:]:
        percent = re.search(r"(\d+)% completed", report.text)
        assert percent is not None
        assert abs(int(percent[1]) - 100 * report.progress) <= 1


def test_empty_shards_count_one_by_one() -> None:
    assert [report.progress for report in run([0, 0], cache_only=False)] == [0.0, 0.0, 0.5, 1.0]
    assert "50% completed" in run([0, 0], cache_only=False)[2].text


def test_rate(clock: Clock) -> None:
    reports = run([100, 300], cache_only=False, clock=clock, step=2.0)
    assert [report.bytes_per_second for report in reports] == [0.0, 0.0, 50.0, 100.0]


def test_reports_are_values() -> None:
    report = run([1], cache_only=True)[0]
    assert dataclasses.replace(report) == report
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.text = ""  # type: ignore[misc]


# --- who is told --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_several_callbacks_in_turn(kind: Any) -> None:
    told: list[str] = []
    callbacks = kind([lambda report: told.append("a"), lambda report: told.append("b")])
    reporter = Reporter(callbacks, [1], cache_only=False)
    reporter.start()
    reporter.shard_done(1)
    assert told == ["a", "b"] * 3


@pytest.mark.parametrize("nothing", [None, False, [], ()])
def test_no_callbacks(nothing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(nothing, [1], cache_only=False)
    reporter.start()
    reporter.tick()
    reporter.shard_done(1)
    reporter.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("wrong", [1, 0, 1.5, "bar", [None], [print, 1], [False], {"a": print}, object()])
def test_objects_that_cannot_be_called_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="progress must be True or callables"):
        Reporter(wrong, [1], cache_only=False)


def test_true_among_callables_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    reporter = Reporter([True, lambda report: seen.append(report.text)], [1], cache_only=False)
    reporter.start()
    reporter.shard_done(1)
    reporter.close()
    assert len(seen) == 3
    assert "1/1 shards" in capsys.readouterr().err


def test_row_39_an_exception_of_a_callback_comes_through() -> None:
    def callback(report: ProgressReport) -> None:
        raise ZeroDivisionError(report.text)

    with pytest.raises(ZeroDivisionError, match="Start to fetch params"):
        Reporter(callback, [1], cache_only=False).start()


# --- the bar ------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(bar: Bar, sizes: list[int], *, cache_only: bool = False) -> None:
    reporter = Reporter(bar, sizes, cache_only=cache_only)
    reporter.start()
    for size in sizes:
        reporter.shard_done(size)
    reporter.close()


def test_true_is_a_bar_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(True, [MIB], cache_only=True)
    reporter.start()
    reporter.shard_done(MIB)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(
        r"loaded 0/1 shards, 0\.0 of 1\.0 MiB, 0%, \d+\.\d s\nloaded 1/1 shards, 1\.0 of 1\.0 MiB, 100%, \d+\.\d s\n",
        err,
    )


def test_lines_without_a_terminal(clock: Clock) -> None:
    file = io.StringIO()
    drive(Bar(file), [MIB // 2] * 40)
    lines = file.getvalue().splitlines()
    assert [re.findall(r"(\d+)%", line) for line in lines] == [[str(percent)] for percent in range(0, 101, 10)]
    assert lines[1] == "fetched 4/40 shards, 2.0 of 20.0 MiB, 10%, 0.0 s"
    assert all("\r" not in line for line in lines)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0], [5, 0], [1, 999]])
def test_the_last_line_reports_the_end(sizes: list[int]) -> None:
    file = io.StringIO()
    drive(Bar(file), sizes)
    assert f"{len(sizes)}/{len(sizes)} shards" in file.getvalue().splitlines()[-1]
    assert "100%" in file.getvalue().splitlines()[-1]


def test_lines_and_texts_have_the_same_percentage() -> None:
    file = io.StringIO()
    drive(Bar(file), [29, 71])
    assert "29%" in file.getvalue()


def test_a_bar_can_be_used_again() -> None:
    file = io.StringIO()
    bar = Bar(file)
    drive(bar, [1] * 10)
    once = re.sub(r"[\d.]+ s", "", file.getvalue())
    drive(bar, [1] * 10)
    assert re.sub(r"[\d.]+ s", "", file.getvalue()) == once * 2


@pytest.mark.parametrize(("cache_only", "verb"), [(True, "Loading"), (False, "Fetching")])
def test_bar_on_a_terminal(cache_only: bool, verb: str) -> None:
    file = Terminal()
    before = threading.active_count()
    drive(Bar(file), [2 * MIB, 2 * MIB], cache_only=cache_only)
    shown = file.getvalue()
    assert f"{verb}:   0%" in shown
    assert f"{verb}: 100%" in shown
    assert "4.00M/4.00M" in shown
    assert "1/2 shards" in shown
    assert "2/2 shards" in shown
    assert shown.endswith("\n")
    assert threading.active_count() == before  # tqdm's monitor thread would stay


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_bar_of_nothing(sizes: list[int]) -> None:
    file = Terminal()
    drive(Bar(file), sizes)
    assert f"{len(sizes)}/{len(sizes)} shards" in file.getvalue()


def test_bar_moves_within_a_shard_and_never_back() -> None:
    file = Terminal()
    received = [0]
    reporter = Reporter(Bar(file), [4 * MIB, 4 * MIB], cache_only=False, received=lambda: received[0])
    reporter.tick()
    assert file.getvalue() == ""  # not before the start
    reporter.start()
    for amount in (MIB, 3 * MIB, 2 * MIB, 99 * MIB):
        received[0] = amount
        reporter.tick()
    reporter.close()
    seen = [float(found) for found in re.findall(r"([\d.]+)M?/8\.00M", file.getvalue())]
    assert {0.0, 1.0, 3.0, 8.0} <= set(seen)
    assert seen == sorted(seen)
    assert max(seen) == 8.0


def test_bar_that_is_cut_short_ends_its_line() -> None:
    file = Terminal()
    reporter = Reporter([Bar(file)], [MIB, MIB], cache_only=False)
    reporter.start()
    reporter.shard_done(MIB)
    reporter.close()
    reporter.close()
    assert "1/2 shards" in file.getvalue()
    assert file.getvalue().endswith("\n")


def test_bar_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    bar = Bar()
    drive(bar, [1, 2])
    assert bar._file is None
