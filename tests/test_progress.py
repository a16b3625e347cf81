"""Progress reports, with their exact texts and order, and the bar."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tqdm.utils import disp_len

import ndcache
from ndcache.progress import Arrivals, Bar, ProgressReport, Reporter, telling_what_is_kept
from ndcache.progress import arrivals as arrivals_module
from ndcache.progress import reporter as module
from ndcache.progress.lines import bar_line

from .helpers.models import simple_model
from .helpers.servers import FileServer

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
    monkeypatch.setattr(module, "time", found)
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
    reporter.close(is_done=True)
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
    reporter.close(is_done=True)
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
    reporter.close(is_done=True)
    assert len(seen) == 3
    assert "in 1 shard" in capsys.readouterr().err


def test_row_39_an_exception_of_a_callback_comes_through() -> None:
    def callback(report: ProgressReport) -> None:
        raise ZeroDivisionError(report.text)

    with pytest.raises(ZeroDivisionError, match="Start to fetch params"):
        Reporter(callback, [1], cache_only=False).start()


# --- the bar ------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(bar: Any, sizes: list[int], *, cache_only: bool = False) -> None:
    reporter = Reporter(bar, sizes, cache_only=cache_only)
    reporter.start()
    for size in sizes:
        reporter.shard_done(size)
    reporter.close(is_done=True)


def test_true_is_a_bar_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(True, [MIB], cache_only=True, model="host/a/model", how=lambda: "Mapped")
    reporter.start()
    reporter.shard_done(MIB)
    reporter.close(is_done=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"Mapped model: 1\.0 MiB in 1 shard, [\w. ]+\n", err)


@pytest.mark.parametrize("name", ["NDCACHE_NO_PROGRESS", "HF_HUB_DISABLE_PROGRESS_BARS"])
@pytest.mark.parametrize(("value", "is_shown"), [("1", False), ("true", False), ("0", True), ("", True)])
def test_bars_are_disabled_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str, is_shown: bool
) -> None:
    monkeypatch.setenv(name, value)
    drive([True], [MIB])
    assert bool(capsys.readouterr().err) == is_shown


def test_lines_without_a_terminal(clock: Clock) -> None:
    file = io.StringIO()
    drive(Bar(file), [MIB // 2] * 40)
    lines = file.getvalue().splitlines()
    assert [re.findall(r"(\d+)%", line) for line in lines[:-1]] == [[str(percent)] for percent in range(0, 100, 10)]
    assert lines[1] == "Fetching model: 10% of 20.0 MiB, 4/40 shards"
    assert lines[-1].startswith("Fetched model: 20.0 MiB in 40 shards, ")
    assert all("\r" not in line for line in lines)


def test_lines_move_within_a_shard_and_with_time(clock: Clock) -> None:
    file, here = io.StringIO(), [0]
    arrivals = Arrivals()
    arrivals.expect({"a": 100 * MIB})
    arrivals.begin("a", lambda: here[0])
    reporter = Reporter(Bar(file), [100 * MIB], cache_only=False, arrivals=arrivals, received=lambda: here[0])
    reporter.start()
    for megabytes, seconds in ((1, 1), (2, 4), (3, 4), (14, 1), (15, 1)):
        here[0] = megabytes * MIB
        clock.now += seconds
        reporter.tick()
    lines = file.getvalue().splitlines()
    assert [line.split("%")[0].split()[-1] for line in lines] == ["0", "2", "14"]
    assert lines[1] == "Fetching model: 2% of 100.0 MiB, 0/1 shard, 409.6 KiB/s, 4:05 left"


@pytest.mark.parametrize("sizes", [[], [0], [0, 0], [5, 0], [1, 999]])
def test_the_last_line_reports_the_end(sizes: list[int]) -> None:
    file = io.StringIO()
    drive(Bar(file), sizes)
    count = f"{len(sizes)} shard{'' if len(sizes) == 1 else 's'}"
    assert f"Fetched model: {sum(sizes)} B in {count}" in file.getvalue().splitlines()[-1]


def test_a_bar_can_be_used_again() -> None:
    file = io.StringIO()
    bar = Bar(file)
    drive(bar, [1] * 10)
    once = [line.split(",")[0] for line in file.getvalue().splitlines()]
    drive(bar, [1] * 10)
    assert [line.split(",")[0] for line in file.getvalue().splitlines()] == once * 2


def test_bar_on_a_terminal() -> None:
    file = Terminal()
    before = threading.active_count()
    drive(Bar(file), [2 * MIB, 2 * MIB])
    shown = file.getvalue()
    assert "model   0% |" in shown
    assert "2.0/4.0 MiB" in shown
    assert "1/2 shards" in shown
    assert shown.rstrip("\n").rpartition("\r")[2].startswith("Fetched model: 4.0 MiB in 2 shards")
    assert shown.endswith("\n")
    assert threading.active_count() == before  # tqdm's monitor thread would stay


def test_a_load_from_cache_is_one_line(clock: Clock) -> None:
    file = Terminal()
    drive(Bar(file), [2 * MIB, 2 * MIB], cache_only=True)
    assert file.getvalue().count("model") == 1


def test_lines_on_a_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    drive(Bar(file), [2 * MIB])
    assert "\r" not in file.getvalue()


@pytest.mark.parametrize("columns", [20, 40, 80, 120])
@pytest.mark.parametrize("name", ["m", "Llama-3-8B-Instruct-q4f16_1-MLC-and-more", "模型" * 20])
@pytest.mark.parametrize("waiting", [None, "waiting for process 1234, which downloads params_shard_3.bin"])
def test_bars_fit(columns: int, name: str, waiting: str | None) -> None:
    report = dataclasses.replace(run([MIB] * 3, cache_only=False)[2], model=name, waiting=waiting, seconds_left=4000.0)
    report = dataclasses.replace(report, bytes_per_second=MIB / 3)
    line = bar_line(report, columns, lambda fraction, width: "#" * width, "..")
    assert disp_len(line) <= columns
    assert ("waiting" in line) == (waiting is not None or columns < 0) or columns == 20
    if columns >= 80 and waiting is None:
        assert "1:06:40 left" in line
        assert " 33% |" in line


LONG_NAME = "Llama-3-8B-Instruct-q4f16_1-MLC"


@pytest.mark.parametrize(
    ("columns", "name", "has_shards"),
    [
        (40, "Llama-3…_1-MLC", False),
        (80, "Llama-3-8B-I…q4f16_1-MLC", False),
        (120, LONG_NAME, True),
    ],
)
def test_the_name_gets_the_room_that_there_is(columns: int, name: str, has_shards: bool) -> None:
    report = dataclasses.replace(
        run([MIB] * 3, cache_only=False)[2],
        model=LONG_NAME,
        bytes_done=64 * MIB,
        bytes_total=128 * MIB,
        bytes_per_second=100 * MIB,
        seconds_left=26.0,
    )
    line = bar_line(report, columns, lambda fraction, width: "#" * width, "…")
    assert line.startswith(f"{name}  50% |####")
    assert disp_len(line) == columns
    assert ("shards" in line) == has_shards
    earlier = bar_line(dataclasses.replace(report, bytes_done=MIB), columns, lambda fraction, width: "", "…")
    assert earlier.startswith(f"{name}   0% |")  # the name does not move when the amount grows


def test_the_name_gives_way_to_the_reason_of_a_pause() -> None:
    report = dataclasses.replace(run([MIB] * 3, cache_only=False)[2], model=LONG_NAME)
    reasons = {"the server limits requests": LONG_NAME, "x" * 61: "Llama-…1-MLC"}
    for reason, name in reasons.items():
        line = bar_line(dataclasses.replace(report, waiting=reason), 80, lambda fraction, width: "", "…")
        assert line == f"{name}  33%  {reason}"


def test_two_bars_have_two_names() -> None:
    first, second, third = (io.StringIO() for _ in range(3))
    reporters = [
        Reporter(Bar(file), [1], cache_only=False, model=model)
        for file, model in ((first, "host/a/model"), (second, "host/b/model"), (third, "host/b/model"))
    ]
    for reporter in reporters:
        reporter.start()
        reporter.shard_done(1)
    for reporter in reporters:
        reporter.close(is_done=True)
    assert "Fetched model:" in first.getvalue()
    assert "Fetched b/model:" in second.getvalue()
    assert "Fetched host/b/model:" in third.getvalue()


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_bar_of_nothing(sizes: list[int]) -> None:
    file = Terminal()
    drive(Bar(file), sizes)
    assert f"in {len(sizes)} shard" in file.getvalue()


def test_bar_moves_within_shards_and_never_back(clock: Clock) -> None:
    file, here, arrivals = Terminal(), {"a": 0, "b": 0}, Arrivals()
    arrivals.expect({"a": 4 * MIB, "b": 4 * MIB})
    arrivals.begin("a", lambda: here["a"])
    arrivals.begin("b", lambda: here["b"])
    bar = Bar(file)
    reporter = Reporter(bar, [4 * MIB, 4 * MIB], cache_only=False, arrivals=arrivals)
    reporter.start()
    told = []
    for here["a"], here["b"] in ((MIB, 0), (MIB, MIB), (0, MIB), (99 * MIB, MIB)):
        report = reporter._make(clock.now, is_shard=False, is_exact=False)
        told.append((report.bytes_done // MIB, report.shards_here))
        bar(report)
    arrivals.add("b")
    arrivals.end("b", 4 * MIB)
    report = reporter._make(clock.now, is_shard=False, is_exact=False)
    assert (report.bytes_done, report.shards_here, report.shards_done) == (8 * MIB, 1, 0)
    assert told == [(1, 0), (2, 0), (2, 0), (5, 0)]
    assert "5.0/8.0 MiB" in file.getvalue()
    reporter.close(is_done=False)


def test_the_last_line_has_the_time_of_the_whole_load(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    """The manifest is a part of it, as in the statistics."""
    simple_model(tmp_path / "model", shards=1)
    server, file = serve(tmp_path / "model"), io.StringIO()
    server.gated_manifest = True
    server.gate.clear()
    threading.Timer(0.3, server.gate.set).start()
    stats = ndcache.load(server.url, cache_dir=tmp_path / "cache", progress=[Bar(file)]).stats
    found = re.search(r"1 shard, ([\d.]+) (ms|s), ", file.getvalue().strip())
    assert found is not None
    seconds = float(found[1]) / {"ms": 1000, "s": 1}[found[2]]
    assert 0.2 < stats.seconds["manifest"] < seconds


def test_bar_that_is_cut_short_ends_its_line(clock: Clock) -> None:
    """It says how much was there, and no longer how fast more came, or when the rest would be there."""
    file = Terminal()
    reporter = Reporter([Bar(file)], [MIB, MIB], cache_only=False)
    reporter.start()
    clock.now += 1
    reporter.shard_done(MIB)
    assert "1.0 MiB/s  0:01 left" in file.getvalue().rpartition("\r")[2]
    reporter.close(is_done=False)
    reporter.close(is_done=False)
    last = file.getvalue().rpartition("\r")[2]
    assert last.endswith(" 1.0/2.0 MiB  1/2 shards\n")


# --- reports in between -------------------------------------------------------------------------------


def test_reports_in_between_never_go_back_and_say_who_is_waited_for(clock: Clock) -> None:
    here, arrivals = {"b": 0}, Arrivals()
    arrivals.expect({"a": 10, "b": 30})
    arrivals.begin("b", lambda: here["b"])
    arrivals.wait("a", lambda: 1234)
    told: list[ProgressReport] = []
    plain: list[ProgressReport] = []
    options: dict[str, Any] = {"cache_only": False, "arrivals": arrivals}
    reporters = [
        Reporter(told.append, [10, 30], interval=2.0, **options),
        Reporter(plain.append, [10, 30], **options),
    ]
    for reporter in reporters:
        reporter.start()
    for seconds, here["b"] in ((1, 10), (1, 20), (1, 25), (1, 25), (1, 25), (1, 25)):
        clock.now += seconds
        for reporter in reporters:
            reporter.tick()
    for reporter in reporters:
        reporter.shard_done(10)
    assert [(report.is_shard, report.bytes_done) for report in told] == [
        (True, 0), (True, 0), (False, 20), (False, 25), (False, 25), (True, 25)
    ]  # fmt: skip
    assert told[4].waiting == "waiting for process 1234, which downloads a"
    assert [report.bytes_done for report in plain] == [0, 0, 10]
    assert not reporters[1].is_heard


def test_what_was_there_does_not_count_for_the_rate(clock: Clock) -> None:
    arrivals, received = Arrivals(), [7]
    arrivals.expect({"a": 1000})
    arrivals.begin("a", lambda: 600 + received[0])
    told: list[ProgressReport] = []
    reporter = Reporter(
        told.append, [1000], cache_only=False, arrivals=arrivals, received=lambda: received[0], interval=1.0
    )
    reporter.start()
    clock.now += 2
    received[0] += 100
    reporter.tick()
    assert told[-1].bytes_done == 707
    assert told[-1].bytes_per_second == 50
    assert told[-1].seconds_left == pytest.approx(293 / 50)


def test_what_other_processes_bring_counts_for_the_rate(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals_module, "time", clock)
    arrivals, received = Arrivals(), [0]
    arrivals.add("there")
    arrivals.expect({"there": 50, "own": 400, "other": 400, "unseen": 100, "linked": 50, "later": 100})
    arrivals.begin("own", lambda: received[0])
    told: list[ProgressReport] = []
    reporter = Reporter(
        told.append, [1000], cache_only=False, arrivals=arrivals, received=lambda: received[0], interval=1.0
    )
    reporter.start()
    arrivals.wait("other", lambda: 1234, 90)  # there before
    for seconds in (1, 2, 3, 4):
        clock.now += 1
        received[0] = 10 * seconds
        arrivals.wait("other", lambda: 1234, 90 + 30 * seconds)
        reporter.tick()
    assert (told[-1].bytes_done, told[-1].bytes_per_second) == (50 + 40 + 210, (40 + 120) / 4)
    assert told[-1].seconds_left == pytest.approx((1000 - 300) / (160 / 4))
    arrivals.add("other")
    arrivals.add("unseen")
    arrivals.end("linked", 50)
    arrivals.add("linked")
    assert arrivals.brought == 400 - 90 + 100
    clock.now += 10
    arrivals.wait("later", lambda: 1234, 60)
    assert arrivals.brought == 400 - 90 + 100 + 60  # that download has begun since


def test_what_helper_processes_receive_counts_once() -> None:
    arrivals = Arrivals()
    arrivals.expect({"a": 100, "b": 100})
    arrivals.wait("a", lambda: 1234, 10)
    arrivals.wait("a", lambda: 1234, 30)
    assert (arrivals.nbytes, arrivals.brought) == (30, 20)
    arrivals.note_helper("helper", {"a": 40}, [], (True, "the server limits requests"))
    assert (arrivals.nbytes, arrivals.brought) == (40, 0)  # it counts among the load's own
    assert arrivals.waiting == "the server limits requests"
    arrivals.note_helper("helper", {}, ["a"], None)
    assert (arrivals.nbytes, arrivals.brought, arrivals.names) == (100, 0, ["a"])
    assert arrivals.waiting is None


def test_an_interrupt_says_what_is_kept() -> None:
    arrivals = Arrivals()
    arrivals.expect({"a": 128 * MIB, "b": 1 << 30, "c": MIB})
    arrivals.add("a")
    arrivals.begin("b", lambda: 5)
    arrivals.end("b", 64 * MIB)
    with pytest.raises(KeyboardInterrupt) as caught, telling_what_is_kept(arrivals, lambda: True):
        raise KeyboardInterrupt
    assert str(caught.value) == "192 MiB kept; run it again to go on"
    with pytest.raises(KeyboardInterrupt) as caught, telling_what_is_kept(arrivals, lambda: False):
        raise KeyboardInterrupt
    assert not caught.value.args


def test_the_last_line_of_a_check_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simple_model(tmp_path / "model", shards=4)
    (tmp_path / "model" / "params_shard_1.bin").unlink()
    (tmp_path / "model" / "params_shard_2.bin").write_bytes(b"bad")
    report = ndcache.verify(tmp_path / "model", progress=True)
    assert (len(report.bad), len(report.missing)) == (1, 1)
    assert re.match(r"Checked model: [\d.]+ KiB in 3 of 4 shards, ", capsys.readouterr().err)


def test_bar_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    bar = Bar()
    drive(bar, [1, 2])
    assert bar._file is None
