"""Which bytes of a file there are, or are wanted: stretches from one offset up to another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

__all__ = ["ByteRange", "ByteRanges"]

#: The first byte, and the one after the last.
ByteRange: TypeAlias = tuple[int, int]


class ByteRanges:
    """A set of bytes of a file, as stretches in order that neither overlap nor touch.

    Parameters
    ----------
    ranges : iterable of Span
    gap : int
        How many bytes there may be between two stretches that are made one: bytes that are not worth leaving out.
        Default 0.
    """

    def __init__(self, ranges: Iterable[ByteRange] = (), *, gap: int = 0) -> None:
        self._spans: list[ByteRange] = []
        for start, end in sorted(ranges):
            if start == end:
                continue
            if self._spans and start <= self._spans[-1][1] + gap:
                first, last = self._spans[-1]
                self._spans[-1] = first, max(last, end)
            else:
                self._spans.append((start, end))

    def __iter__(self) -> Iterator[ByteRange]:
        return iter(self._spans)

    def __len__(self) -> int:
        """The number of stretches."""
        return len(self._spans)

    def __repr__(self) -> str:
        return f"ByteRanges({self._spans})"

    @property
    def nbytes(self) -> int:
        """All bytes together."""
        return sum(end - start for start, end in self._spans)

    @property
    def prefix(self) -> int:
        """How many bytes there are from the file's beginning on."""
        return self._spans[0][1] if self._spans and self._spans[0][0] == 0 else 0

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self._spans[-1][1] if self._spans else 0

    def add(self, start: int, end: int) -> None:
        """One more stretch."""
        for index, (first, last) in enumerate(self._spans):
            if last == start and (index + 1 == len(self._spans) or end < self._spans[index + 1][0]):
                self._spans[index] = first, end  # what a file that is being written does nearly always
                return
        self._spans = ByteRanges([*self._spans, (start, end)])._spans

    def without(self, others: ByteRanges) -> ByteRanges:
        """What of these bytes is not among the others."""
        left = []
        for start, end in self:
            at = start
            for first, last in others:
                if last > at and first < end:
                    left.append((at, max(at, first)))
                    at = last
            left.append((at, max(at, end)))
        return ByteRanges(left)
