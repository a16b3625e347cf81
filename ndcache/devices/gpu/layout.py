"""Where a shard's bytes lie in staging memory, and which of them go to which tensor.

Copies on a GPU begin and end at multiples of 4 bytes; records lie anywhere in their file and have any size. So a file
is read in stretches, each put so that its records begin at multiples of 4: one stretch for most shards. What a tensor
has beyond its last multiple of 4 gets a word of its own, filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...format.manifest import Record

__all__ = ["WORD", "Copy", "Piece", "Read", "padded", "pieces"]

WORD = 4
#: Bytes between two records that are rather read with them than skipped.
_MAX_GAP = 1 << 12


@dataclass
class Read:
    """A stretch of the file.

    Attributes
    ----------
    offset : int
        Its first byte in the file.
    at : int
        Where it goes in the staging memory.
    nbytes : int
    is_tail : bool
        Whether it is filled up with zeros to a whole word.
    """

    offset: int
    at: int
    nbytes: int
    is_tail: bool = False


@dataclass(frozen=True)
class Copy:
    """A stretch of the staging memory that becomes a stretch of a tensor.

    Attributes
    ----------
    record : int
        The record's index in its shard.
    at : int
        In the staging memory; a multiple of 4.
    to : int
        In the tensor's stored bytes; a multiple of 4.
    nbytes : int
        Of stored bytes; a multiple of 4, or of 2 if they are expanded.
    is_expanded : bool
        Whether each bfloat16 becomes a float32 on the way, and the tensor's bytes are twice as many.
    """

    record: int
    at: int
    to: int
    nbytes: int
    is_expanded: bool


@dataclass
class Piece:
    """What is staged at once: a whole shard, unless it is large.

    Attributes
    ----------
    reads : list of Read
    copies : list of Copy
    nbytes : int
        Of staging memory.
    """

    reads: list[Read] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    nbytes: int = 0

    @property
    def expanded(self) -> tuple[int, int]:
        """The stretch of staging memory, in whole words, that has all that is expanded; (0, 0) if nothing is."""
        expanded = [copy for copy in self.copies if copy.is_expanded]
        if not expanded:
            return 0, 0
        return min(copy.at for copy in expanded), max(padded(copy.at + copy.nbytes) for copy in expanded)

    def place(self, offset: int) -> int:
        """Where the file's byte `offset` would go: right behind what was read last, if that is a multiple of 4."""
        if self.reads:
            last = self.reads[-1]
            at = last.at + offset - last.offset
            if 0 <= offset - last.offset - last.nbytes <= _MAX_GAP and at % WORD == 0 and not last.is_tail:
                return at
        return padded(self.nbytes)

    def read(self, offset: int, at: int, nbytes: int) -> None:
        """Have `nbytes` of the file read to where `place` said."""
        last = self.reads[-1] if self.reads else None
        if last is not None and not last.is_tail and at == last.at + offset - last.offset:
            last.nbytes = offset + nbytes - last.offset
        else:
            self.reads.append(Read(offset, at, nbytes))
        self.nbytes = padded(at + nbytes)

    def read_tail(self, offset: int, nbytes: int) -> int:
        """Have what does not fill a word read to a word of its own; where that is."""
        at = self.nbytes
        self.reads.append(Read(offset, at, nbytes, is_tail=True))
        self.nbytes += WORD
        return at


def pieces(records: Sequence[Record], limit: int, *, decode: bool) -> Iterator[Piece]:
    """How the records of a shard are staged.

    Parameters
    ----------
    records : sequence of Record
    limit : int
        Bytes of a piece at most; a multiple of 4.
    decode : bool
        Whether float32 that is stored as bfloat16 is expanded.

    Yields
    ------
    Piece
        At least one of them.
    """
    piece = Piece()
    for index, record in sorted(enumerate(records), key=lambda item: item[1].byte_offset):
        is_expanded = decode and record.is_bf16_encoded
        whole = padded(record.nbytes) if is_expanded else record.nbytes & -WORD
        done = 0
        while done < whole:
            at = piece.place(record.byte_offset + done)
            take = min(whole - done, limit - at)
            if take < min(whole - done, _MAX_GAP) and piece.reads:  # no small stretch at the end of a piece
                yield piece
                piece = Piece()
                continue
            stored = min(take, record.nbytes - done)
            piece.read(record.byte_offset + done, at, stored)
            piece.copies.append(Copy(index, at, done, stored, is_expanded))
            done += take
        if whole < record.nbytes:
            if piece.nbytes + WORD > limit:
                yield piece
                piece = Piece()
            at = piece.read_tail(record.byte_offset + whole, record.nbytes - whole)
            piece.copies.append(Copy(index, at, whole, WORD, is_expanded=False))
    yield piece


def padded(nbytes: int) -> int:
    """Rounded up to a whole word."""
    return -(-nbytes // WORD) * WORD
