"""One file, several workers: what is still to come of it, in pieces that each takes when it has nothing else to do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..store.ranges import ByteRange, ByteRanges
from ..workers.cancellation import Cancellation

__all__ = ["RangeQueue", "RangeTask"]


@dataclass(eq=False)
class RangeTask:
    """A stretch of a file that one worker brings.

    Attributes
    ----------
    start, end : int
        As it was taken.
    position : int
        Up to where it has come.
    """

    start: int
    end: int
    position: int = field(init=False)

    def __post_init__(self) -> None:
        self.position = self.start

    @property
    def span(self) -> ByteRange:
        """What is still to come of it."""
        return self.position, self.end


class RangeQueue:
    """The stretches of a file that are still to come, shared out piece by piece.

    Its owner is the worker whose file it is: it takes pieces as its helpers do, waits only when they have all that is
    left, and ends it before it does anything else with the file.

    Parameters
    ----------
    ranges : ByteRanges
    cancellation : Cancellation
        Of the load.
    limits : tuple of int, optional
        Bytes of a piece, at least and at most; without, a stretch is one piece.
    most : int
        How many helpers there may be. Pieces are smaller towards the end, so that all are done at about the same time.

    Attributes
    ----------
    cancellation : Cancellation
        Of the helpers.
    """

    def __init__(
        self, ranges: ByteRanges, cancellation: Cancellation, limits: tuple[int, int] | None = None, most: int = 0
    ) -> None:
        self.cancellation = cancellation.child()
        self._left = ByteRanges(ranges)
        self._limits = limits
        self._most = self._vacant = most if limits is not None else 0
        self._is_first = True
        self._helping = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def helpers_wanted(self) -> int:
        """How many helpers to ask for now: as many as there is work for; later, for one that failed, one at a time."""
        with self._changed:
            assert self._limits is not None or not self._vacant
            least = self._limits[0] if self._limits is not None else 1
            wanted = sum(-(-(end - start) // least) for start, end in self._left)
            count = min(self._vacant, wanted if self._is_first else min(wanted, 1))
            self._vacant, self._is_first = (0 if self._is_first else self._vacant - count), False
            return count

    def take(self) -> RangeTask | None:
        """The owner's next piece; None if there is none to take."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            return self._cut()

    def put_back(self, piece: RangeTask) -> None:
        """What has not come of a piece is there to be taken again."""
        with self._changed:
            if piece.position < piece.end:
                self._left.add(piece.position, piece.end)
            self._changed.notify_all()

    @contextmanager
    def help(self) -> Iterator[RangeTask | None]:
        """A helper's next piece, given back at the end of the block; None if there is none to take."""
        with self._changed:
            piece = None if self.cancellation.is_set else self._cut()
            self._helping += 1
        try:
            yield piece
        finally:
            with self._changed:
                self._helping -= 1
                if piece is not None and piece.position < piece.end:
                    self._left.add(piece.position, piece.end)
                self._changed.notify_all()

    def helper_done(self, failure: BaseException | None = None) -> None:
        """A helper goes; with it goes what should never have happened, for the owner to raise."""
        with self._changed:
            self._vacant += 1
            self._failure = failure or self._failure

    def wait(self) -> None:
        """Wait until there is something to take, or no helper is at work."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._left) or not self._helping)

    def end(self) -> None:
        """Have no helper at work any more."""
        self.cancellation.set()
        with self._changed:
            self._changed.wait_for(lambda: not self._helping)

    def _cut(self) -> RangeTask | None:
        if not len(self._left):
            return None
        start, end = next(iter(self._left))
        if self._limits is not None:
            least, most = self._limits
            end = min(end, start + max(least, min(most, self._left.nbytes // (2 * (self._most + 1)))))
        self._left = self._left.without(ByteRanges([(start, end)]))
        return RangeTask(start, end)
