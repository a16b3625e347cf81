"""Tell apart the starts of the system and its processes, for notes that others read."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import NamedTuple

__all__ = ["ProcessId", "boot_id", "clock_id"]


class ProcessId(NamedTuple):
    """Identify a process, also after its number was given to another one. By default it is unknown.

    Attributes
    ----------
    pid : int
        Its number in its PID namespace.
    started : str
        When it started, as the system says it; empty if unknown.
    namespace : str
        The PID namespace; empty if unknown. Containers have their own, in which the numbers begin at 1.
    """

    pid: int = 0
    started: str = ""
    namespace: str = ""

    @classmethod
    def current(cls) -> ProcessId:
        """Return the identity of this process."""
        return _current(os.getpid())

    def has_ended(self) -> bool:
        """Return whether the process has certainly ended. This can be seen only from its own PID namespace."""
        if not self.namespace or self.namespace != ProcessId.current().namespace:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass  # it belongs to another account
        state, started = _state(self.pid)
        return state in ("Z", "X") or (bool(started) and started != self.started)


@functools.lru_cache(maxsize=1)
def _current(pid: int) -> ProcessId:
    return ProcessId(pid, _state(pid)[1], _namespace("pid"))


@functools.cache
def boot_id() -> str:
    """Return an ID of this start of the system; empty if there is none."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


def clock_id() -> str:
    """Return an ID of the clock that ``time.monotonic`` reads; empty if there is none.

    It begins with the system, but a container can have one of its own.
    """
    return boot_id() and f"{boot_id()} {_namespace('time')}"


def _namespace(kind: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/ns/{kind}")
    return ""


def _state(pid: int) -> tuple[str, str]:
    """Return the state of a process, and when it started in ticks since the system did; empty if that is hidden."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before it may have spaces and brackets
        return fields[0].decode(), fields[19].decode()
    except (OSError, IndexError, ValueError):
        return "", ""
