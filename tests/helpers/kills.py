"""Kill a fetch again and again, at any moment, and check after each kill that every published file is right.

Run it as ``python -m tests.helpers.kills --kills 500 --seed 0``. It needs what the tests need, and `os.fork`.
Four workers fetch a model of 12 shards of 1 MiB from a server that gives each connection a fixed rate. When a fetch is
complete, the cache is deleted and a new round begins. There are three modes:

random
    Kill at any moment. All published files must be right, and at the end nothing else may be left.
apart
    Kill when at least another shard's worth of bytes has been sent since the last kill. In addition, no more than 1.15
    times the bytes of all complete fetches may be sent.
ranges
    As random, but the model has two large shards, each of which all workers fetch together in ranges.

The bytes that count as sent are those of shards that the server's sockets accepted. This includes bytes that lay in
buffers at a kill and never reached the client, so the buffers at both ends are small. Processes are forked from one
that has imported everything (`Zygote`), so that a run starts within milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import urllib3.connection

import ndcache.api  # with all the rest, before anything is forked
import ndcache.cached
import ndcache.store.partials.file
import ndcache.tvm
from ndcache.format.paths import unflatten
from ndcache.location import locate
from ndcache.sources.downloads import download

from . import models
from .processes import TIMEOUT, Child, Zygote, start_zygote
from .servers import FileServer

#: How much of a body is sent at once, and about how much sockets hold.
_CHUNK_BYTES = 1 << 13

MODES = ("random", "apart", "ranges")
#: The most that may be sent in all in the mode ``apart``, relative to what was fetched.
MOST_SENT = 1.15
#: For large shards: the least and the most bytes of a range, and the bytes after which a note is written.
_RANGE_BYTES, _NOTE_BYTES = (1 << 14, 1 << 16), 1 << 15


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
        By path: after how many bytes the next body waits for `go`.
    go : threading.Semaphore
        Released once for each time that a body is to go on.
    """

    def __init__(self, directory: Path, *, rate: int | None = None) -> None:
        self.sent: Counter[str] = Counter()
        self.progress = threading.Condition()
        self.holds: dict[str, tuple[int, ...]] = {}
        self.go = threading.Semaphore(0)
        super().__init__(directory, rate=rate)
        # Killed clients break connections, which is nothing to print.
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]

    @property
    def sent_bytes(self) -> int:
        """Return how many bytes of shards have been sent in all."""
        with self.progress:
            return sum(self.sent.values())

    def wait_for(self, nbytes: int, timeout: float) -> bool:
        """Wait until so many bytes of shards have been sent in all; return whether they have."""
        with self.progress:
            return self.progress.wait_for(lambda: sum(self.sent.values()) >= nbytes, timeout)

    def close(self) -> None:
        self.go.release(1000)
        super().close()

    def _send(self, handler: BaseHTTPRequestHandler, body: memoryview) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHUNK_BYTES)
        marks = [*self.holds.pop(handler.path, ()), len(body)]
        start, done = time.monotonic(), 0
        try:
            while done < len(body):
                if done == marks[0]:
                    self.go.acquire(timeout=TIMEOUT)
                    marks.pop(0)
                taken = handler.connection.send(body[done : min(done + _CHUNK_BYTES, marks[0])])
                done += taken
                if not handler.path.endswith(".json"):
                    self._count(handler.path, taken)
                ahead = 0.0 if self.rate is None else done / self.rate - (time.monotonic() - start)
                if ahead > 0:
                    time.sleep(ahead)
        except OSError:
            handler.close_connection = True  # the client was killed

    def _count(self, path: str, nbytes: int) -> None:
        with self.progress:
            self.sent[path] += nbytes
            self.progress.notify_all()


# --- a cache directory --------------------------------------------------------------------------------


def model_directory(cache_dir: Path, url: str) -> Path:
    """Return the cache directory of a model."""
    return cache_dir / "default" / locate(url).cache_key


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a directory, by name."""
    return {path.name: sha256(path) for path in directory.iterdir() if path.is_file()}


def check_published(directory: Path, right: Mapping[str, str]) -> int:
    """Check each file that a reader could take for one of the model's; return how many there are."""
    found = digests(directory) if directory.is_dir() else {}
    wrong = [name for name, digest in found.items() if right.get(name) != digest]
    assert not wrong, f"wrong bytes under the names {wrong}"
    return len(found)


