"""Report the progress of a load, always on the caller's own thread.

A load makes a fixed series of reports. Their texts are word for word those of web-llm, because its users parse them:
``Start to fetch params``, then ``[0/24]``, ``[1/24]``, … ``[24/24]``, each when that many shards are done. Bars, and
callbacks that ask for it, also get reports in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

from .arrivals import Arrivals
from .bar import Bar, Summary
from .opening import callbacks_of
from .phases import TwoPhases
from .rate import Rate
from .reports import Progress, ProgressCallback, ProgressReport, report_text

__all__ = ["Reporter"]

#: Seconds between reports to bars. The load calls `Reporter.tick` about as often.
_TICK = 0.1
#: Seconds without a byte after which a report says whom the load waits for.
_STILL = 1.0


@dataclass
class _Listener:
    """A callback, and how often it is called between the reports of shards.

    Attributes
    ----------
    callback : ProgressCallback
    interval : float or None
        In seconds; None for never.
    due : float
        When it is called next.
    """

    callback: ProgressCallback
    interval: float | None
    due: float = 0.0


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
    arrivals : Arrivals, optional
        What is here and what is coming, so that bytes count as they come, in any order.
    received : callable, optional
        Returns the bytes received so far from the network, which the rate is computed from, with those that other
        processes brought. By default, the rate is that of what is done.
    done : callable, optional
        Returns the bytes that are done, if everything is on disk: by default, those of finished shards.
    interval : float, optional
        Seconds between the reports to callbacks beside those of shards. By default there are none.
    model : str
        The model's name, of parts separated by slashes; the last part says most.
    verb : str, optional
        What is done, for bars. Default: ``"Loading"`` if all shards are cached, else ``"Fetching"``.
    how : callable
        Returns how a cached model was loaded, for bars: see `Summary`.
    absent : callable
        Returns the bytes of each shard that counts as done because it is missing.
    opening : float, default 0.0
        Seconds that the load took until now. The last line of a bar counts them, as `LoadStats` does.
    """

    def __init__(
        self,
        progress: Progress,
        shard_sizes: Iterable[int],
        *,
        cache_only: bool,
        arrivals: Arrivals | None = None,
        received: Callable[[], int] | None = None,
        done: Callable[[], int] | None = None,
        interval: float | None = None,
        model: str = "",
        verb: str | None = None,
        how: Callable[[], str] = lambda: "Loaded",
        absent: Callable[[], Sequence[int]] = tuple,
        opening: float = 0.0,
    ) -> None:
        sizes = list(shard_sizes)
        self._listeners = [self._listen(callback, interval) for callback in callbacks_of(progress)]
        self._arrivals = Arrivals() if arrivals is None else arrivals
        self._shards_total, self._bytes_total = len(sizes), sum(sizes)
        self._shards_done = self._bytes_done = self._part_bytes = 0
        self._told = 0  # the most bytes of any report: the next ones never go back
        self._most_own = 0  # the same without those that other processes brought
        self._brought = 0  # by other processes, when the wait began
        self._waiting: str | None = None
        self._next_look = 0.0
        self._cache_only = cache_only
        self._count_done = done or self._count_placed
        self._received = self._count_done if received is None or cache_only else received
        self._model = model
        self._how = how
        self._absent = absent
        self._opening = opening
        self._started = self._moved = time.monotonic()
        self._received_before = self._came()
        self._rate = Rate(self._started, self._received_before)
        for listener in self._listeners:
            if isinstance(listener.callback, TwoPhases):
                listener.callback.begin(self._arrivals, interval)
            elif isinstance(listener.callback, Bar):
                listener.callback.begin(model, verb or ("Loading" if cache_only else "Fetching"))

    @property
    def is_heard(self) -> bool:
        """Return whether anybody wants reports between those of shards."""
        return any(listener.interval is not None for listener in self._listeners)

    def start(self) -> None:
        """Make the first two reports: the start, and no shard done."""
        now = time.monotonic()
        for listener in self._listeners:
            listener.due = now + (listener.interval or 0.0)
        self._report("start")
        self._report()

    def part_done(self, nbytes: int) -> None:
        """Note that so many more bytes of the next shard are on the device; make no report."""
        self._part_bytes += nbytes

    def shard_done(self, nbytes: int) -> None:
        """Report that one more shard, of `nbytes`, is done."""
        self._shards_done += 1
        self._bytes_done += nbytes
        self._part_bytes = 0
        self._moved = time.monotonic()
        self._report()

    def tick(self) -> None:
        """Make the reports between those of shards that are due. The load calls this about every 0.1 s."""
        now = time.monotonic()
        due = [each for each in self._listeners if each.interval is not None and now >= each.due]
        if not due:
            return
        report = self._make(now, is_shard=False, is_exact=False)
        for listener in due:
            assert listener.interval is not None
            # On average as often as asked for, although ticks come late.
            listener.due = max(listener.due + listener.interval, now)
            listener.callback(report)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(is_done=kind is None)

    def close(self, *, is_done: bool) -> None:
        """End the bars: with a summary, if the load is done."""
        for listener in self._listeners:
            if isinstance(listener.callback, Bar):
                listener.callback.end(self._summary() if is_done else None)

    def _count_placed(self) -> int:
        return self._bytes_done + self._part_bytes

    def _came(self) -> int:
        return self._received() + (0 if self._cache_only else self._arrivals.brought)

    @staticmethod
    def _listen(callback: ProgressCallback, interval: float | None) -> _Listener:
        return _Listener(callback, _TICK if isinstance(callback, (Bar, TwoPhases)) else interval)

    def _report(self, phase: str | None = None) -> None:
        """Report to all. Those who get no other reports get the numbers of whole shards."""
        if not self._listeners:
            return
        now, made = time.monotonic(), dict[bool, ProgressReport]()
        for listener in self._listeners:
            is_exact = listener.interval is None
            if is_exact not in made:
                made[is_exact] = self._make(now, phase, is_exact=is_exact)
            listener.callback(made[is_exact])

    def _make(self, now: float, phase: str | None = None, *, is_shard: bool = True, is_exact: bool) -> ProgressReport:
        elapsed, phase = now - self._started, phase or ("load" if self._cache_only else "fetch")
        self._rate.add(now, self._came())
        nbytes = self._bytes_done if is_exact or phase == "start" else self._bytes_here(now)
        done, total = self._fraction(nbytes)
        waiting, rate = self._find_waiting(now), self._rate.per_second
        return ProgressReport(
            progress=0.0 if phase == "start" else done / total,
            time_elapsed=elapsed,
            cache_only=self._cache_only,
            text=report_text(phase, self._shards_done, self._shards_total, nbytes, (done, total), elapsed),
            phase=phase,
            shards_done=self._shards_done,
            shards_total=self._shards_total,
            bytes_done=nbytes,
            bytes_total=self._bytes_total,
            bytes_per_second=rate,
            is_shard=is_shard,
            shards_here=self._shards_done if self._cache_only else max(self._shards_done, len(self._arrivals.names)),
            seconds_left=(self._bytes_total - nbytes) / rate if rate > 0 else None,
            waiting=waiting,
            model=self._model.rpartition("/")[2],
        )

    def _bytes_here(self, now: float) -> int:
        """Return how many bytes are here, which never are fewer than before, and note when this load got some."""
        if self._cache_only:
            here, own = self._count_done(), self._count_done()
        else:
            here = max(self._count_placed(), self._arrivals.nbytes)
            own = here - self._arrivals.brought
        if own > self._most_own:
            self._most_own, self._moved = own, now
        self._told = max(self._told, min(here, self._bytes_total))
        return self._told

    def _find_waiting(self, now: float) -> str | None:
        """Return whom the load waits for; look only now and then."""
        if now - self._moved < _STILL:
            if self._waiting is not None and self._arrivals.brought == self._brought:
                self._rate.restart()
            self._waiting = None
        elif now >= self._next_look:
            if self._waiting is None:
                self._brought = self._arrivals.brought
            self._waiting, self._next_look = self._arrivals.waiting, now + _STILL
        return self._waiting

    def _fraction(self, nbytes: int) -> tuple[int, int]:
        """Return how much is done, and the total: in bytes, or in shards if all shards are empty."""
        if self._shards_done == self._shards_total:
            return 1, 1
        return (nbytes, self._bytes_total) if self._bytes_total else (self._shards_done, self._shards_total)

    def _summary(self) -> Summary:
        absent = self._absent()
        return Summary(
            how=self._how() if self._cache_only else "Fetched",
            nbytes=self._bytes_total - sum(absent),
            shards=self._shards_total - len(absent),
            received=self._came() - self._received_before - sum(absent),
            seconds=self._opening + time.monotonic() - self._started,
            absent=len(absent),
        )
