"""Measure a load, and beside it what the network, the disk and the device give on their own.

Nothing is read from the user's cache or written to it. All files lie in a temporary directory, on the same disk if that
can be written to, which is removed at the end, even after an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NdcacheError
from ..format.manifest import NameFilter
from ..format.writer import dump
from ..loader import Loader
from ..loaders.probe import local_files, measure_network
from ..processes.how_many import usable_cores
from ..progress import Progress
from ..report.words import format_count
from ..stats import LoadStats
from ..store.lock import try_lock
from .group import one_line

__all__ = ["BenchReport", "Rate", "run_bench", "temporary_cache"]

_MOST_BYTES = 256 << 20
_MOST_SECONDS = 10.0
#: Less is over too soon to be measured.
_LEAST_BYTES = 16 << 20
_LEAST_DEVICE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
_COPIES = 4
#: A load that reaches less than this part of each rate was limited by something else.
_NEAR = 0.5
#: Seconds after which a temporary cache without a lock is no new one.
_NEW = 60.0
_PREFIX = ".ndcache-bench-"


@dataclass(frozen=True)
class Rate:
    """Rate of a part of this machine.

    Attributes
    ----------
    name : str
        ``"network"``, ``"disk, write"``, ``"disk, read"`` or ``"device"``.
    bytes_per_second : float or None
        None if the load needs no network, or it could not be measured.
    share : float or None
        The part of it that the load used; None if the load did not use it, or it could not be measured.
    how : str
        How it was measured.
    """

    name: str
    bytes_per_second: float | None
    share: float | None
    how: str


@dataclass(frozen=True)
class BenchReport:
    """A load, and the rates beside it.

    Attributes
    ----------
    stats : LoadStats
    tensors : int
    nbytes : int
        Bytes of the tensors.
    device : object
        The `Weights.device` of the load.
    rates : tuple of Rate
    trace : object
        The content of the load's trace.
    is_limited : bool
        Whether the loader has a `limit_rate`.
    """

    stats: LoadStats
    tensors: int
    nbytes: int
    device: Any
    rates: tuple[Rate, ...]
    trace: Any
    is_limited: bool = False

    @property
    def seconds(self) -> float:
        """Return the seconds of the load."""
        return self.stats.seconds["total"]

    @property
    def limit(self) -> Rate | None:
        """Return the rate that the load came closest to, if it came near."""
        known = [rate for rate in self.rates if rate.share is not None]
        nearest = max(known, key=lambda rate: rate.share or 0.0, default=None)
        return nearest if nearest is not None and (nearest.share or 0.0) >= _NEAR else None


def run_bench(
    loader: Loader,
    source: str,
    device: str,
    folder: Path,
    *,
    names: tuple[str, ...] = (),
    is_limited: bool = False,
    progress: Progress = None,
    report: str | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> BenchReport:
    """Load a model once, and measure the network, the disk and the device.

    Parameters
    ----------
    loader : Loader
        Its cache must be empty.
    source : str
    device : str
        As for `ndcache.load`.
    folder : pathlib.Path
        An empty directory on the disk of the cache, for temporary files.
    names : tuple of str
        Patterns of the tensors to load; all if there is none.
    is_limited : bool
        Whether the loader has a `limit_rate`.
    progress
        As for `ndcache.load`.
    report : str, optional
        As for `ndcache.load`.
    say : callable
        Called with a line about each step.

    Returns
    -------
    BenchReport

    Raises
    ------
    ValueError, OSError, NdcacheError
        As for `ndcache.load`.
    """
    path, wanted = folder / "trace.json", names or None
    with loader.load(source, device, names=wanted, files=False, progress=progress, trace=path, report=report) as loaded:
        stats, tensors, nbytes, opened = loaded.stats, len(loaded), loaded.nbytes, loaded.device
        # On the CPU, those that cannot be written to are views of the files, and cost nothing.
        moved = [name for name, each in loaded.items() if opened != "cpu" or each.flags.writeable]
        used = _Used(
            stats,
            read=sum(loaded.manifest[name].nbytes for name in moved),
            moved=sum(loaded[name].nbytes for name in moved),
        )
    trace = json.loads(path.read_bytes())
    say("measuring the network")
    network = _measure_network(loader, source, wanted, trace, used, is_limited=is_limited)
    say("measuring the disk")
    local = local_files(loader, source, wanted) if network is None else None
    disk = [_measure_write(folder, stats, used), _measure_read(folder, local, used)]
    say("measuring the device")
    copied = _measure_device(folder, device, used, is_cpu=opened == "cpu")
    absent = Rate("network", None, None, "not needed: the source is local")
    rates = (network or absent, *disk, copied)
    return BenchReport(stats, tensors, nbytes, opened, rates, trace, is_limited)


@contextlib.contextmanager
def temporary_cache(root: Path) -> Iterator[Path]:
    """Yield a fresh directory on the disk of the cache `root`, or elsewhere if that cannot be written to.

    It is removed at the end. Meanwhile, no command takes it for a part of the cache.
    """
    there = next((path for path in (root, *root.parents) if path.is_dir()), None)
    usable = there if there is not None and os.access(there, os.W_OK) else None
    if usable is not None:
        _remove_leftovers(usable)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=usable, ignore_cleanup_errors=True) as folder:
        # One level deeper than a model of the cache would be: `ls` shows no model there, and `rm --all` removes none.
        inner = Path(folder, "bench")
        inner.mkdir()
        try:
            with try_lock(Path(folder, "lock")):
                yield inner
        except BaseException as error:
            if not isinstance(error, Exception):
                error.args = ()  # an interrupted load says that it kept something
            raise


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary caches of processes that were killed."""
    for left in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _NEW:
                with try_lock(left / "lock") as is_held:
                    if is_held:
                        shutil.rmtree(left)


