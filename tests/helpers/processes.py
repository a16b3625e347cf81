"""Child processes of tests: forks that are cheap to start and can be killed, and scripts in a new Python."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import ndcache

assert ndcache.__all__  # imports all of ndcache before anything is forked

#: A safety net: nothing here takes so long.
TIMEOUT = 60.0


class Died(Exception):
    """A child ended without a result."""


class Child:
    """A process that a `Zygote` forked.

    Attributes
    ----------
    pid : int
    """

    def __init__(self, zygote: Zygote, number: int, pid: int) -> None:
        self._zygote = zygote
        self._number = number
        self.pid = pid

    @property
    def is_running(self) -> bool:
        """Return whether it has not ended yet; a stopped process counts as running."""
        return self._zygote.ended(self._number, 0) is None

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        self._zygote.send("signal", self._number, number)

    def kill(self) -> bool:
        """Send it SIGKILL and wait for its end; return whether it had its result already."""
        self.signal(signal.SIGKILL)
        with contextlib.suppress(Died):
            self.result()
            return True
        return False

    def result(self, timeout: float = TIMEOUT) -> Any:
        """Return what its function returned, or raise what it raised."""
        ended = self._zygote.ended(self._number, timeout)
        if ended is None:
            raise TimeoutError(f"process {self.pid} still runs")
        status, outcome = ended
        if outcome is None:
            raise Died(f"process {self.pid} ended with status {status}")
        result, error = outcome
        if error is not None:
            raise error
        return result


class Zygote:
    """A process without threads that has imported ndcache, and forks a child for each call of a function.

    Functions, arguments and results are pickled; results must be small.
    """

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self._process = process
        self._pipe = pipe
        self._ended: dict[int, tuple[int, Any]] = {}
        self._started: dict[int, int] = {}
        self._numbers = itertools.count()

    def start(self, function: Callable[..., Any], *args: Any, **options: Any) -> Child:
        """Run ``function(*args, **options)`` in a child."""
        number = next(self._numbers)
        self.send("start", number, (function, args, options))
        while number not in self._started:
            if not self._receive(TIMEOUT):
                raise TimeoutError("the zygote does not answer")
        return Child(self, number, self._started.pop(number))

    def close(self) -> None:
        """Kill the children that still run, and end."""
        self._pipe.close()
        self._process.join(TIMEOUT)
        self._process.close()

    def send(self, *order: Any) -> None:
        self._pipe.send(order)

    def ended(self, number: int, timeout: float) -> tuple[int, Any] | None:
        """Wait for the end of a child; return its exit status and outcome, or None if it still runs."""
        end = time.monotonic() + timeout
        while number not in self._ended and self._receive(max(0.0, end - time.monotonic())):
            pass
        return self._ended.get(number)

    def _receive(self, timeout: float) -> bool:
        if not self._pipe.poll(timeout):
            return False
        what, number, value = self._pipe.recv()
        (self._started if what == "started" else self._ended)[number] = value
        return True


def start_zygote() -> Zygote:
    """Start a zygote; the caller must close it."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_zygote, args=(theirs,))
    process.start()
    theirs.close()
    return Zygote(process, ours)


def _zygote(pipe: Connection) -> None:
    """Fork, signal and reap children as ordered, until the other end is closed.

    Signals go through here because only the process that reaps a child knows that its ID is still the child's.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    signal.signal(signal.SIGCHLD, lambda *_: None)
    bell, ringer = socket.socketpair()
    bell.setblocking(False)
    ringer.setblocking(False)
    signal.set_wakeup_fd(ringer.fileno(), warn_on_full_buffer=False)
    warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)  # numpy has threads
    children: dict[int, tuple[int, Connection]] = {}
    try:
        while True:
            ready = wait([pipe, bell])
            if bell in ready:
                bell.recv(1 << 12)
                _reap(children, pipe)
            if pipe in ready:
                what, number, value = pipe.recv()
                if what == "start":
                    children[number] = fork(*value)
                    pipe.send(("started", number, children[number][0]))
                elif number in children:
                    os.kill(children[number][0], value)
    except (EOFError, OSError):
        pass  # the other end is closed
    finally:
        for pid, _ in children.values():
            os.kill(pid, signal.SIGKILL)


def _reap(children: dict[int, tuple[int, Connection]], pipe: Connection) -> None:
    for number, (pid, results) in list(children.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            continue
        outcome = None
        with results, contextlib.suppress(EOFError):
            # A fork of the child may still hold the other end, so waiting for the end of the stream could hang.
            outcome = results.recv() if results.poll() else None
        del children[number]
        pipe.send(("ended", number, (os.waitstatus_to_exitcode(status), outcome)))


def fork(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> tuple[int, Connection]:
    """Call a function in a fork of this process; return its ID, and a connection that gives result and error."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        theirs.send(_outcome(function, args, options))
    finally:
        os._exit(0)


def _outcome(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    try:
        return function(*args, **options), None
    except BaseException as error:
        return None, error


def run_script(script: str, *args: object) -> str:
    """Run a script in a new Python, and return what it prints."""
    environ = {**os.environ, "PYTHONPATH": str(Path(ndcache.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, check=False, text=True, env=environ, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def helpers_of(pid: int) -> list[int]:
    """Return the helper processes of a load in the process `pid`, except those that have ended."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            is_child = entry.isdigit() and parent_and_state(int(entry))[0] == pid
            if is_child and b"\0_helper\0" in Path("/proc", entry, "cmdline").read_bytes():  # empty if it has ended
                found.append(int(entry))
    return found


def children_of(pid: int) -> list[int]:
    """Return the child processes of the process `pid`, including those that nobody has waited for."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if parent_and_state(int(entry))[0] == pid:
                found.append(int(entry))
    return found


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended, and that nobody has waited for, does not."""
    try:
        return parent_and_state(pid)[1] != "Z"
    except OSError:
        return False


def parent_and_state(pid: int) -> tuple[int, str]:
    """Return a process's parent, and its state as a letter of ``ps``."""
    fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), fields[0]
