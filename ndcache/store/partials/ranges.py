"""Byte ranges of a file, such as the bytes that are there, or those that are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

__all__ = ["ByteRange", "ByteRanges"]

#: The first byte, and the one after the last.
ByteRange: TypeAlias = tuple[int, int]


class ByteRanges:
    """A set of bytes of a file, as ranges in ascending order that neither overlap nor touch.

    Parameters
    ----------
    ranges : iterable of ByteRange
        In any order. They may overlap.
    gap : int
        Merge two ranges that are at most this many bytes apart. Default 0.
    """

    def __init__(self, ranges: Iterable[ByteRange] = (), *, gap: int = 0) -> None:
        self._ranges: list[ByteRange] = []
        for start, end in sorted(ranges):
            if start == end:
                continue
            if self._ranges and start <= self._ranges[-1][1] + gap:
                first, last = self._ranges[-1]
                self._ranges[-1] = first, max(last, end)
            else:
                self._ranges.append((start, end))

    def __iter__(self) -> Iterator[ByteRange]:
        return iter(self._ranges)

    def __len__(self) -> int:
        """Return the number of ranges."""
        return len(self._ranges)

    def __repr__(self) -> str:
        return f"ByteRanges({self._ranges})"

    @property
    def nbytes(self) -> int:
        """Return the number of bytes in all ranges."""
        return sum(end - start for start, end in self._ranges)

    @property
    def prefix(self) -> int:
        """Return how many bytes there are from the file's beginning to the first gap."""
        return self._ranges[0][1] if self._ranges and self._ranges[0][0] == 0 else 0

    @property
    def end(self) -> int:
        """Return the offset after the last byte; 0 if there is none."""
        return self._ranges[-1][1] if self._ranges else 0

    def add(self, start: int, end: int) -> None:
        """Add one range."""
        for index, (first, last) in enumerate(self._ranges):
            if last == start and (index + 1 == len(self._ranges) or end < self._ranges[index + 1][0]):
                self._ranges[index] = first, end  # nearly always, in a file that is being written
                return
        self._ranges = ByteRanges([*self._ranges, (start, end)])._ranges

    def without(self, others: ByteRanges) -> ByteRanges:
        """Return the bytes that are not among the others."""
        left = []
        for start, end in self:
            at = start
            for first, last in others:
                if last > at and first < end:
                    left.append((at, max(at, first)))
                    at = last
            left.append((at, max(at, end)))
        return ByteRanges(left)
