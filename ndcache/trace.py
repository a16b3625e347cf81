"""A timeline of a load by threads: in a file for https://ui.perfetto.dev and chrome://tracing, and in a page.

Source of the format: "Trace Event Format", in the documents of the Chromium project catapult.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .arguments import check_path
from .caller import is_expected
from .errors import CancelledError, NdcacheError
from .report.page import render_page, write_text
from .urls.redact import redact

__all__ = ["Trace", "check_writable", "tracing"]

logger = logging.getLogger("ndcache")


class Trace:
    """Collect events, from any thread, and facts about the load; see `tracing`.

    Parameters
    ----------
    started : float, optional
        The moment that counts as 0, of `time.perf_counter`, which all processes of a system share. Default: now.
    process : str, default "ndcache"
        What this process is called.

    Attributes
    ----------
    started : float
    """

    def __init__(self, started: float | None = None, process: str = "ndcache") -> None:
        self.started, self._date = time.perf_counter() if started is None else started, time.time()
        self._events = [_name_event("process_name", 0, process)]
        self._threads: set[int] = set()
        self._facts: dict[str, Any] = {}
        self._cpu_seconds = _cpu_seconds()
        self._stats: Any = None
        self._shards: dict[str, int] = {}
        self._origins: dict[str, str] = {}

    def add(self, name: str, start: float, end: float, detail: dict[str, Any]) -> None:
        """Add an event of this thread; `start` and `end` are values of `time.perf_counter`."""
        thread = threading.get_native_id()
        if thread not in self._threads:
            self._threads.add(thread)
            self._events.append(_name_event("thread_name", thread, threading.current_thread().name))
        self._events.append(
            {
                "name": name,
                "cat": "ndcache",
                "ph": "X",
                "ts": round((start - self.started) * 1e6, 3),
                "dur": round((end - start) * 1e6, 3),
                "pid": os.getpid(),
                "tid": thread,
                "args": detail,
            }
        )

    def take_events(self) -> list[dict[str, Any]]:
        """Return and forget the events so far, for the trace of another process."""
        taken = self._events[:]
        del self._events[: len(taken)]  # another thread may have added some
        return taken

    def add_events(self, events: list[dict[str, Any]]) -> None:
        """Add events that another process has taken from its trace."""
        self._events += events

    def note(self, stats: Any, **facts: Any) -> None:
        """Note the statistics of the load, which are read at the end, and other facts: texts and numbers."""
        self._stats = stats
        self._facts.update(facts)

    def note_shards(self, sizes: Mapping[str, int]) -> None:
        """Note the shards that the load wants, and their bytes."""
        self._shards.update(sizes)

    def shard_done(self, path: str, origin: str) -> None:
        """Note where a shard came from: ``"network"`` or ``"cache"``."""
        self._origins[path] = origin

    def note_error(self, error: BaseException) -> None:
        """Note how the load ended. The messages of errors that ndcache raised have no secrets; others may."""
        if isinstance(error, CancelledError) or not isinstance(error, Exception):  # Ctrl-C, or the end of a stream
            self._facts["outcome"] = "stopped"
        else:
            at = error.__traceback__
            own = isinstance(error, NdcacheError) or (at is not None and is_expected(error, at))
            self._facts.update(outcome="failed", error=f"{type(error).__name__}{f': {error}' if own else ''}")

    def content(self) -> dict[str, Any]:
        """Return the JSON value of the trace file."""
        cpu_seconds = round(_cpu_seconds() - self._cpu_seconds, 6)
        seconds = round(time.perf_counter() - self.started, 6)
        times = {"started": self._date, "seconds": seconds, "cpu_seconds": cpu_seconds}
        facts = {"outcome": "done", **times, **self._facts}
        checked: Mapping[str, str] = {}
        if self._stats is not None:
            stats = dataclasses.asdict(self._stats)
            checked = stats.pop("checked")
            facts["stats"] = stats
        facts["shards"] = {
            path: (nbytes, self._origins.get(path, ""), checked.get(path, "")) for path, nbytes in self._shards.items()
        }
        return {"traceEvents": self._events, "displayTimeUnit": "ms", "otherData": facts}


def _cpu_seconds() -> float:
    """Return the CPU time of this process, and of its child processes that have ended."""
    ended = os.times()
    # `os.times` counts in steps of 10 ms, which is much for a load from cache.
    return time.process_time() + ended.children_user + ended.children_system


def _name_event(kind: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": os.getpid(), "tid": thread, "args": {"name": name}}


@contextmanager
def tracing(
    source: object,
    path: str | os.PathLike[str] | None,
    report: str | os.PathLike[str] | None = None,
    *,
    only_of_failure: bool = False,
) -> Iterator[Trace | None]:
    """Write a trace and a report at the end of the block, however it ends; yield None if none is wanted.

    They name `source` as the caller does if the load fails before it is located. With `only_of_failure`, nothing is
    written if the block succeeds.

    Raises
    ------
    OSError
        A file cannot be written there.
    """
    wanted = {"trace": path, "report": report}
    for kind, where in wanted.items():
        check_path(kind, where, may_be_none=True)
    if path is None and report is None:
        yield None
        return
    files = {kind: check_writable(where, kind) for kind, where in wanted.items() if where is not None}
    trace = Trace()
    trace.note(None, source=redact(str(source)))
    try:
        yield trace
    except BaseException as error:
        trace.note_error(error)
        raise
    finally:
        content = trace.content()
        is_wanted = not only_of_failure or content["otherData"]["outcome"] != "done"
        for kind, file in files.items() if is_wanted else ():
            try:
                write_text(file, json.dumps(content) if kind == "trace" else render_page(content))
            except OSError as error:
                # The load's result, or its error, matters more.
                logger.warning("the %s was not written: %s: %s", kind, file, error.strerror)


def check_writable(path: str | os.PathLike[str], kind: str) -> Path:
    """Return a file to write at the end, after links; raise an OSError if it cannot be written.

    A missing directory is not made: that is usually a mistake in the path. `kind` is what the file is called.
    """
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"the {kind} cannot be written: it is a directory", str(path))
    if file.exists() and not file.is_file():  # a device or pipe
        return file
    file = Path(os.path.realpath(file)) if file.is_symlink() else file
    if not file.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"the {kind} cannot be written: no such directory", str(file.parent))
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(errno.EACCES, f"the {kind} cannot be written: no permission", str(file.parent))
    return file
