"""Loads that end early: by an error, Ctrl-C or `cancel`, or a server that drips."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest

import ndcache
from ndcache.format.integrity import find_mismatch
from ndcache.sources import verifier
from ndcache.workers.cancellation import Cancellation

from ..helpers import models
from ..helpers.loads import (
    HALF,
    QUICK,
    WHERE,
    Serve,
    assert_same,
    loading_threads,
    partial_files,
    published,
    scripted_model,
    wait_until,
)
from ..helpers.servers import Connection, Request, ScriptedServer, Step, reply, then_stall


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def test_row_35_one_shard_that_fails_stops_the_rest(model: Path, serve: Serve, cache_dir: Path) -> None:
    models.simple_model(model, shards=40)
    server = serve(model)
    server.status["/params_shard_5.bin"] = 404
    with pytest.raises(ndcache.NotFoundError) as caught:
        ndcache.load(server.url, max_workers=2)
    assert caught.value.shard == "params_shard_5.bin"
    assert len(server.shard_requests()) < 20
    # Nothing of the shard that failed, and of one that was stopped only what a load can go on from.
    kept_parts = {path.name for path in partial_files(cache_dir)}
    assert not [name for name in kept_parts if name.startswith("params_shard_5.bin")]
    assert all(
        name.removesuffix(".json") in kept_parts and f"{name.removesuffix('.json')}.json" in kept_parts
        for name in kept_parts
    )
    del server.status["/params_shard_5.bin"]
    kept = len([name for name in published(cache_dir) if name.endswith(".bin")])
    weights = ndcache.load(server.url)
    assert len(weights) == 40
    assert weights.stats.cache_bytes == kept << 16


@pytest.mark.parametrize(("status", "error"), [(404, ndcache.NotFoundError), (500, ndcache.ServerError)])
def test_row_35_a_failure_cancels_the_other_requests(
    model: Path, scripted: ScriptedServer, status: int, error: type[ndcache.TransferError]
) -> None:
    scripted_model(scripted, model, shards=20)
    bad, slow = {f"/params_shard_{n}.bin" for n in (1, 2)}, {f"/params_shard_{n}.bin" for n in (3, 4)}
    first_is_done = threading.Event()
    gone: set[str] = set()

    def fail(connection: Connection, request: Request) -> None:
        first_is_done.wait(60)
        connection.send(reply(status))

    def hang(connection: Connection, request: Request) -> None:
        connection.send(reply(200, b"begun", length=1 << 16))
        connection.stall()
        gone.add(request.path)

    scripted.script |= {path: [fail if path in bad else hang] for path in (*bad, *slow)}
    failed_at: list[float] = []

    def callback(report: ndcache.ProgressReport) -> None:
        if report.shards_done == 1:
            # The worker that is free goes on with the fourth; none is free for the fifth before the two have failed.
            wait_until(lambda: bad | slow <= {request.path for request in scripted.requests})
            first_is_done.set()
            failed_at.append(time.monotonic())

    with pytest.raises(error) as caught:
        ndcache.load(scripted.url, progress=callback, max_workers=4, retries=QUICK, timeout=600)
    assert time.monotonic() - failed_at[0] < 20  # and not 600
    assert loading_threads() == []
    wait_until(lambda: gone == slow and scripted.open_connections == 0)
    failed = {caught.value.shard, *(other.shard for other in caught.value.others)}  # the other one, unless cancelled
    assert failed <= {"params_shard_1.bin", "params_shard_2.bin"}
    asked = {request.path for request in scripted.requests}
    assert asked == {"/tensor-cache.json", "/params_shard_0.bin"} | bad | slow


def test_a_stream_left_open_at_exit(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=3)
    server = serve(model)
    server.stalled = {"/params_shard_1.bin", "/params_shard_2.bin"}
    script = f"import ndcache\ns = ndcache.stream({server.url!r}, timeout=600)\nprint(next(s)[0])"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (child.returncode, child.stdout) == (0, "layer.0\n")


HEADERS = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("where", ["/tensor-cache.json", "/params_shard_0.bin"])
@pytest.mark.parametrize("begun", [b"", HEADERS, reply(200, length=1 << 16)], ids=["status", "headers", "body"])
def test_row_13_a_server_that_drips_is_given_up(
    model: Path, scripted: ScriptedServer, where: str, begun: bytes
) -> None:
    arrays = scripted_model(scripted, model)
    good = scripted.script[where]

    def drip(connection: Any, request: Any) -> None:
        connection.send(begun)
        while True:  # more often than any timeout between two bytes could notice
            connection.send(b"x")
            time.sleep(0.05)

    scripted.script[where] = [drip]
    with pytest.raises(ndcache.StallError) as caught:
        ndcache.load(scripted.url, retries=0, timeout=(5, 0.5))
    assert caught.value.attempts == 1
    scripted.script[where] = [drip, drip, *good]  # the first of them has been
    assert_same(ndcache.load(scripted.url, retries=QUICK, timeout=(5, 0.5)), arrays)
    assert len(scripted.requests_for(where)) == 3


@pytest.fixture
def stop_when(monkeypatch: pytest.MonkeyPatch) -> Callable[..., BaseException | None]:
    """Stop a load while the caller's thread waits for its workers, and return what it raised."""
    looked, look = threading.Event(), Cancellation.poll

    def tell(self: Cancellation) -> None:
        looked.set()
        look(self)

    monkeypatch.setattr(Cancellation, "poll", tell)

    def run(reached: Callable[[], bool], how: str, load: Callable[..., Any]) -> BaseException | None:
        cancel, is_over = threading.Event(), threading.Event()
        pressed: list[float] = []

        def press() -> None:
            wait_until(lambda: is_over.is_set() or reached())
            looked.clear()
            wait_until(lambda: is_over.is_set() or looked.is_set())
            pressed.append(time.monotonic())
            if how == "cancel":
                cancel.set()
            elif not is_over.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        presser = threading.Thread(target=press)
        presser.start()
        error: BaseException | None = None
        try:
            load(cancel=cancel)
        except BaseException as raised:
            error = raised
        is_over.set()
        presser.join()
        assert time.monotonic() - pressed[0] < 15  # nothing of what was waited for ends before
        return error

    return run


