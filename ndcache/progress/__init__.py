"""Progress of a load: reports to callbacks, a bar, lines of a log.

::

    workers           Arrivals: which shards are here, are coming, or wait for another process
    caller's thread   Reporter: counts ─> ProgressReport ─> callbacks, Bar ─> terminal | notebook | lines
"""

from __future__ import annotations

from .arrivals import Arrivals
from .bar import Bar, are_bars_disabled
from .interrupts import telling_what_is_kept
from .phases import TwoPhases
from .reporter import Progress, Reporter
from .reports import ProgressCallback, ProgressReport

__all__ = [
    "Arrivals",
    "Bar",
    "Progress",
    "ProgressCallback",
    "ProgressReport",
    "Reporter",
    "TwoPhases",
    "are_bars_disabled",
    "telling_what_is_kept",
]
