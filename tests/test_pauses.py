"""What bars say while nothing comes, and bars of several processes on one terminal."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest

import ndcache
from ndcache.http.limits.rate_limits import OriginActivity, RateLimits
from ndcache.http.retry import RetryPolicy, attempts
from ndcache.progress import Arrivals, Bar, Opening, ProgressCallback, ProgressReport, Reporter
from ndcache.progress import opening as opening_module
from ndcache.progress import reporter as reporter_module
from ndcache.progress.lines import bar_parts
from ndcache.progress.rate import Rate
from ndcache.stats import LoadStats
from ndcache.workers.cancellation import Cancellation

from .helpers.models import simple_model
from .helpers.servers import ConnectionLimit

URL = "https://host:8443/model/params_shard_0.bin"
MIB = 1 << 20
_ROOT = Path(__file__).parent.parent


def refused(seconds: float | None) -> ndcache.RateLimitedError:
    error = ndcache.RateLimitedError("too many requests", url=URL, status=429)
    error.retry_after = seconds
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (refused(30.0), "the server asks us to wait 30 s"),
        (refused(None), "the server limits requests"),
        (ndcache.ConnectError("refused", url=URL), "reconnecting to host:8443, attempt 2"),
        (ndcache.TruncatedError("short", url=URL), "reconnecting to host:8443, attempt 2"),
        (ndcache.ServerError("down", url=URL, status=502), "host:8443 answered with status 502, attempt 2"),
    ],
)
def test_an_attempt_says_why_there_is_another_one(error: ndcache.NdcacheError, reason: str) -> None:
    arrivals, seen = Arrivals(), []

    class Pausing(Cancellation):
        def sleep(self, seconds: float) -> None:
            seen.append(arrivals.waiting)

    tries = 0
    for attempt in attempts(RetryPolicy(), Pausing(), LoadStats(), OriginActivity(RateLimits()), arrivals=arrivals):
        with attempt:
            tries += 1
            if tries == 1:
                raise error
            assert arrivals.waiting == reason  # until something comes
    assert seen == [reason]
    assert arrivals.waiting is None


def test_a_pause_is_more_important_than_another_process() -> None:
    arrivals = Arrivals()
    arrivals.pause("other", "reconnecting to host, attempt 2", is_wanted=False)
    arrivals.pause("key", "the server asks us to wait 30 s", is_wanted=True)
    arrivals.wait("a", lambda: 1234)
    assert arrivals.waiting == "the server asks us to wait 30 s"
    arrivals.go_on("key")
    assert arrivals.waiting == "reconnecting to host, attempt 2"
    arrivals.go_on("other")
    assert arrivals.waiting == "waiting for process 1234, which downloads a"


@pytest.mark.once
def test_a_load_says_that_the_server_makes_it_wait(tmp_path: Path, serve: Any) -> None:
    simple_model(tmp_path / "model", shards=2)
    server = serve(tmp_path / "model", limit=ConnectionLimit(0, status=429, headers={"Retry-After": "2"}))
    told = set()

    def listen(report: ProgressReport) -> None:
        told.add(report.waiting)
        if report.waiting:
            server.limit = None

    ndcache.load(server.url, progress=listen, progress_interval=0.1)
    assert "the server asks us to wait 2 s" in told


def test_a_bar_in_a_notebook_says_why_nothing_comes() -> None:
    report = ProgressReport(0.5, 1.0, False, "", "fetch", 1, 2, MIB, 2 * MIB, MIB, model="model")
    assert bar_parts(report) == ("model  50%", "1.0/2.0 MiB  1.0 MiB/s  0/2 shards")
    waiting = dataclasses.replace(report, waiting="the server limits requests")
    assert bar_parts(waiting) == ("model  50%", "the server limits requests")


def test_a_long_name_leaves_room_for_a_bar_in_a_notebook() -> None:
    model = "Llama-3.2-11B-Vision-Instruct-abliterated-q4f16_1-MLC"
    report = ProgressReport(0.5, 1.0, False, "", "fetch", 1, 2, MIB, 2 * MIB, MIB, model=model)
    assert bar_parts(report)[0] == "Llama-3.2-11B-Vi…ted-q4f16_1-MLC  50%"


def test_a_rate_begins_again_after_a_pause() -> None:
    rate = Rate(0.0, 0)
    for second in range(1, 10):
        rate.add(second, 100)
    rate.add(10.0, 300)
    assert rate.per_second == 30
    rate.restart()
    assert rate.per_second == 200


# --- on a terminal ------------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[tuple[TextIO, int]]:
    """Open a pseudo-terminal."""
    leader, follower = os.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as file:
        yield file, leader
    os.close(leader)


def read(file: TextIO, leader: int) -> str:
    """Return what was written to a terminal."""
    file.write("END")
    file.flush()
    shown = b""
    while not shown.endswith(b"END"):
        shown += os.read(leader, 1 << 16)
    return shown.decode().removesuffix("END")


def drive(bar: Bar) -> Reporter:
    reporter = Reporter(bar, [MIB, MIB], cache_only=False, model="host/model")
    reporter.start()
    reporter.shard_done(MIB)
    return reporter


def test_log_records_appear_above_the_bar(terminal: tuple[TextIO, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
    file, leader = terminal
    reporters = [drive(Bar(file)), drive(Bar(file))]
    logging.getLogger("ndcache").warning("trying again in %d s", 3)
    logging.getLogger("ndcache").info("of no interest")
    for reporter in reporters:
        reporter.close(is_done=True)
    lines = read(file, leader).replace("\r\n", "\n").split("\n")
    above = [line.rpartition("\r")[2].removeprefix("\x1b[A") for line in lines]
    assert above.count("trying again in 3 s") == 1
    assert "of no interest" not in "".join(lines)
    assert not logging.getLogger("ndcache").handlers


def test_handlers_of_the_application_get_log_records_alone(
    terminal: tuple[TextIO, int], caplog: pytest.LogCaptureFixture
) -> None:
    file, leader = terminal
    reporter = drive(Bar(file))
    logging.getLogger("ndcache").warning("trying again")
    reporter.close(is_done=True)
    assert caplog.messages == ["trying again"]
    assert "trying again" not in read(file, leader)


OTHER = """
import sys
from tests.test_pauses import Bar, drive
reporter = drive(Bar())
reporter.shard_done(1 << 20)
reporter.close(is_done=True)
"""


@pytest.mark.once
def test_another_process_prints_lines_below_a_bar(terminal: tuple[TextIO, int]) -> None:
    pytest.importorskip("fcntl")
    file, leader = terminal
    command = [sys.executable, "-c", OTHER]
    shown = []
    for is_mine in (True, False):
        mine = drive(Bar(file)) if is_mine else None
        read(file, leader)
        subprocess.run(command, check=True, cwd=_ROOT, stderr=file, env={**os.environ, "TERM": "xterm"}, timeout=60)
        shown.append(read(file, leader))
        if mine is not None:
            mine.close(is_done=True)
    assert "|" not in shown[0]
    first, *_, last, end = shown[0].split("\r\n")
    assert first == "\r\x1b[KFetching model: 0% of 2.0 MiB, 0/2 shards"
    assert last.startswith("\r\x1b[KFetched model: 2.0 MiB in 2 shards")
    assert not end
    assert "|" in shown[1]


# --- before the manifest is there ---------------------------------------------------------------------


def test_a_bar_says_that_the_manifest_takes_long(tmp_path: Path, serve: Any, terminal: tuple[TextIO, int]) -> None:
    simple_model(tmp_path / "www" / "model", shards=2)
    server, (file, leader), shown = serve(tmp_path / "www"), terminal, b""
    server.gated_manifest = True
    server.gate.clear()
    with ThreadPoolExecutor(1) as executor:
        load = executor.submit(ndcache.fetch, f"{server.url}model", progress=Bar(file))
        while b"Fetched model" not in shown:
            shown += os.read(leader, 1 << 16)
            if b"manifest" in shown:
                server.gate.set()
        load.result()
    first, *others = filter(None, shown.decode().split("\r"))
    assert first == f"model   0%  waiting for {server.url.split('/')[2]}: manifest"
    assert "0/2 shards" in "".join(others)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the time of reports by a list of one number."""
    now = [100.0]
    for module in (opening_module, reporter_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_lines_say_after_five_seconds_that_the_manifest_takes_long(clock: list[float]) -> None:
    file, arrivals = io.StringIO(), Arrivals()
    bars: list[ProgressCallback] = [Bar(file), lambda report: pytest.fail("web-llm reports nothing before the start")]
    opening = Opening(bars, "host/a/model", arrivals)
    for seconds in (1.5, 2.5, 1.5, 4.0, 2.0):
        clock[0] += seconds
        opening.tick()
        arrivals.pause("key", "reconnecting to host, attempt 2", is_wanted=False)
    assert file.getvalue().splitlines() == [
        "Opening model: reconnecting to host, attempt 2",
        "Opening model: reconnecting to host, attempt 2",
    ]
    load = Reporter(bars[:1], [MIB, MIB], cache_only=False, model="host/a/model")
    load.start()
    opening.close()  # the load goes on
    load.shard_done(MIB)
    load.close(is_done=True)
    assert [line.split(":")[0] for line in file.getvalue().splitlines()[2:]] == [
        *["Fetching model"] * 2,
        "Fetched model",
    ]


def test_a_manifest_that_never_comes_leaves_the_bar(clock: list[float], terminal: tuple[TextIO, int]) -> None:
    file, leader = terminal
    for seconds, shown in ((0.5, ""), (1.5, "model   0%  waiting for host: manifest")):
        opening = Opening([Bar(file)], "host/model", Arrivals())
        clock[0] += seconds
        opening.tick()
        opening.close()
        opening.close()
        assert read(file, leader).rstrip().rpartition("\r")[2] == shown
