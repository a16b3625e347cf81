"""A fetch is killed again and again, at any moment, and after each kill every file under a real name must be right.

Run it as ``python -m tests.helpers.kills --kills 500 --seed 0``. It needs what the tests need, and `os.fork`.
A model of 12 shards of 1 MiB is fetched by four workers from a server that gives each connection a fixed rate. When a
fetch is complete the cache is deleted, and a new round begins. There are three modes:

random
    A kill comes at any moment. All bytes under real names are right, and at the end nothing is left lying about.
apart
    A kill comes when at least another shard's worth of bytes has been sent since the last one. Then what is sent in all
    must not be over 1.15 times what was fetched, too.
pieces
    As random, but the model has two large shards, each of which comes in pieces, by all workers at once.

What is counted as sent are the bytes of shards that the server's sockets took. What lay in buffers at a kill never
reached the client, and counts, too; so the buffers at both ends are small. Processes are forked from one that has
imported everything (`Zygote`), so that a run takes milliseconds to start.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import urllib3.connection

import ndcache.public  # all of it, before anything is forked
import ndcache.sources.download
import ndcache.store.partial
from ndcache.location.locate import locate

from . import models
from .servers import FileServer

#: Of a body, what is sent at once, and about what sockets hold.
_PIECE_BYTES = 1 << 13
#: A safety net: nothing here takes so long.
_TIMEOUT = 60.0

MODES = ("random", "apart", "pieces")
#: What may be sent in all in the mode ``apart``, in terms of what was fetched.
MOST_SENT = 1.15
#: Of a large shard: its pieces' bytes, and how often a note says what has come of it.
_PIECES, _NOTED = (1 << 14, 1 << 16), 1 << 15


# --- processes ----------------------------------------------------------------------------------------


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
        """Whether it has not ended yet; a stopped one runs."""
        return self._zygote.ended(self._number, 0) is None

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        self._zygote.send("signal", self._number, number)

    def kill(self) -> bool:
        """Send it SIGKILL, and wait for its end. Whether that came too late: it had its result already."""
        self.signal(signal.SIGKILL)
        with contextlib.suppress(Died):
            self.result()
            return True
        return False

    def result(self, timeout: float = _TIMEOUT) -> Any:
        """What its function returned. What the function raised is raised."""
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

    def __init__(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=_zygote, args=(theirs,))
        self._process.start()
        theirs.close()
        self._ended: dict[int, tuple[int, Any]] = {}
        self._started: dict[int, int] = {}
        self._numbers = itertools.count()

    def start(self, function: Callable[..., Any], *args: Any, **options: Any) -> Child:
        """Run ``function(*args, **options)`` in a child."""
        number = next(self._numbers)
        self.send("start", number, (function, args, options))
        while number not in self._started:
            if not self._receive(_TIMEOUT):
                raise TimeoutError("the zygote does not answer")
        return Child(self, number, self._started.pop(number))

    def close(self) -> None:
        """Kill the children that are left, and end."""
        self._pipe.close()
        self._process.join(_TIMEOUT)
        self._process.close()

    def send(self, *order: Any) -> None:
        self._pipe.send(order)

    def ended(self, number: int, timeout: float) -> tuple[int, Any] | None:
        """The exit status and the outcome of a child, as soon as it has ended."""
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


def _zygote(pipe: Connection) -> None:
    """Fork, signal and reap children as ordered, until the other end is closed.

    Only who reaps a process can be sure that its id has not gone to another one, so signals go through here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: it is for whoever started us
    signal.signal(signal.SIGCHLD, lambda *_: None)
    bell, ringer = socket.socketpair()
    bell.setblocking(False)
    ringer.setblocking(False)
    signal.set_wakeup_fd(ringer.fileno(), warn_on_full_buffer=False)
    warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)  # numpy's threads
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
            # What the child forked may still have the other end, so that its end is no sign.
            outcome = results.recv() if results.poll() else None
        del children[number]
        pipe.send(("ended", number, (os.waitstatus_to_exitcode(status), outcome)))


