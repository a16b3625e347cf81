"""Progress reports, and exceptions of the caller's own code on their way through a load."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ndcache

from ..helpers import models
from ..helpers.loads import Serve, loading_threads, published, wait_until


def test_reports_are_those_of_web_llm(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=3, shard_bytes=1 << 20)
    server = serve(model)
    reports: list[ndcache.ProgressReport] = []
    threads: set[threading.Thread] = set()

    def callback(report: ndcache.ProgressReport) -> None:
        reports.append(report)
        threads.add(threading.current_thread())

    ndcache.load(server.url, progress=callback)
    assert threads == {threading.current_thread()}
    assert [report.text.partition(" secs")[0].rpartition(",")[0] for report in reports] == [
        "",
        "Fetching param cache[0/3]: 0MB fetched. 0% completed",
        "Fetching param cache[1/3]: 1MB fetched. 33% completed",
        "Fetching param cache[2/3]: 2MB fetched. 66% completed",
        "Fetching param cache[3/3]: 3MB fetched. 100% completed",
    ]
    assert reports[0].text == "Start to fetch params"
    assert [report.progress for report in reports] == [0, 0, 1 / 3, 2 / 3, 1]
    assert not any(report.cache_only for report in reports)

    reports.clear()
    ndcache.load(server.url, progress=callback)
    assert reports[-1].text.startswith("Loading model from cache[3/3]: 3MB loaded. 100% completed, ")
    assert all(report.cache_only for report in reports)


def test_reports_in_between_move_within_a_shard(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=1, shard_bytes=4 << 20)
    reports: list[ndcache.ProgressReport] = []
    ndcache.load(serve(model, rate=4 << 20).url, progress=reports.append, progress_interval=0.1)
    assert [report.shards_done for report in reports if report.is_shard] == [0, 0, 1]
    between = [report for report in reports if not report.is_shard]
    assert any(0 < report.bytes_done < report.bytes_total for report in between)
    assert {report.phase for report in between} == {"fetch"}
    assert [report.bytes_done for report in reports] == sorted(report.bytes_done for report in reports)


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="only Linux tells who holds a lock")
def test_reports_say_which_process_is_waited_for(model: Path, serve: Serve, cache_dir: Path) -> None:
    models.simple_model(model, shards=1)
    server, said = serve(model), list[str]()
    server.gate.clear()

    def callback(report: ndcache.ProgressReport) -> None:
        if report.waiting:
            said.append(report.waiting)
            server.gate.set()

    with subprocess.Popen([sys.executable, "-m", "ndcache", "fetch", server.url, "-q"]) as process:
        wait_until(lambda: bool(server.shard_requests()))
        ndcache.load(server.url, progress=callback, progress_interval=0.1)
        assert process.wait(60) == 0
    assert said[0] == f"waiting for process {process.pid}, which downloads params_shard_0.bin"
    assert len(server.shard_requests()) == 1


KINDS_OF_REPORTS: dict[str, Callable[[ndcache.ProgressReport], bool]] = {
    "start": lambda report: report.phase == "start",
    "none done": lambda report: report.phase != "start" and report.shards_done == 0,
    "some done": lambda report: report.shards_done == 2,
    "all done": lambda report: report.shards_done == 4,
}


@pytest.mark.parametrize("kind", KINDS_OF_REPORTS)
@pytest.mark.parametrize("is_cached", [False, True], ids=["fetched", "cached"])
@pytest.mark.parametrize("raised", [LookupError, ndcache.ConnectError, SystemExit, StopIteration, GeneratorExit])
def test_row_39_an_error_of_a_callback_is_the_one_raised(
    model: Path, serve: Serve, cache_dir: Path, kind: str, is_cached: bool, raised: type[BaseException]
) -> None:
    models.simple_model(model, shards=4)
    error = raised("mine")
    server = serve(model)
    if is_cached:
        ndcache.fetch(server.url)
    told: list[ndcache.ProgressReport] = []

    def callback(report: ndcache.ProgressReport) -> None:
        told.append(report)
        if KINDS_OF_REPORTS[kind](report):
            raise error

    with pytest.raises(type(error)) as caught:
        ndcache.load(server.url, progress=callback, max_workers=1)
    assert caught.value is error
    assert KINDS_OF_REPORTS[kind](told[-1])  # it is told nothing more
    assert told[-1].cache_only == is_cached
    assert not loading_threads()
    assert {f"params_shard_{n}.bin" for n in range(told[-1].shards_done)} <= set(published(cache_dir))


def test_row_39_a_predicate_of_the_callers_that_raises(model: Path, serve: Serve) -> None:
    models.simple_model(model)
    server = serve(model)
    error = LookupError("mine")

    def names(name: str) -> bool:
        raise error

    with pytest.raises(LookupError) as caught:
        ndcache.load(server.url, names=names)
    assert caught.value is error
    assert server.shard_requests() == []


@pytest.mark.parametrize("where", ["progress", "names", "cancel"])
@pytest.mark.parametrize("verb", ["load", "fetch"])
def test_row_39_a_stop_iteration_is_the_exception_raised(model: Path, serve: Serve, where: str, verb: str) -> None:
    models.simple_model(model)
    server, error = serve(model), StopIteration("mine")

    def fail(*_: Any, **__: Any) -> bool:
        raise error

    option: Any = fail
    if where == "cancel":
        option = threading.Event()
        option.is_set = fail
    with pytest.raises(StopIteration) as caught:
        getattr(ndcache, verb)(server.url, **{where: option})
    assert caught.value is error
    assert not loading_threads()


def test_row_39_a_stop_iteration_does_not_end_a_stream_silently(model: Path, serve: Serve) -> None:
    models.simple_model(model)
    error = StopIteration("mine")

    def fail(report: ndcache.ProgressReport) -> None:
        if report.shards_done:
            raise error

    with pytest.raises(RuntimeError) as caught:
        list(ndcache.stream(serve(model).url, progress=fail))
    assert caught.value.__cause__ is error
