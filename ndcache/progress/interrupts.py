"""Tell the user who interrupts a load what was kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..report.words import format_size
from .arrivals import Arrivals

__all__ = ["telling_what_is_kept"]


@contextmanager
def telling_what_is_kept(arrivals: Arrivals, are_kept: Callable[[], bool]) -> Iterator[None]:
    """Say in the text of a KeyboardInterrupt, or of what a handler of another signal raises, how much was kept.

    Parameters
    ----------
    arrivals : Arrivals
    are_kept : callable
        Return whether what has arrived is kept at all.
    """
    try:
        yield
    except BaseException as error:
        is_interrupt = not isinstance(error, (Exception, GeneratorExit, SystemExit))
        if is_interrupt and not error.args and are_kept() and (nbytes := arrivals.nbytes):
            error.args = (f"{format_size(nbytes).replace('.0 ', ' ')} kept; run it again to go on",)
        raise
