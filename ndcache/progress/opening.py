"""Tell what a call waits for while it opens a model, before its `Reporter` knows what there is to do."""

from __future__ import annotations

import time
from collections.abc import Iterable

from .arrivals import Arrivals
from .bar import Bar
from .reports import Progress, ProgressCallback, ProgressReport

__all__ = ["Opening", "callbacks_of"]

#: Seconds after which a bar appears. Most models are open by then.
_DELAY = 1.0
#: Seconds between two reports.
_TICK = 0.1


def callbacks_of(progress: Progress) -> list[ProgressCallback]:
    """Return the callables of the ``progress`` option, with a bar in the place of each True."""
    if progress is None or progress is False:
        return []
    if progress is True:
        return [*Bar.wanted()]
    if callable(progress):
        return [progress]
    items = list(progress) if isinstance(progress, Iterable) and not isinstance(progress, str) else [progress]
    callbacks: list[ProgressCallback] = []
    for item in items:
        if item is not True and not callable(item):
            raise TypeError(f"progress must be True or callables, not {item!r}")
        callbacks += Bar.wanted() if item is True else [item]
    return callbacks


class Opening:
    """Let bars say what a call waits for, if it takes long to open a model.

    Parameters
    ----------
    callbacks : iterable of ProgressCallback
        Those that are no bars get no reports.
    model : str
        The model's name, of parts separated by slashes; the first part is the server.
    arrivals : Arrivals
        Knows why requests are made again.
    """

    def __init__(self, callbacks: Iterable[ProgressCallback], model: str, arrivals: Arrivals) -> None:
        self._bars = [callback for callback in callbacks if isinstance(callback, Bar)]
        self._model = model
        self._arrivals = arrivals
        self._started = time.monotonic()
        self._due = self._started + _DELAY

    def tick(self) -> None:
        """Report if it is time to. The call does this about every 0.1 s."""
        if (now := time.monotonic()) < self._due:
            return
        self._due = now + _TICK
        waiting = self._arrivals.waiting or f"waiting for {self._model.partition('/')[0]}: manifest"
        elapsed = now - self._started
        report = ProgressReport(0.0, elapsed, False, "", "fetch", 0, 0, 0, 0, 0.0, is_shard=False, waiting=waiting)
        for bar in self._bars:
            bar.open(self._model, report)

    def close(self) -> None:
        """End the bars, unless the `Reporter` of a load has taken them over."""
        for bar in self._bars:
            bar.close_opening()