@dataclass(frozen=True)
class _Used:
    """The bytes per second of a load.

    Attributes
    ----------
    stats : LoadStats
    read : int
        Bytes in the files of tensors that are no views of them.
    moved : int
        Bytes of these tensors, which were copied or expanded.
    """

    stats: LoadStats
    read: int
    moved: int

    def share(self, nbytes: int, rate: float | None) -> float | None:
        """Return the part of a rate that the load used, or None if it used nothing."""
        return nbytes / self.stats.seconds["total"] / rate if nbytes and rate else None


def _per_second(nbytes: int, seconds: float) -> float | None:
    return nbytes / seconds if nbytes and seconds > 0 else None


def _mib(nbytes: float) -> str:
    return f"{nbytes / (1 << 20):,.1f} MiB"


def _measure_network(
    loader: Loader, source: str, names: NameFilter, trace: Any, used: _Used, *, is_limited: bool
) -> Rate | None:
    """Return the rate of the network, or None if the source is local."""
    processes = int(trace["otherData"].get("processes") or 1)
    try:
        found = measure_network(
            loader, source, names, processes=processes, max_bytes=_MOST_BYTES, max_seconds=_MOST_SECONDS
        )
    except NdcacheError as error:
        return Rate("network", None, None, f"not measured: {one_line(error)}")
    if found is None:
        return None
    connections = format_count(found.connections, "connection")
    limited = ", within --limit-rate" if is_limited else ""
    how = f"{_mib(found.nbytes)} over {connections}, neither checked nor kept{limited}"
    rate = _per_second(found.nbytes, found.seconds)
    return Rate("network", rate, used.share(used.stats.network_bytes, rate), how)


