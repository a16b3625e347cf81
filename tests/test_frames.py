"""The calls between `ndcache.load` and a socket: so few that a traceback can be read."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.workers.outcomes import Task
from ndcache.workers.pool import WorkerPool

from .helpers.models import simple_model
from .helpers.servers import FileServer

Serve = Callable[[Path], FileServer]

#: Frames from `ndcache.load` to the pool's `submit` and from the start of a worker to the socket; and the latter alone.
MOST, MOST_IN_WORKER = 13, 10


def frames() -> Iterator[str]:
    """Yield ndcache's frames on the stack of this thread, from the inside out."""
    package = os.path.dirname(ndcache.__file__)
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(package):
            yield f"{os.path.relpath(path, package)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]


def test_few_calls_lie_between_load_and_the_socket(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    simple_model(tmp_path / "model", shards=2)
    server = serve(tmp_path / "model")
    on_caller: list[list[str]] = []
    in_workers: list[list[str]] = []
    submit, recv_into = WorkerPool.submit, socket.socket.recv_into

    def noting_submit(self: WorkerPool, task: Task[Any]) -> None:
        on_caller.append(list(frames())[::-1])
        submit(self, task)

    def noting_recv_into(self: socket.socket, *args: Any) -> int:
        if threading.current_thread().name.startswith("ndcache"):
            in_workers.append(list(frames())[::-1])
        return recv_into(self, *args)

    monkeypatch.setattr(WorkerPool, "submit", noting_submit)
    monkeypatch.setattr(socket.socket, "recv_into", noting_recv_into)
    ndcache.load(server.url)

    caller = max((calls for calls in on_caller if any("ordered" in call for call in calls)), key=len)
    shards = [calls for calls in in_workers if any("download_shard" in call for call in calls)]
    assert len({calls[-1] for calls in shards}) > 1, "both the headers and the body were read"
    worker = max(shards, key=len)
    shown = "\n".join(["", "from load to submit:", *caller, "in the worker, to the socket:", *worker])
    assert caller[0].endswith(" load"), shown
    assert len(worker) <= MOST_IN_WORKER, shown
    assert len(caller) + len(worker) <= MOST, shown
