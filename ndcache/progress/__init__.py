"""Progress of a load: reports to callbacks, a bar, lines of a log.

::

    workers           Arrivals: which shards are here, are coming, or wait for another process
    caller's thread   Opening, until the model is open ─────────────────> Bar ─> terminal | notebook | lines
                      Reporter: counts ─> ProgressReport ─> callbacks, Bar
"""

from __future__ import annotations

from .arrivals import Arrivals
from .bar import Bar, are_bars_disabled
from .interrupts import telling_what_is_kept
from .opening import Opening, callbacks_of
from .phases import TwoPhases
from .reporter import Reporter
from .reports import Progress, ProgressCallback, ProgressReport

__all__ = [
    "Arrivals",
    "Bar",
    "Opening",
    "Progress",
    "ProgressCallback",
    "ProgressReport",
    "Reporter",
    "TwoPhases",
    "are_bars_disabled",
    "callbacks_of",
    "telling_what_is_kept",
]
