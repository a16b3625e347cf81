"""However a load ends, its helper processes end with it; and what a process that loads forks does not keep them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import ndcache

from ..helpers import kills, models
from ..helpers.kills import CountingServer
from ..helpers.loads import partial_files
from ..helpers.processes import Zygote, helpers_of, is_alive
from .children import Serve, digest_of, load, wait_until

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")

SHARDS, SHARD_BYTES = 8, 1 << 20
#: Two shards for each of three processes.
OPTIONS: dict[str, Any] = {"processes": 3, "max_workers": 2}


@pytest.fixture
def server(model: Path, counting: Serve) -> CountingServer:
    """Return a server that sends half of each shard, and the rest only when it is closed."""
    models.simple_model(model, shards=SHARDS, shard_bytes=SHARD_BYTES)
    server: CountingServer = counting(model)
    for number in range(SHARDS):
        server.holds[f"/params_shard_{number}.bin"] = (SHARD_BYTES // 2,)
    return server


def busy_helpers(server: CountingServer, parent: int) -> list[int]:
    """Wait until the server has sent what it sends to three processes; return the helpers."""
    wait_until(lambda: sum(server.sent.values()) >= 6 * SHARD_BYTES // 2)
    helpers = helpers_of(parent)
    assert len(helpers) == 2
    return helpers


def wait_for_end(pids: list[int]) -> None:
    wait_until(lambda: not any(map(is_alive, pids)), 20)


def test_row_69_helpers_end_when_their_parent_is_killed(
    server: CountingServer, zygote: Zygote, cache_dir: Path
) -> None:
    parent = zygote.start(kills.fetch, server.url, cache_dir=cache_dir, **OPTIONS)
    helpers = busy_helpers(server, parent.pid)
    parent.kill()
    wait_for_end(helpers)
    received = sum(path.stat().st_size for path in partial_files(cache_dir) if path.suffix != ".json")
    assert received >= 4 * SHARD_BYTES // 2, "the helpers kept what they had received"


def test_row_69_helpers_that_still_start_end_when_their_parent_is_killed(
    server: CountingServer, zygote: Zygote, cache_dir: Path
) -> None:
    for pause in (0.0, 0.02, 0.1, 0.2):
        parent = zygote.start(kills.fetch, server.url, cache_dir=cache_dir, **OPTIONS)
        helpers: list[int] = []

        def has_helper(found: list[int] = helpers, pid: int = parent.pid) -> bool:
            found[:] = helpers_of(pid)
            return bool(found)

        wait_until(has_helper)
        time.sleep(pause)  # no event marks these moments of a start
        helpers = sorted({*helpers, *helpers_of(parent.pid)})
        parent.kill()
        wait_for_end(helpers)


def fork_of_a_load(url: str, note: str, **options: Any) -> None:
    def fork() -> None:
        wait_until(lambda: len(helpers_of(os.getpid())) == 2)
        if (pid := os.fork()) == 0:
            time.sleep(300)
            os._exit(0)
        Path(note).write_text(str(pid))

    threading.Thread(target=fork, daemon=True).start()
    kills.fetch(url, **options)


def test_row_71_a_fork_of_the_parent_keeps_no_helper(
    server: CountingServer, zygote: Zygote, cache_dir: Path, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    parent = zygote.start(fork_of_a_load, server.url, str(note), cache_dir=cache_dir, **OPTIONS)
    helpers = busy_helpers(server, parent.pid)
    wait_until(lambda: note.exists() and note.read_text())
    child = int(note.read_text())
    try:
        assert is_alive(child)
        parent.kill()
        wait_for_end(helpers)
        assert is_alive(child)
    finally:
        os.kill(child, signal.SIGKILL)


@contextmanager
def running(script: str, *args: object, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """Run a script in a process group of its own."""
    root = str(Path(ndcache.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, **environ},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


FETCH = """
    import sys, ndcache
    ndcache.fetch(sys.argv[1], processes=3, max_workers=2)
    """


@pytest.mark.usefixtures("interruptible")
def test_row_69_ctrl_c_ends_the_load_and_its_helpers(server: CountingServer, cache_dir: Path) -> None:
    """As in a terminal, all processes of the group get the signal."""
    with running(FETCH, server.url) as process:
        helpers = busy_helpers(server, process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGINT
        wait_for_end(helpers)
    assert errors.count("KeyboardInterrupt") == 1, errors  # the parent's alone
    assert errors.count("Traceback") == 1, errors
    assert len([path for path in partial_files(cache_dir) if path.suffix != ".json"]) == 6


@pytest.mark.usefixtures("interruptible")
def test_row_69_ctrl_c_while_helpers_start(server: CountingServer) -> None:
    with running(FETCH, server.url) as process:
        wait_until(lambda: helpers_of(process.pid))
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.count("KeyboardInterrupt") == 1, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_row_69_signals_that_end_the_parent_end_the_helpers(server: CountingServer, number: int) -> None:
    not_ignored = f"""
    import signal
    signal.signal({number:d}, signal.SIG_DFL)  # tests may run under nohup
    """
    with running(textwrap.dedent(not_ignored) + textwrap.dedent(FETCH), server.url) as process:
        helpers = busy_helpers(server, process.pid)
        process.send_signal(number)
        process.wait(60)
        wait_for_end(helpers)


def test_row_68_a_helper_dies_of_sigterm(server: CountingServer, zygote: Zygote, cache_dir: Path) -> None:
    parent = zygote.start(load, server.url, cache_dir=cache_dir, **OPTIONS)
    helpers = busy_helpers(server, parent.pid)
    os.kill(helpers[0], signal.SIGINT)  # has no effect
    os.kill(helpers[1], signal.SIGTERM)
    wait_until(lambda: not is_alive(helpers[1]))
    assert is_alive(helpers[0])
    server.holds.clear()
    for _ in range(SHARDS):
        server.go.release()
    assert parent.result() == digest_of(models.simple_model(server.directory, SHARDS, SHARD_BYTES))
    wait_for_end(helpers)
