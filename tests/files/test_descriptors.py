"""Few file descriptors: a load manages with them, leaves some to the program, and reports when there are none."""

from __future__ import annotations

import contextlib
import json
import os
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.files import descriptors

from ..helpers import models
from ..helpers.processes import run_script
from ..helpers.servers import FileServer

pytest.importorskip("resource")

pytestmark = pytest.mark.once
Serve = Callable[..., FileServer]
SHARDS = 250


@pytest.fixture
def model(tmp_path: Path) -> Path:
    models.simple_model(tmp_path / "model", shards=SHARDS, shard_bytes=64)
    return tmp_path / "model"


def run(script: str, **arguments: Any) -> Any:
    """Run a script in a process of its own, and return its variable `result`.

    In the script, `limit_to` sets how many files it may open.
    """
    begin = """
        import json, os, resource, sys, warnings
        import numpy as np
        import ndcache, ndcache.loader, queue

        def limit_to(count):
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))

        def leave(count):
            "Use up all descriptors but so many."
            held = []
            try:
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                for descriptor in held[len(held) - count:]:
                    os.close(descriptor)

        globals().update(json.loads(sys.argv[1]))
        warnings.simplefilter("ignore")
    """
    whole = textwrap.dedent(begin) + textwrap.dedent(script) + "\nprint(json.dumps(result))"
    return json.loads(run_script(whole, json.dumps(arguments, default=str)))


@pytest.mark.parametrize(
    ("where", "limit", "times"),
    [
        ("local", 64, 1),
        ("local", 1024, 6),
        ("cached", 256, 2),
        ("cached", 64, 2),
        ("cached", 32, 1),
        ("cached", 1024, 6),
        ("cold", 64, 1),
        ("cold", 32, 1),
        ("in memory", 64, 1),
        ("in memory", 32, 1),
        ("in memory", 1024, 6),
    ],
)
def test_row_55_a_load_manages_with_few_descriptors(
    model: Path, tmp_path: Path, serve: Serve, where: str, limit: int, times: int
) -> None:
    server = serve(model)
    if where == "cached":
        ndcache.fetch(server.url)
    script = """
        limit_to(limit)
        before = len(os.listdir("/dev/fd"))
        kept = [ndcache.load(source, **options) for _ in range(times)]
        result = [
            sorted({len(weights) for weights in kept}),
            sorted({float(sum(array.sum() for array in weights.values())) for weights in kept}),
            len(os.listdir("/dev/fd")) - before,
        ]
    """
    options = {"cache_dir": os.devnull} if where == "in memory" else {}
    source = model if where == "local" else server.url
    counts, sums, left_open = run(script, source=source, options=options, limit=limit, times=times)
    weights = ndcache.load(model)
    assert counts == [SHARDS]
    assert sums == [float(sum(array.sum() for array in weights.values()))]
    assert left_open == 0


@pytest.mark.parametrize("where", ["cached", "cold"])
def test_row_55_concurrent_loads_share_the_descriptors(model: Path, tmp_path: Path, serve: Serve, where: str) -> None:
    server = serve(model)
    if where == "cached":
        ndcache.fetch(server.url)
    script = """
        import threading
        limit_to(128)
        result = []
        def one(number):
            options = {} if where == "cached" else {"cache_dir": f"{new}/{number}"}
            try:
                result.append(len(ndcache.load(url, names=[f"layer.{n}" for n in range(40)], **options)))
            except BaseException as error:
                result.append(repr(error))
        threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    """
    assert run(script, url=server.url, where=where, new=tmp_path / "new") == [40] * 8


@pytest.mark.parametrize("where", ["cached", "cold"])
@pytest.mark.parametrize("limit", [64, 256])
def test_row_55_the_program_can_open_files_during_a_load(model: Path, serve: Serve, where: str, limit: int) -> None:
    server = serve(model)
    if where == "cached":
        ndcache.fetch(server.url)
    script = """
        def look(report):
            found.append(descriptors._free())

        from ndcache.files import descriptors
        found = []
        limit_to(limit)
        ndcache.load(url, progress=look)
        result = min(found)
    """
    assert run(script, url=server.url, limit=limit) >= 16