def left_behind(directory: Path, *, of_shards: bool = False) -> list[str]:
    """Return what should not be there: partial files, locks, files in quarantine, and notes about missing files.

    With `of_shards`, only those partial files count that hold bytes of shards, and not small files that a kill left.
    """
    state = directory / ".ndcache"
    found = [f"parts/{name}" for name in _entries(state / "parts") if not of_shards or name.startswith("params_shard")]
    if of_shards:
        found = [name for name in found if ".bin.json." not in name]
    found += [f"{folder}/{name}" for folder in ("locks", "aside") for name in _entries(state / folder)]
    names = {name: unflatten(name.removesuffix(".json")) for name in _entries(state / "validators")}
    return sorted(found + [f"validators/{name}" for name, file in names.items() if not (directory / file).exists()])


def make_old(directory: Path, seconds: float = 7200.0) -> None:
    """Make everything in the folder of partial files so many seconds older."""
    for name in _entries(directory / ".ndcache" / "parts"):
        path = directory / ".ndcache" / "parts" / name
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def _entries(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


# --- the kills ----------------------------------------------------------------------------------------


@dataclass
class Figures:
    """Figures of one series of kills.

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
        By the phase of the fetch.
    checked : int
        Files that were checked.
    small_leftovers : int
        Small files that a kill left among the partial files, too new for a complete fetch to remove them.
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
        """Return the bytes sent, relative to what was fetched."""
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
    """State that all runs of a series share; `sent_before` is what had been sent when this round began."""

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
        in_ranges = self.figures.mode == "ranges"
        return self.zygote.start(fetch, self.server.url, in_ranges, cache_dir=self.cache_dir, max_workers=4)

    def check(self) -> None:
        self.figures.checked += check_published(self.directory, self.right)

    def wait_for(self, child: Child, sent_bytes: int) -> None:
        """Wait until so much has been sent in all, or the fetch has ended."""
        while child.is_running and not self.server.wait_for(sent_bytes, 0.02):
            pass

    def finish_round(self) -> None:
        """Check that a fetch is complete and has left nothing else behind, and delete the cache."""
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
        """Return the phase in which the last fetch was killed."""
        if all(request.path.endswith(".json") for request in self.server.requests[requests_before:]):
            return "before shards"
        parts = self.directory / ".ndcache" / "parts"
        sizes = [(parts / name).stat().st_size for name in _entries(parts)]
        unknown = _names(self.directory) - {n.removesuffix(".json") for n in _entries(parts.parent / "validators")}
        return "publishing" if self.shard_bytes in sizes or unknown else "bodies"


def fetch(url: str, in_ranges: bool = False, **options: Any) -> None:
    """Fetch through sockets with small buffers, as their contents are lost at a kill."""
    if in_ranges:  # in a process of its own
        download.RANGE_THRESHOLD, download.RANGE_BYTES = 1, _RANGE_BYTES
        ndcache.store.partials.file._NOTE_BYTES = _NOTE_BYTES
    small = (socket.SOL_SOCKET, socket.SO_RCVBUF, _CHUNK_BYTES)
    urllib3.connection.HTTPConnection.default_socket_options.append(small)
    ndcache.fetch(url, **options)


def run_kills(
    kills: int, seed: int, mode: str, folder: Path, *, shards: int = 12, shard_bytes: int = 1 << 20, rate: int = 8 << 20
) -> Figures:
    """Kill a fetch `kills` times, and check everything that must hold.

    Parameters
    ----------
    kills, seed : int
    mode : {"random", "apart", "ranges"}
    folder : pathlib.Path
        An empty one, for the model and the cache.
    shards, shard_bytes : int
        The model; with "ranges", two shards have its bytes.
    rate : int
        Bytes per second of each connection.
    """
    rng = random.Random(f"{mode} {seed}")
    if mode == "ranges":
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
    """Wait until more than another shard's worth of bytes has been sent since the last kill, or the fetch has ended."""
    series.wait_for(child, last_kill + int(series.shard_bytes * rng.uniform(1.0, 2.5)))
    time.sleep(rng.uniform(0.0, 0.01))


def _wait_for_anything(series: _Series, child: Child, rng: random.Random) -> None:
    """Wait some milliseconds, or until a random share of the rest has been sent, or the fetch has ended."""
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
    zygote, server = start_zygote(), CountingServer(directory, rate=rate)
    try:
        yield zygote, server
    finally:
        zygote.close()
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=MODES, help="default: all of them")
    options = parser.parse_args()
    os.environ["no_proxy"] = "127.0.0.1"
    print(HEADER, flush=True)
    for mode in [options.mode] if options.mode else MODES:
        with tempfile.TemporaryDirectory() as folder:
            print(run_kills(options.kills, options.seed, mode, Path(folder)).row(), flush=True)


if __name__ == "__main__":
    main()
