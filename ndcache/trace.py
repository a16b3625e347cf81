"""A timeline of a load by threads, in a file for https://ui.perfetto.dev and chrome://tracing.

Source of the format: "Trace Event Format", in the documents of the Chromium project catapult.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["Trace", "open_trace"]


class Trace:
    """Collect events, from any thread, and write them at the end; see `open_trace`.

    Parameters
    ----------
    path : path-like
        The file to write; replaced if it exists.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._started = time.perf_counter()
        self._events: list[dict[str, Any]] = []
        self._names: dict[int, str] = {}

    def add(self, name: str, start: float, end: float, detail: dict[str, Any]) -> None:
        """Add an event of this thread; `start` and `end` are values of `time.perf_counter`."""
        thread = threading.get_native_id()
        self._names[thread] = threading.current_thread().name
        self._events.append(
            {
                "name": name,
                "cat": "ndcache",
                "ph": "X",
                "ts": round((start - self._started) * 1e6, 3),
                "dur": round((end - start) * 1e6, 3),
                "pid": os.getpid(),
                "tid": thread,
                "args": detail,
            }
        )

    def write(self) -> None:
        """Write all events to the file, or leave it as it was."""
        names = [
            {"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": thread, "args": {"name": name}}
            for thread, name in self._names.items()
        ]
        process = {"name": "process_name", "ph": "M", "pid": os.getpid(), "args": {"name": "ndcache"}}
        content = {"traceEvents": [process, *names, *self._events], "displayTimeUnit": "ms"}
        fresh = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        try:
            fresh.write_text(json.dumps(content), encoding="utf-8")
            os.replace(fresh, self.path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


def open_trace(path: str | os.PathLike[str]) -> Trace:
    """Return a trace, after checking that its file can be written.

    Raises
    ------
    OSError
        The file cannot be written there.
    """
    trace = Trace(path)
    folder = trace.path.parent
    if trace.path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "the trace cannot be written: it is a directory", str(path))
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the trace cannot be written: no such directory", str(folder))
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "the trace cannot be written: no permission", str(folder))
    return trace