@pytest.mark.parametrize("verb", ["load", "fetch", "verify", "stream", "local", "in memory", "by name"])
@pytest.mark.parametrize("left", [1, 2])
def test_row_55_a_shortage_is_reported_as_such(model: Path, serve: Serve, verb: str, left: int) -> None:
    server = serve(model)
    if verb == "verify":
        ndcache.fetch(server.url)
        server.requests.clear()
    script = """
        ndcache.load(local)  # everything is imported
        limit_to(200)
        leave(left)
        verbs = {
            "load": lambda: ndcache.load(url),
            "by name": lambda: ndcache.load(url.replace("127.0.0.1", "localhost")),
            "fetch": lambda: ndcache.fetch(url),
            "verify": lambda: ndcache.verify(url),
            "stream": lambda: dict(ndcache.stream(url)),
            "local": lambda: ndcache.load(local),
            "in memory": lambda: ndcache.load(url, cache_dir=os.devnull),
        }
        try:
            verbs[verb]()
            result = None
        except ndcache.TooManyOpenFilesError as error:
            result = [str(error), error.errno, isinstance(error, OSError), error.retryable]
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
    """
    result = run(script, url=server.url, local=model, verb=verb, left=left)
    if result is None:
        assert verb in ("local", "verify")  # one file at a time is enough
        return
    text, number, is_os_error, is_retryable = result
    assert "200 file descriptors" in text
    assert "ulimit -n" in text
    assert "cache" not in text
    assert "network" not in text
    assert (number, is_os_error, is_retryable) == (24, True, False)
    assert len(server.requests) <= 12  # at most one by each worker


def test_a_shortage_of_the_whole_system() -> None:
    with pytest.raises(ndcache.TooManyOpenFilesError, match="on this system"):
        descriptors.check_shortage(OSError(23, "Too many open files in system"))
    descriptors.check_shortage(OSError(13, "Permission denied"))
    descriptors.check_exhausted()


def test_how_many_workers_can_be_afforded(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, wanted, each, count in [
        (None, 8, 8, 8),
        (1000, 8, 8, 8),
        (100, 8, 8, 6),  # half of them are the program's
        (200, 128, 4, 34),  # 64 of them are
        (5, 8, 8, 0),
        (0, 8, 8, 0),
    ]:
        monkeypatch.setattr(descriptors, "_free", lambda free=free: free)
        assert descriptors.affordable(wanted, each) == count
        with descriptors.budget(wanted, each) as workers:
            assert workers == max(1, count)
    monkeypatch.setattr(descriptors, "_free", lambda: 200)
    with descriptors.budget(8, 8) as first, descriptors.budget(8, 8) as second, descriptors.budget(8, 8) as third:
        assert (first, second, third) == (8, 8, 4)
    assert descriptors._promised == {}


def test_row_55_loads_that_begin_together_do_not_take_the_same_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, all_took, shares = threading.Barrier(4), threading.Barrier(4), list[int]()
    count = descriptors.affordable

    def affordable(wanted: int, each: int) -> int:
        number = count(wanted, each)
        with contextlib.suppress(threading.BrokenBarrierError):
            counted.wait(1)  # until all have counted, if nothing keeps them from it
        return number

    def begin() -> None:
        with descriptors.budget(8, 8) as workers:
            shares.append(workers)
            all_took.wait(60)

    monkeypatch.setattr(descriptors, "_free", lambda: 200)
    monkeypatch.setattr(descriptors, "affordable", affordable)
    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(shares) == [2, 4, 8, 8]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_a_load_takes_its_descriptors() -> None:
    script = """
        import threading
        from ndcache.files import descriptors

        holder = threading.Thread(target=descriptors._turn[0].acquire)
        holder.start()
        holder.join()
        child = os.fork()
        if child == 0:
            with descriptors.budget(8, 8) as workers:
                os._exit(workers)
        result = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    """
    assert run(script) == 8