def _measure_write(folder: Path, stats: LoadStats, used: _Used) -> Rate:
    """Write a file as a download does."""
    nbytes = max(_LEAST_BYTES, min(stats.nbytes, _MOST_BYTES)) // _BLOCK_BYTES * _BLOCK_BYTES
    block = np.random.default_rng(0).bytes(_BLOCK_BYTES)  # a file system that compresses must not gain by it
    try:
        with (folder / "disk").open("wb", buffering=0) as file:
            begun, written = time.perf_counter(), 0
            while written < nbytes and time.perf_counter() - begun < _MOST_SECONDS:
                written += file.write(block)
            os.fsync(file.fileno())
            rate = _per_second(written, time.perf_counter() - begun)
    except OSError as error:
        return Rate("disk, write", None, None, f"not measured: {error.strerror}")
    return Rate("disk, write", rate, used.share(stats.network_bytes, rate), f"{_mib(written)} in one file, with fsync")


def _measure_read(folder: Path, local: Sequence[str] | None, used: _Used) -> Rate:
    """Read the files of a local source, or the file that was written, from the disk: not from memory."""
    files = [folder / "disk"] if local is None else local
    try:
        begun, nbytes, seconds = time.perf_counter(), 0, 0.0
        for path in files:
            if nbytes < _MOST_BYTES and time.perf_counter() - begun < _MOST_SECONDS:
                took, read = _read(path, _MOST_BYTES - nbytes)
                seconds, nbytes = seconds + took, nbytes + read
        (folder / "disk").unlink()
    except OSError as error:
        return Rate("disk, read", None, None, f"not measured: {error.strerror}")
    how = f"{_mib(nbytes)} of {'the model' if local is not None else 'that file'}, dropped from memory before"
    rate = _per_second(nbytes, seconds)
    share = None if local is None else used.share(used.read, rate)
    if share is not None and share > 1:
        return Rate("disk, read", rate, None, f"{how}; the load found it in memory")
    return Rate("disk, read", rate, share, how)


def _read(path: str | os.PathLike[str], most: int) -> tuple[float, int]:
    """Drop a file from the system's page cache; return the seconds to read so many bytes of it, and the bytes."""
    buffer, nbytes = bytearray(_BLOCK_BYTES), 0
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        while nbytes < most and (read := file.readinto(buffer)):
            nbytes += read
        return time.perf_counter() - begun, nbytes


def _measure_device(folder: Path, device: str, used: _Used, *, is_cpu: bool) -> Rate:
    """Copy on the CPU; onto another device, load a model that lies in the page cache."""
    nbytes = max(_LEAST_DEVICE_BYTES, min(used.moved, _MOST_BYTES)) >> 20 << 20
    values = np.ones(nbytes, np.uint8)
    if is_cpu:
        threads = min(usable_cores(), 8)
        rate = _per_second(nbytes * _COPIES, _copy(values, threads))
        how = f"{_mib(nbytes * _COPIES)} copied by {format_count(threads, 'thread')}"
        if not used.moved:
            how += "; the load maps its files, and copies nothing"
        return Rate("device", rate, used.share(used.moved, rate), how)
    parts = {f"part.{index}": part for index, part in enumerate(np.split(values, 16))}
    dump(parts, folder / "model", shard_bytes=nbytes // 8)
    with Loader() as loader:
        for _ in range(2):  # the first time, the driver makes its buffers and compiles
            with loader.load(folder / "model", device, files=False, progress=False) as weights:
                rate = _per_second(nbytes, weights.stats.seconds["total"])
    return Rate("device", rate, used.share(used.moved, rate), f"{_mib(nbytes)} from the page cache onto it")


def _copy(values: NDArray[np.uint8], threads: int) -> float:
    """Copy an array several times, with several threads; return the seconds."""
    copy = np.empty_like(values)
    pairs = list(zip(np.array_split(copy, threads), np.array_split(values, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda pair: np.copyto(*pair), pairs):
            pass  # the system gives memory when it is written to for the first time
        begun = time.perf_counter()
        for _ in pool.map(lambda pair: np.copyto(*pair), pairs * _COPIES):
            pass
        return time.perf_counter() - begun