def fork(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> tuple[int, Connection]:
    """Call the function in a fork of this process: its id, and what will give the result and the error."""
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


# --- the server ---------------------------------------------------------------------------------------


class CountingServer(FileServer):
    """Counts the bytes of shards that its sockets take, and can hold a body at a given byte.

    Attributes
    ----------
    sent : Counter of str
        Bytes of shards, by path.
    progress : threading.Condition
        Notified when some have been sent.
    holds : dict of str to tuple of int
        By path, after how many bytes the next body waits for `go`.
    go : threading.Semaphore
        Released once for each time that a body is to go on.
    """

    def __init__(self, directory: Path, *, rate: int | None = None) -> None:
        self.sent: Counter[str] = Counter()
        self.progress = threading.Condition()
        self.holds: dict[str, tuple[int, ...]] = {}
        self.go = threading.Semaphore(0)
        super().__init__(directory, rate=rate)
        # Clients that are killed break connections: nothing to print.
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]

    @property
    def sent_bytes(self) -> int:
        """Bytes of shards in all."""
        with self.progress:
            return sum(self.sent.values())

    def wait_for(self, nbytes: int, timeout: float) -> bool:
        """Whether so many bytes of shards have been sent in all, perhaps after a while."""
        with self.progress:
            return self.progress.wait_for(lambda: sum(self.sent.values()) >= nbytes, timeout)

    def close(self) -> None:
        self.go.release(1000)
        super().close()

    def _send(self, handler: BaseHTTPRequestHandler, body: memoryview) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIECE_BYTES)
        marks = [*self.holds.pop(handler.path, ()), len(body)]
        start, done = time.monotonic(), 0
        try:
            while done < len(body):
                if done == marks[0]:
                    self.go.acquire(timeout=_TIMEOUT)
                    marks.pop(0)
                taken = handler.connection.send(body[done : min(done + _PIECE_BYTES, marks[0])])
                done += taken
                if not handler.path.endswith(".json"):
                    self._count(handler.path, taken)
                ahead = 0.0 if self.rate is None else done / self.rate - (time.monotonic() - start)
                if ahead > 0:
                    time.sleep(ahead)
        except OSError:
            handler.close_connection = True  # the client is gone

    def _count(self, path: str, nbytes: int) -> None:
        with self.progress:
            self.sent[path] += nbytes
            self.progress.notify_all()


# --- a cache directory --------------------------------------------------------------------------------


def model_directory(cache_dir: Path, url: str) -> Path:
    """Where the files of the model go."""
    return cache_dir / "default" / locate(url).cache_key


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file of a directory, by name."""
    return {path.name: sha256(path) for path in directory.iterdir() if path.is_file()}


def check_published(directory: Path, right: Mapping[str, str]) -> int:
    """Every file that a reader could take for one of the model's is what it should be; how many there are."""
    found = digests(directory) if directory.is_dir() else {}
    wrong = [name for name, digest in found.items() if right.get(name) != digest]
    assert not wrong, f"wrong bytes under the names {wrong}"
    return len(found)


def left_behind(directory: Path, *, of_shards: bool = False) -> list[str]:
    """What should not lie there: parts, locks, files taken for bad, and what is remembered of files that are gone.

    With `of_shards`, only parts that hold bytes of shards, and not the small files that a kill left.
    """
    state = directory / ".ndcache"
    found = [f"parts/{name}" for name in _entries(state / "parts") if not of_shards or name.startswith("params_shard")]
    if of_shards:
        found = [name for name in found if ".bin.json." not in name]
    found += [f"{folder}/{name}" for folder in ("locks", "aside") for name in _entries(state / folder)]
    names = [name for name in _entries(state / "validators") if not (directory / name.removesuffix(".json")).exists()]
    return sorted(found + [f"validators/{name}" for name in names])


