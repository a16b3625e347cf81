"""Helper processes of a load: what they bring, what is counted, and that no trouble with them fails a load."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests

import ndcache
from ndcache.processes import beside, supervisor
from ndcache.processes.how_many import process_count
from ndcache.report.timeline import read_timeline

from ..helpers import kills, models
from ..helpers.kills import left_behind
from ..helpers.processes import children_of, helpers_of, is_alive
from ..helpers.servers import ConnectionLimit, FileServer
from .children import MIB, Serve, wait_until

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")

SHARDS = 12
NBYTES = SHARDS << 16
#: Ends at once, but leaves a process that holds its pipes open.
ORPHAN = "import subprocess; subprocess.Popen(['sleep', '20'])"


@pytest.fixture
def server(model: Path, serve: Serve) -> FileServer:
    """Return a server with a model of twelve shards."""
    models.simple_model(model, shards=SHARDS)
    return serve(model)


@pytest.fixture(autouse=True)
def _no_process_and_no_pipe_is_left() -> Iterator[None]:
    """Look right after each test: when a load has ended, all its processes have been waited for."""
    processes, pipes = children_of(os.getpid()), open_pipes()
    yield
    assert set(children_of(os.getpid())) <= set(processes)
    assert open_pipes() <= pipes


def open_pipes() -> set[str]:
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return {name for name in found if name.startswith(("pipe:", "anon_inode:"))}


@contextmanager
def held(
    server: FileServer, bodies: int, call: Callable[..., Any], *args: Any, **options: Any
) -> Iterator[Future[Any]]:
    """Run a call in a thread until the server is to send this many bodies at once; let it send after the block."""
    server.gate.clear()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(call, *args, **options)
        try:
            wait_until(lambda: server.peak_bodies >= bodies or future.done())
            yield future
        finally:
            server.gate.set()


def test_processes_share_the_shards(server: FileServer, model: Path, tmp_path: Path) -> None:
    reports: list[ndcache.ProgressReport] = []
    options: dict[str, Any] = {"processes": 3, "max_workers": 2, "progress": reports.append}
    options |= {"token": "secret", "headers": {"X-Key": "secret"}, "trace": tmp_path / "load.json"}
    with held(server, 6, ndcache.load, server.url, **options) as future:
        assert server.peak_bodies == 6  # two of each process, all different
        assert len(helpers_of(os.getpid())) == 2
    with future.result() as weights:
        models.assert_same(weights, models.simple_model(model, shards=SHARDS))
        stats = weights.stats
    assert set(Counter(request.path for request in server.requests).values()) == {1}
    assert len(server.requests) == SHARDS + 1 == stats.requests
    assert {(sent.headers["authorization"], sent.headers["x-key"]) for sent in server.requests} == {
        ("Bearer secret", "secret")
    }
    assert (stats.nbytes, stats.network_bytes, stats.cache_bytes) == (NBYTES, NBYTES, 0)
    assert stats.integrity == {"md5": SHARDS}
    assert stats.seconds["network"] > 0
    assert not reports[0].cache_only
    assert [report.shards_done for report in reports] == [0, *range(SHARDS + 1)]
    # What the helpers do is in the trace, too.
    trace = read_timeline(json.loads((tmp_path / "load.json").read_text()))
    bodies = [event for event in trace.events if event.phase == "network"]
    assert {event.file: event.nbytes for event in bodies} == dict.fromkeys(trace.facts["shards"], NBYTES // SHARDS)
    assert {trace.threads[event.thread].partition(".")[0] for event in bodies} >= {"helper 1", "helper 2"}
    assert all(0 < event.start < event.end <= trace.total for event in bodies)
    assert {origin for _, origin, _ in trace.facts["shards"].values()} == {"network"}
    assert trace.facts["processes"] == 3


def test_the_bar_counts_what_helpers_receive(model: Path, counting: Callable[..., kills.CountingServer]) -> None:
    models.simple_model(model, shards=2, shard_bytes=MIB)
    server, seen = counting(model), set[int]()
    server.holds = {f"/params_shard_{index}.bin": (MIB // 2,) for index in range(2)}
    options: dict[str, Any] = {"processes": 2, "max_workers": 1, "progress_interval": 0.05, "timeout": 300.0}

    def listen(report: ndcache.ProgressReport) -> None:
        seen.add(report.bytes_done)

    with ThreadPoolExecutor(1) as executor:
        try:
            future = executor.submit(lambda: ndcache.load(server.url, progress=listen, **options))
            wait_until(lambda: max(seen, default=0) == MIB)  # half of each
        finally:
            server.go.release(2)
        future.result().close()
    assert max(seen) == 2 * MIB


def test_the_bar_says_why_a_helper_waits(server: FileServer) -> None:
    """This process receives the first shard; its helper asks for the next one, and is refused."""
    told = set[str | None]()
    server.limit = ConnectionLimit(1, status=429, headers={"Retry-After": "2"})
    options: dict[str, Any] = {"progress": lambda report: told.add(report.waiting), "progress_interval": 0.05}
    options["timeout"] = 300.0  # not for this process to make the request again
    with held(server, 1, ndcache.load, server.url, processes=2, max_workers=1, **options) as future:
        wait_until(lambda: "the server asks us to wait 2 s" in told)
    future.result().close()


def test_fetch_and_stream_use_helpers(server: FileServer, cache_dir: Path, tmp_path: Path) -> None:
    with held(server, 4, ndcache.fetch, server.url, processes=2, max_workers=2) as future:
        assert server.peak_bodies == 4
    directory = future.result()
    assert kills.digests(directory) == kills.digests(server.directory)
    assert left_behind(directory) == []

    server.peak_bodies = 0
    options: dict[str, Any] = {"processes": 2, "max_workers": 2, "cache_dir": tmp_path / "other"}
    with held(server, 4, lambda: dict(ndcache.stream(server.url, **options))) as future:
        assert server.peak_bodies == 4
    assert len(future.result()) == SHARDS


@pytest.mark.parametrize(
    "names", ["*.c", {f"{shard}.c": slice(9, None) for shard in range(6)}], ids=["names", "slices"]
)
def test_parts_of_shards_come_through_helpers(server: FileServer, model: Path, names: Any) -> None:
    """As in a load with one process, only the bytes of the wanted tensors are requested."""
    shards = [
        {f"{shard}.{name}": models.random_array((1 << 20,), "uint8", shard) for name in ("a", "b", "c", "d")}
        for shard in range(6)
    ]
    models.write_model(model, shards)
    with held(server, 4, ndcache.load, server.url, names=names, processes=2, max_workers=2) as future:
        assert server.peak_bodies == 4
    weights = future.result()
    first = 0 if isinstance(names, str) else 9
    models.assert_same(weights, {name: shard[name][first:] for shard in shards for name in shard if name.endswith("c")})
    assert weights.stats.network_bytes == weights.stats.nbytes == 6 * ((1 << 20) - first)
    assert all(request.headers["range"] for request in server.shard_requests())


def test_a_manifest_larger_than_a_pipe(server: FileServer, model: Path) -> None:
    shards = [
        {f"{shard}.{number}": models.random_array((4,), "uint8", number) for number in range(800)} for shard in range(8)
    ]
    models.write_model(model, shards)
    assert (model / "tensor-cache.json").stat().st_size > 4 << 16
    secrets = {"token": "secret", "headers": {"X-Key": "secret"}}
    with held(server, 4, ndcache.load, server.url, processes=2, max_workers=2, **secrets) as future:
        assert server.peak_bodies == 4
    assert len(future.result()) == 6400


def test_required_digests_hold_in_helpers(server: FileServer, model: Path) -> None:
    digest = "sha256-" + "A" * 43 + "="
    with pytest.raises(ndcache.ChecksumError, match="params_shard_11"):
        ndcache.load(server.url, integrity={"params_shard_11.bin": digest}, processes=2, retries=0)


def test_mirrors_reach_the_helpers(server: FileServer, serve: Serve, model: Path) -> None:
    bare = serve(model.parent / "bare")
    (model.parent / "bare").mkdir()
    (model.parent / "bare" / "tensor-cache.json").write_bytes((model / "tensor-cache.json").read_bytes())
    with held(server, 4, ndcache.load, bare.url, mirrors=[server.url], processes=2, max_workers=2) as future:
        assert server.peak_bodies == 4
    assert len(future.result()) == SHARDS


# --- when there are none ------------------------------------------------------------------------------


def popen_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    calls: list[list[str]] = []
    start = subprocess.Popen

    def noting(arguments: list[str], **options: Any) -> Any:
        calls.append(arguments)
        return start(arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", noting)
    return calls


@pytest.mark.parametrize("processes", [1, "auto"])
def test_small_models_need_no_helper(server: FileServer, monkeypatch: pytest.MonkeyPatch, processes: Any) -> None:
    calls = popen_calls(monkeypatch)
    ndcache.load(server.url, processes=processes)
    assert calls == []


def test_cached_and_local_models_need_no_helper(
    server: FileServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = ndcache.fetch(server.url)
    calls = popen_calls(monkeypatch)
    for source in (server.url, model, directory):
        ndcache.load(source, processes=4)
    ndcache.load(server.url, processes=4, offline=True)
    (directory / "params_shard_3.bin").unlink()
    ndcache.load(server.url, processes=4)  # one missing shard
    assert calls == []


def test_there_are_no_more_processes_than_missing_shards(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = ndcache.fetch(server.url)
    for number in range(3):
        (directory / f"params_shard_{number}.bin").unlink()
    calls = popen_calls(monkeypatch)
    ndcache.load(server.url, processes=8)
    assert len(calls) == 2


def test_row_72_a_session_is_used_by_one_process(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = popen_calls(monkeypatch)
    with requests.Session() as session, pytest.warns(RuntimeWarning, match="session") as caught:
        ndcache.load(server.url, processes=4, session=session)
    assert [warning.filename for warning in caught] == [__file__]
    assert calls == []


def test_auto_says_nothing_about_a_session(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "process_count", lambda *_: 4)
    calls = popen_calls(monkeypatch)
    with requests.Session() as session:
        ndcache.load(server.url, processes="auto", session=session)
    assert calls == []


@pytest.mark.parametrize("name", ["", None, "/usr/bin/blender", "/bin/false", "relative/python3", "/nowhere/python3"])
def test_row_72_a_program_that_is_no_python_is_never_run(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    calls = popen_calls(monkeypatch)
    monkeypatch.setattr(sys, "executable", name)
    with pytest.warns(RuntimeWarning, match="processes=3 has no effect") as caught:
        assert len(ndcache.load(server.url, processes=3)) == SHARDS
    assert [warning.filename for warning in caught] == [__file__]
    assert calls == []


def test_row_72_a_frozen_program_is_never_run(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = popen_calls(monkeypatch)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.warns(RuntimeWarning, match="frozen"):
        ndcache.load(server.url, processes=3)
    assert calls == []


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
def test_row_72_no_process_can_start(server: FileServer, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.warns(RuntimeWarning, match="1 of 3 processes download") as caught:
        assert len(ndcache.load(server.url, processes=3)) == SHARDS
    assert [warning.filename for warning in caught] == [__file__]


def test_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ndcache.processes.how_many.usable_cores", lambda: 16)
    assert process_count(4, 100, 1) == 4
    assert process_count(4, 2, 1) == 2
    assert process_count(4, 0, 0) == 1
    assert [process_count("auto", 999, gib << 30) for gib in (0, 3, 4, 8, 80)] == [1, 1, 2, 4, 4]


# --- when they fail -----------------------------------------------------------------------------------


def test_row_68_a_helper_that_is_killed_costs_only_its_share(
    server: FileServer, caplog: pytest.LogCaptureFixture
) -> None:
    with held(server, 6, ndcache.load, server.url, processes=3, max_workers=2) as future:
        os.kill(helpers_of(os.getpid())[0], signal.SIGKILL)
        wait_until(lambda: caplog.records)
    weights = future.result()
    assert len(weights) == SHARDS
    assert "SIGKILL" in caplog.text
    assert len(caplog.records) == 1
    assert len(server.shard_requests()) == SHARDS + 2  # the two that it had begun


def test_row_68_a_helper_that_is_stopped_is_killed(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "_PATIENCE", 1.0)
    with held(server, 4, ndcache.load, server.url, processes=2, max_workers=2) as future:
        (helper,) = helpers_of(os.getpid())
        os.kill(helper, signal.SIGSTOP)
        wait_until(lambda: not is_alive(helper))
    assert len(future.result()) == SHARDS
    assert "did not report" in caplog.text


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("early", [True, False], ids=["while it starts", "while it downloads"])
def test_row_69_a_helper_leaves_ctrl_c_to_its_parent(
    server: FileServer, early: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server.gate.clear()
    with ThreadPoolExecutor(1) as executor:
        loading = executor.submit(ndcache.load, server.url, processes=2, max_workers=2)
        wait_until(lambda: helpers_of(os.getpid()) if early else server.peak_bodies == 4)
        os.kill(helpers_of(os.getpid())[0], signal.SIGINT)
        wait_until(lambda: server.peak_bodies == 4 or caplog.records)
        server.gate.set()
        assert len(loading.result()) == SHARDS
    assert caplog.records == []
    assert len(server.shard_requests()) == SHARDS


@pytest.mark.parametrize(
    "code",
    ["import does_not_exist", "print('{\"half')", "import time; time.sleep(300)", "import os; os.close(0)", ORPHAN],
)
def test_row_68_helpers_of_no_use_fail_no_load(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "helper_arguments", lambda: [sys.executable, "-c", code])
    with ndcache.load(server.url, processes=3) as weights:
        assert len(weights) == SHARDS
        assert weights.stats.network_bytes == NBYTES
    assert len(caplog.records) <= 1


def test_an_error_is_the_parents_own(server: FileServer, caplog: pytest.LogCaptureFixture) -> None:
    server.status["/params_shard_7.bin"] = 404
    with pytest.raises(ndcache.NotFoundError, match="params_shard_7"):
        ndcache.load(server.url, processes=3, max_workers=2)
    assert caplog.records == []


def test_warnings_of_helpers_are_logged_once(server: FileServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "ndcache")
    with held(
        server, 4, ndcache.load, server.url, processes=2, max_workers=2, retries=ndcache.RetryPolicy(1, backoff=0.0)
    ):
        for number in range(SHARDS):
            server.status[f"/params_shard_{number}.bin"] = 500
    assert {record.name for record in caplog.records} == {"ndcache"}


# --- stopping -----------------------------------------------------------------------------------------


def test_row_69_cancelling_ends_the_helpers(server: FileServer) -> None:
    cancel = threading.Event()
    with held(server, 6, ndcache.load, server.url, processes=3, max_workers=2, cancel=cancel) as future:
        helpers = helpers_of(os.getpid())
        cancel.set()
        with pytest.raises(ndcache.CancelledError):
            future.result(30)
        assert len(helpers) == 2
        assert not any(map(is_alive, helpers))


def test_row_69_closing_a_stream_ends_the_helpers(server: FileServer) -> None:
    tensors = ndcache.stream(server.url, processes=2, max_workers=1, memory_limit=1)
    next(tensors)
    tensors.close()  # type: ignore[attr-defined]
    assert helpers_of(os.getpid()) == []