STOPS = {"cancel": ndcache.CancelledError, "Ctrl-C": KeyboardInterrupt}


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return an event that is set when a worker begins to sleep."""
    event, sleep = threading.Event(), Cancellation.sleep

    def tell(self: Cancellation, seconds: float) -> None:
        event.set()
        sleep(self, seconds)

    monkeypatch.setattr(Cancellation, "sleep", tell)
    return event


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize(
    "phase",
    ["the manifest's headers", "the manifest's body", "a shard's headers", "a shard's body", "a retry", "a lock"],
)
def test_row_36_a_load_stops_while_it_waits(
    model: Path,
    scripted: ScriptedServer,
    cache_dir: Path,
    asleep: threading.Event,
    stop_when: Callable[..., Any],
    phase: str,
    how: str,
) -> None:
    arrays = scripted_model(scripted, model)
    manifest, shard = WHERE
    good, data = dict(scripted.script), (model / "params_shard_0.bin").read_bytes()
    with contextlib.ExitStack() as while_it_waits:
        if phase == "a lock":
            ndcache.read_manifest(scripted.url)
            state = next(cache_dir.rglob(".ndcache"))
            (state / "locks").mkdir()
            while_it_waits.enter_context(filelock.FileLock(state / "locks" / "params_shard_0.bin"))
        begun = reply(200, data[:HALF], {"ETag": '"params_shard_0.bin"'}, length=len(data))
        steps: dict[str, tuple[str, bytes | Step, Callable[[], bool]]] = {
            "the manifest's headers": (manifest, then_stall(b""), lambda: bool(scripted.requests)),
            "the manifest's body": (manifest, then_stall(reply(200, b"{", length=9)), lambda: bool(scripted.requests)),
            "a shard's headers": (shard, then_stall(b"HTTP/1.1 200"), lambda: bool(scripted.requests_for(shard))),
            "a shard's body": (shard, then_stall(begun), lambda: HALF in map(size_of, partial_files(cache_dir))),
            "a retry": (shard, reply(429, headers={"Retry-After": "200"}), asleep.is_set),
            "a lock": (shard, reply(404), asleep.is_set),
        }
        where, step, reached = steps[phase]
        scripted.script[where] = [step]
        error = stop_when(reached, how, functools.partial(ndcache.load, scripted.url, timeout=600))
    assert type(error) is STOPS[how]
    assert loading_threads() == []
    wait_until(lambda: scripted.open_connections == 0)
    kept = sorted(partial_files(cache_dir))
    assert published(cache_dir) == ([] if where == manifest else ["tensor-cache.json"])
    scripted.script = good
    if phase == "a retry":
        shutil.rmtree(cache_dir / ".ndcache" / "limits")  # or the next load would wait as long as the server asked
    if phase == "a shard's body":
        assert [path.suffix == ".json" for path in kept] == [False, True]
        assert kept[0].read_bytes() == data[:HALF]
    else:
        assert kept == []
    assert_same(ndcache.load(scripted.url), arrays)
    asked = scripted.requests_for(shard)[-1].headers.get("range")
    assert asked == (f"bytes={HALF}-{len(data) - 1}" if phase == "a shard's body" else None)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("verb", [ndcache.load, ndcache.verify])
def test_row_36_a_load_stops_while_a_cached_file_is_hashed(
    model: Path,
    serve: Serve,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_when: Callable[..., Any],
    how: str,
    verb: Any,
) -> None:
    manifest = models.write_model(model, [{"a": models.random_array((8,))}])
    manifest["records"][0]["nbytes"] = 1 << 37  # it takes minutes to hash
    (model / "tensor-cache.json").write_text(json.dumps(manifest))
    server = serve(model)
    ndcache.read_manifest(server.url)
    directory = next(cache_dir.rglob("tensor-cache.json")).parent
    (directory / "params_shard_0.bin").touch()
    os.truncate(directory / "params_shard_0.bin", 1 << 37)  # sparse
    begun = threading.Event()

    def tell(*args: Any) -> Any:
        begun.set()
        return find_mismatch(*args)

    monkeypatch.setattr(verifier, "find_mismatch", tell)
    options = {"verify": "always"} if verb is ndcache.load else {}
    error = stop_when(begun.is_set, how, functools.partial(verb, server.url, **options))
    assert type(error) is STOPS[how]
    assert loading_threads() == []
    assert size_of(directory / "params_shard_0.bin") == 1 << 37  # where it was, and not set aside


@pytest.mark.parametrize("verb", [ndcache.load, ndcache.fetch, ndcache.read_manifest])
def test_row_36_a_load_cancelled_before_it_begins_makes_no_request(model: Path, serve: Serve, verb: Any) -> None:
    models.simple_model(model)
    server = serve(model)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(ndcache.CancelledError):
        verb(server.url, cancel=cancel)
    assert server.requests == []


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.usefixtures("interruptible")
def test_row_36_ctrl_c_in_a_script(model: Path, serve: Serve, cache_dir: Path) -> None:
    models.simple_model(model, shards=12)
    server = serve(model)
    server.gate.clear()
    script = f"import ndcache\ntry:\n    ndcache.load({server.url!r})\nfinally:\n    print('cleaned up')"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(server.shard_requests()) == 8)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert output == "cleaned up\n"
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert child.returncode != 0
    assert partial_files(cache_dir) == []
    assert [name for name in published(cache_dir) if name.endswith(".bin")] == []
