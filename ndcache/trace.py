"""What happened when, on which thread: a file that https://ui.perfetto.dev and chrome://tracing show.

Source of the format: "Trace Event Format", the Chromium project's catapult documents.
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

__all__ = ["Trace"]


class Trace:
    """Collects events, from any thread, and writes them at the end.

    Parameters
    ----------
    path : path-like
        The file, which is replaced if it exists.

    Raises
    ------
    OSError
        No file can be written there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        folder = self.path.parent
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "the trace cannot be written: it is a directory", str(path))
        if not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the trace cannot be written: no such directory", str(folder))
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "the trace cannot be written: no permission", str(folder))
        self._begun = time.perf_counter()
        self._events: list[dict[str, Any]] = []
        self._names: dict[int, str] = {}

    def add(self, name: str, start: float, end: float, detail: dict[str, Any]) -> None:
        """Something that this thread did, from `start` to `end` by `time.perf_counter`."""
        thread = threading.get_native_id()
        self._names[thread] = threading.current_thread().name
        self._events.append(
            {
                "name": name,
                "cat": "ndcache",
                "ph": "X",
                "ts": round((start - self._begun) * 1e6, 3),
                "dur": round((end - start) * 1e6, 3),
                "pid": os.getpid(),
                "tid": thread,
                "args": detail,
            }
        )

    def write(self) -> None:
        """Write what was collected, whole or not at all."""
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
