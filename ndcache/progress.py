"""Report the progress of a load, always on the caller's own thread.

A load makes a fixed series of reports. Their texts are word for word those of web-llm, because its users parse them:
``Start to fetch params``, then ``[0/24]``, ``[1/24]``, … ``[24/24]``, each when that many shards are done. The bar of
``progress=True`` also moves between reports.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO, TypeAlias

from tqdm import tqdm

__all__ = ["Bar", "Progress", "ProgressCallback", "ProgressReport", "Reporter"]

_MIB = 1 << 20


@dataclass(frozen=True)
class ProgressReport:
    """One report of a load's progress.

    Attributes
    ----------
    progress : float
        From 0 to 1, by bytes.
    time_elapsed : float
        Seconds since the start.
    cache_only : bool
        Whether every shard was cached at the start.
    text : str
        The report in the words of web-llm.
    phase : str
        ``"start"``, ``"fetch"`` (some shards come over the network) or ``"load"`` (all from cache).
    shards_done, shards_total : int
        How many shards are on the device, and how many are wanted.
    bytes_done, bytes_total : int
        The same in bytes of shards.
    bytes_per_second : float
        The mean since the start.
    """

    progress: float
    time_elapsed: float
    cache_only: bool
    text: str
    phase: str
    shards_done: int
    shards_total: int
    bytes_done: int
    bytes_total: int
    bytes_per_second: float


ProgressCallback: TypeAlias = Callable[[ProgressReport], object]
#: The type of the ``progress`` option.
Progress: TypeAlias = "bool | ProgressCallback | Iterable[bool | ProgressCallback] | None"


class Reporter:
    """Count finished shards, and report to the callbacks.

    Parameters
    ----------
    progress
        The ``progress`` option.
    shard_sizes : iterable of int
        Bytes of each wanted shard.
    cache_only : bool
        Whether all of them are cached.
    received : callable
        Returns the bytes received so far from the network, so that the bar moves within a shard.
    """

    def __init__(
        self,
        progress: Progress,
        shard_sizes: Iterable[int],
        *,
        cache_only: bool,
        received: Callable[[], int] = lambda: 0,
    ) -> None:
        sizes = list(shard_sizes)
        self._callbacks = _callbacks(progress)
        self._shards_total, self._bytes_total = len(sizes), sum(sizes)
        self._shards_done = self._bytes_done = 0
        self._cache_only = cache_only
        self._received = received
        self._started = time.monotonic()

    def start(self) -> None:
        """Make the first two reports: the start, and no shard done."""
        self._report("start", "Start to fetch params")
        self._report()

    def shard_done(self, nbytes: int) -> None:
        """Report that one more shard, of `nbytes`, is done."""
        self._shards_done += 1
        self._bytes_done += nbytes
        self._report()

    def tick(self) -> None:
        """Move the bars. The load calls this about every 0.1 s."""
        for callback in self._callbacks:
            if isinstance(callback, Bar):
                callback.tick(min(max(self._bytes_done, self._received()), self._bytes_total))

    def close(self) -> None:
        """Close the bars, whether or not all shards are done."""
        for callback in self._callbacks:
            if isinstance(callback, Bar):
                callback.close()

    def _done(self) -> tuple[int, int]:
        """Return how much is done, and the total: in bytes, or in shards if all shards are empty."""
        if self._shards_done == self._shards_total:
            return 1, 1
        if self._bytes_total:
            return self._bytes_done, self._bytes_total
        return self._shards_done, self._shards_total

    def _text(self, elapsed: float) -> str:
        done, total = self._done()
        megabytes = -(-self._bytes_done // _MIB)
        state = f"{done * 100 // total}% completed, {math.ceil(elapsed)} secs elapsed."
        position = f"[{self._shards_done}/{self._shards_total}]"
        if self._cache_only:
            return f"Loading model from cache{position}: {megabytes}MB loaded. {state}"
        return (
            f"Fetching param cache{position}: {megabytes}MB fetched. {state}"
            " It can take a while when we first visit this page to populate the cache."
            " Later refreshes will become faster."
        )

    def _report(self, phase: str | None = None, text: str | None = None) -> None:
        if not self._callbacks:
            return
        elapsed = time.monotonic() - self._started
        done, total = self._done()
        report = ProgressReport(
            progress=0.0 if phase == "start" else done / total,
            time_elapsed=elapsed,
            cache_only=self._cache_only,
            text=text or self._text(elapsed),
            phase=phase or ("load" if self._cache_only else "fetch"),
            shards_done=self._shards_done,
            shards_total=self._shards_total,
            bytes_done=self._bytes_done,
            bytes_total=self._bytes_total,
            bytes_per_second=self._bytes_done / elapsed if elapsed > 0 else 0.0,
        )
        for callback in self._callbacks:
            callback(report)


def _callbacks(progress: Progress) -> list[ProgressCallback]:
    if progress is None or progress is False:
        return []
    if progress is True:
        return [Bar()]
    if callable(progress):
        return [progress]
    items = list(progress) if isinstance(progress, Iterable) and not isinstance(progress, str) else [progress]
    callbacks: list[ProgressCallback] = []
    for item in items:
        if item is not True and not callable(item):
            raise TypeError(f"progress must be True or callables, not {item!r}")
        callbacks.append(Bar() if item is True else item)
    return callbacks


class _Tqdm(tqdm):  # type: ignore[type-arg]
    monitor_interval = 0  # no monitor thread, which would outlive the load


def _is_terminal(file: TextIO) -> bool:
    return bool(getattr(file, "isatty", bool)())  # a replacement of standard error may not have the method


def _has_width(file: TextIO) -> bool:
    """Return whether the terminal knows its width. If it says 0 columns, tqdm would draw a bar of that width."""
    try:
        return os.get_terminal_size(file.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):
        return False


class Bar:
    """Show a bar with bytes, rate and remaining time on a terminal; elsewhere, print a line about every 10 percent.

    Parameters
    ----------
    file : text file, optional
        By default standard error; a process without one (``pythonw``) shows no bar.
    """

    #: Without a terminal, lines are at least this many percent apart.
    _LINE_EVERY = 10

    def __init__(self, file: TextIO | None = None) -> None:
        self._file: TextIO | None = sys.stderr if file is None else file
        self._bar: _Tqdm | None = None
        self._next_line = 0

    def __call__(self, report: ProgressReport) -> None:
        if self._file is not None:
            with self._ignoring_closed_file():
                self._show(report, self._file)

    @contextmanager
    def _ignoring_closed_file(self) -> Iterator[None]:
        """Show nothing more if the file cannot be written (closed, full, no reader): that must not end the load."""
        try:
            yield
        except (OSError, ValueError):
            self._file = None
            if self._bar is not None:
                self._bar.disable = True  # or closing it would write once more
                self._bar = None

    def _show(self, report: ProgressReport, file: TextIO) -> None:
        if report.phase == "start":
            self.close()
            self._next_line = 0
            return
        if not _is_terminal(file):
            self._line(report, file)
            return
        if self._bar is None:
            self._bar = _Tqdm(
                total=report.bytes_total,
                desc="Loading" if report.cache_only else "Fetching",
                unit="iB",
                unit_scale=True,
                unit_divisor=1024,
                dynamic_ncols=_has_width(file),
                file=file,
            )
        self._bar.set_postfix_str(f"{report.shards_done}/{report.shards_total} shards", refresh=False)
        self.tick(report.bytes_done)
        if report.shards_done == report.shards_total:
            self.close()

    def tick(self, bytes_done: int) -> None:
        """Move the bar forward, never back."""
        if self._bar is not None:
            with self._ignoring_closed_file():
                self._bar.update(max(bytes_done - self._bar.n, 0))
                self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is, and end its line."""
        if self._bar is not None:
            with self._ignoring_closed_file():
                self._bar.close()
            self._bar = None

    def _line(self, report: ProgressReport, file: TextIO) -> None:
        # Computed in integers: as a float, 29 % may be rounded down to 28.
        percent = report.bytes_done * 100 // report.bytes_total if report.bytes_total else int(report.progress * 100)
        if percent < self._next_line and report.shards_done < report.shards_total:
            return
        self._next_line = percent + self._LINE_EVERY
        verb = "loaded" if report.cache_only else "fetched"
        print(
            f"{verb} {report.shards_done}/{report.shards_total} shards, "
            f"{report.bytes_done / _MIB:.1f} of {report.bytes_total / _MIB:.1f} MiB, {percent}%, "
            f"{report.time_elapsed:.1f} s",
            file=file,
        )
        getattr(file, "flush", bool)()  # may be missing, as isatty may
