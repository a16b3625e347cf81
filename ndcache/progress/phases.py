"""The two phases that web-llm reports of a load over the network: first the download, then the load from cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .arrivals import Arrivals
from .reports import ProgressCallback, ProgressReport, report_text

__all__ = ["TwoPhases"]


@dataclass
class TwoPhases:
    """Report the download of all shards, and then the load of all shards, to callbacks.

    Both run at the same time. So the reports of the second phase begin when all shards are here, and the first of them
    come at once. If all shards were cached at the start, there is no first phase.

    Parameters
    ----------
    callbacks : sequence of ProgressCallback
    interval : float, optional
        Seconds between reports beside those of the shards; by default there are none.
    """

    callbacks: Sequence[ProgressCallback]
    interval: float | None = None
    _arrivals: Arrivals = field(default_factory=Arrivals, init=False)
    _fetched: int = field(default=-1, init=False)  # the last number of shards that was reported; -1 before the first
    _loaded: int = field(default=-1, init=False)
    _next: float = field(default=0.0, init=False)

    def begin(self, arrivals: Arrivals, interval: float | None) -> None:
        """Prepare for the reports of one load."""
        self._arrivals, self.interval = arrivals, interval
        self._fetched = self._loaded = -1

    def __call__(self, report: ProgressReport) -> None:
        """Take a report of a load in one phase."""
        if report.phase == "start" or report.cache_only:
            if report.is_shard or self._is_due(report):
                self._tell(report)
            return
        sizes = [self._arrivals.size(name) for name in self._arrivals.names]
        for count in range(self._fetched + 1, len(sizes) + 1):
            self._tell(_shard_report(report, "fetch", count, sum(sizes[:count])))
            self._fetched = count
        is_fetched = self._fetched >= report.shards_total
        if is_fetched:
            placed = [0, *itertools.accumulate(self._arrivals.sizes)]
            for count in range(self._loaded + 1, report.shards_done + 1):
                self._tell(_shard_report(report, "load", count, placed[count]))
                self._loaded = count
        if not report.is_shard and self._is_due(report):
            done = report.shards_done if is_fetched else self._fetched
            nbytes = placed[done] if is_fetched else report.bytes_done
            self._tell(replace(_shard_report(report, "load" if is_fetched else "fetch", done, nbytes), is_shard=False))

    def _is_due(self, report: ProgressReport) -> bool:
        if self.interval is None or report.time_elapsed < self._next:
            return False
        self._next = report.time_elapsed + self.interval
        return True

    def _tell(self, report: ProgressReport) -> None:
        for callback in self.callbacks:
            callback(report)


def _shard_report(report: ProgressReport, phase: str, count: int, nbytes: int) -> ProgressReport:
    """Return a report of one phase."""
    total = report.shards_total
    done = (nbytes, report.bytes_total) if report.bytes_total else (count, total)
    if count == total:
        done = 1, 1
    return replace(
        report,
        progress=done[0] / done[1],
        text=report_text(phase, count, total, nbytes, done, report.time_elapsed),
        phase=phase,
        shards_done=count,
        bytes_done=nbytes,
        is_shard=True,
    )