def make_old(directory: Path, seconds: float = 7200.0) -> None:
    """Let everything that lies in the folder for parts be so much older."""
    for name in _entries(directory / ".ndcache" / "parts"):
        path = directory / ".ndcache" / "parts" / name
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def _entries(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


# --- the kills ----------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What became of one series of kills.

    Attributes
    ----------
    mode : str
    model_bytes : int
        Bytes of the model's shards.
    sent_bytes : int
        Bytes of shards that the server's sockets took.
    rounds : int
        Complete fetches into an empty cache.
    kills : Counter of str
        By what the fetch was at.
    checked : int
        Files that were looked at.
    small_leftovers : int
        Small files that a kill left among the parts, and that a complete fetch did not remove since they were new.
    """

    mode: str
    model_bytes: int
    sent_bytes: int = 0
    rounds: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    small_leftovers: int = 0

    @property
    def ratio(self) -> float:
        """Bytes sent, in terms of what was fetched."""
        return self.sent_bytes / (self.model_bytes * self.rounds)

    def row(self) -> str:
        phases = ", ".join(f"{count} {phase}" for phase, count in sorted(self.kills.items()))
        kills = sum(self.kills.values())
        return (
            f"{self.mode:8}{kills:>6}{self.rounds:>8}{self.ratio:>14.3f}{self.checked:>15}"
            f"{self.small_leftovers:>16}   {phases}"
        )


HEADER = f"{'mode':8}{'kills':>6}{'rounds':>8}{'sent / model':>14}{'files checked':>15}{'small leftovers':>16}   at"


@dataclass
class _Series:
    """What all runs of a series share, and what had been sent when this round began."""

    zygote: Zygote
    server: CountingServer
    cache_dir: Path
    right: Mapping[str, str]
    shard_bytes: int
    figures: Figures
    sent_before: int = 0

    @property
    def directory(self) -> Path:
        return model_directory(self.cache_dir, self.server.url)

    def start(self) -> Child:
        in_pieces = self.figures.mode == "pieces"
        return self.zygote.start(fetch, self.server.url, in_pieces, cache_dir=self.cache_dir, max_workers=4)

    def check(self) -> None:
        self.figures.checked += check_published(self.directory, self.right)

    def wait_for(self, child: Child, sent_bytes: int) -> None:
        """Until so much has been sent in all, or the fetch has ended."""
        while child.is_running and not self.server.wait_for(sent_bytes, 0.02):
            pass

    def finish_round(self) -> None:
        """The fetch is complete: everything is there and right, and nothing else is. Then the cache is deleted."""
        self.check()
        assert _names(self.directory) == set(self.right)
        assert left_behind(self.directory, of_shards=True) == []
        if left := left_behind(self.directory):
            self.figures.small_leftovers += len(left)
            make_old(self.directory)
            self.start().result()
            assert left_behind(self.directory) == []
        self.figures.rounds += 1
        self.sent_before = self.server.sent_bytes
        shutil.rmtree(self.cache_dir)

    def phase(self, requests_before: int) -> str:
        """What the fetch that was killed just now was at, coarsely."""
        if all(request.path.endswith(".json") for request in self.server.requests[requests_before:]):
            return "before shards"
        parts = self.directory / ".ndcache" / "parts"
        sizes = [(parts / name).stat().st_size for name in _entries(parts)]
        unknown = _names(self.directory) - {n.removesuffix(".json") for n in _entries(parts.parent / "validators")}
        return "publishing" if self.shard_bytes in sizes or unknown else "bodies"


def fetch(url: str, in_pieces: bool = False, **options: Any) -> None:
    """Fetch through sockets with small buffers: what is in them at a kill is lost, whatever the client does."""
    if in_pieces:  # in a process of its own
        ndcache.sources.download.RANGE_THRESHOLD, ndcache.sources.download.RANGE_BYTES = 1, _PIECES
        ndcache.store.partial._NOTE_BYTES = _NOTED
    small = (socket.SOL_SOCKET, socket.SO_RCVBUF, _PIECE_BYTES)
    urllib3.connection.HTTPConnection.default_socket_options.append(small)
    ndcache.fetch(url, **options)


def run_kills(
    kills: int, seed: int, mode: str, folder: Path, *, shards: int = 12, shard_bytes: int = 1 << 20, rate: int = 8 << 20
) -> Figures:
    """Kill a fetch `kills` times, and assert all that must be true.

    Parameters
    ----------
    kills, seed : int
    mode : {"random", "apart", "pieces"}
    folder : pathlib.Path
        An empty one, for the model and the cache.
    shards, shard_bytes : int
        The model; with "pieces", its bytes are those of two shards.
    rate : int
        Bytes per second of each connection.
    """
    rng = random.Random(f"{mode} {seed}")
    if mode == "pieces":
        shards, shard_bytes = 2, shards * shard_bytes // 2
    arrays = [{f"t{index}": models.random_array((shard_bytes,), "uint8", index)} for index in range(shards)]
    models.write_model(folder / "model", arrays)
    figures = Figures(mode, shards * shard_bytes)
    with _running(folder / "model", rate) as (zygote, server):
        series = _Series(zygote, server, folder / "cache", digests(folder / "model"), shard_bytes, figures)
        last_kill = 0
        while sum(figures.kills.values()) < kills:
            requests_before = len(server.requests)
            child = series.start()
            if mode == "apart":
                _wait_for_a_shard(series, child, last_kill, rng)
            else:
                _wait_for_anything(series, child, rng)
            if child.kill():
                series.finish_round()
                continue
            last_kill = server.sent_bytes
            figures.kills[series.phase(requests_before)] += 1
            series.check()
        series.start().result()
        series.finish_round()
        figures.sent_bytes = server.sent_bytes
    if mode == "apart":
        assert figures.ratio <= MOST_SENT, f"{figures.ratio:.3f} times the model was sent"
    return figures


def _wait_for_a_shard(series: _Series, child: Child, last_kill: int, rng: random.Random) -> None:
    """Until another shard's worth of bytes has been sent since the last kill, and some more, or the fetch has ended."""
    series.wait_for(child, last_kill + int(series.shard_bytes * rng.uniform(1.0, 2.5)))
    time.sleep(rng.uniform(0.0, 0.01))


def _wait_for_anything(series: _Series, child: Child, rng: random.Random) -> None:
    """Some milliseconds, or until some of what is left has been sent, or the fetch has ended."""
    if rng.random() < 0.3:
        time.sleep(rng.expovariate(50.0))
    else:
        sent = series.server.sent_bytes
        left = max(series.shard_bytes, series.figures.model_bytes - (sent - series.sent_before))
        series.wait_for(child, sent + int(left * rng.uniform(0.0, 1.1)))
        time.sleep(rng.uniform(0.0, 0.02))


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_file()} if directory.is_dir() else set()


@contextlib.contextmanager
def _running(directory: Path, rate: int) -> Iterator[tuple[Zygote, CountingServer]]:
    zygote, server = Zygote(), CountingServer(directory, rate=rate)
    try:
        yield zygote, server
    finally:
        zygote.close()
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=MODES, help="default: one after the other")
    options = parser.parse_args()
    os.environ["no_proxy"] = "127.0.0.1"
    print(HEADER, flush=True)
    for mode in [options.mode] if options.mode else MODES:
        with tempfile.TemporaryDirectory() as folder:
            print(run_kills(options.kills, options.seed, mode, Path(folder)).row(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
