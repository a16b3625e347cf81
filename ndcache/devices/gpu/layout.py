"""The layout of staging memory: where the bytes of a segment lie in it, and to which tensor they are copied.

Copies on a GPU begin and end at multiples of 4 bytes, but records begin anywhere in their file and have any size. So a
file is read in ranges, each placed so that its records begin at multiples of 4; for most segments one range is enough.
The bytes after a tensor's last multiple of 4 are its tail. They get a word of their own, padded with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...format.manifest import Record

__all__ = ["WORD", "Batch", "FileRead", "TensorCopy", "plan_batches", "round_up"]

#: The alignment of copies on a GPU, in bytes (WebGPU's COPY_BUFFER_ALIGNMENT).
WORD = 4
#: Gaps between two records of up to this many bytes are read, not skipped. No record is split to fill less than this at
#: the end of a batch.
_MAX_GAP = 1 << 12


@dataclass
class FileRead:
    """A range of the file, and its place in staging memory.

    Attributes
    ----------
    file_offset : int
    staging_offset : int
    nbytes : int
    is_tail : bool
        Whether zeros follow it in staging memory, up to a whole word.
    """

    file_offset: int
    staging_offset: int
    nbytes: int
    is_tail: bool = False


@dataclass(frozen=True)
class TensorCopy:
    """A range of staging memory, and its place in a tensor.

    Attributes
    ----------
    record_index : int
        The record's index in its segment.
    staging_offset : int
        A multiple of 4.
    tensor_offset : int
        Offset in the tensor's stored bytes; a multiple of 4.
    nbytes : int
        Stored bytes: a multiple of 4, or of 2 if they are expanded.
    is_expanded : bool
        Whether each bfloat16 becomes a float32 on the way, so that offset and size in the tensor double.
    """

    record_index: int
    staging_offset: int
    tensor_offset: int
    nbytes: int
    is_expanded: bool


@dataclass
class Batch:
    """The content of one staging buffer: a segment, or a part of one where the device's buffers are small.

    Attributes
    ----------
    reads : list of FileRead
    copies : list of TensorCopy
    nbytes : int
        Bytes of staging memory.
    """

    reads: list[FileRead] = field(default_factory=list)
    copies: list[TensorCopy] = field(default_factory=list)
    nbytes: int = 0

    @property
    def expanded_range(self) -> tuple[int, int]:
        """Return the start and end, in whole words, of the staging memory that is expanded; (0, 0) if nothing is."""
        expanded = [copy for copy in self.copies if copy.is_expanded]
        if not expanded:
            return 0, 0
        end = max(round_up(copy.staging_offset + copy.nbytes) for copy in expanded)
        return min(copy.staging_offset for copy in expanded), end

    def next_offset(self, file_offset: int) -> int:
        """Return the staging offset for a byte of the file: in line with the last read, if that is a multiple of 4."""
        if self.reads:
            last = self.reads[-1]
            staging_offset = last.staging_offset + file_offset - last.file_offset
            gap = file_offset - last.file_offset - last.nbytes
            if 0 <= gap <= _MAX_GAP and staging_offset % WORD == 0 and not last.is_tail:
                return staging_offset
        return round_up(self.nbytes)

    def add_read(self, file_offset: int, staging_offset: int, nbytes: int) -> None:
        """Plan to read `nbytes` to the offset that `next_offset` returned; extend the last read if they adjoin."""
        last = self.reads[-1] if self.reads else None
        adjoins = last is not None and staging_offset == last.staging_offset + file_offset - last.file_offset
        if last is not None and adjoins and not last.is_tail:
            last.nbytes = file_offset + nbytes - last.file_offset
        else:
            self.reads.append(FileRead(file_offset, staging_offset, nbytes))
        self.nbytes = round_up(staging_offset + nbytes)

    def add_tail(self, file_offset: int, nbytes: int) -> int:
        """Plan to read a tensor's tail to a word of its own; return the staging offset of that word."""
        staging_offset = self.nbytes
        self.reads.append(FileRead(file_offset, staging_offset, nbytes, is_tail=True))
        self.nbytes += WORD
        return staging_offset


def plan_batches(
    records: Sequence[Record], max_bytes: int, *, decode: bool, part: tuple[int, int] | None = None
) -> Iterator[Batch]:
    """Plan how records are staged.

    Parameters
    ----------
    records : sequence of Record
        In any order.
    max_bytes : int
        The most bytes of a batch; a multiple of 4.
    decode : bool
        Whether float32 stored as bfloat16 is expanded.
    part : tuple of int, optional
        The start and end of the only record's bytes that are staged; multiples of 4, except for the record's end.

    Yields
    ------
    Batch
        At least one.
    """
    batch = Batch()
    for index, record in sorted(enumerate(records), key=lambda item: item[1].byte_offset):
        is_expanded = decode and record.is_bf16_encoded
        whole_words = round_up(record.nbytes) if is_expanded else record.nbytes & -WORD
        done, end = (0, record.nbytes) if part is None else part
        stop = whole_words if end == record.nbytes else end
        while done < stop:
            staging_offset = batch.next_offset(record.byte_offset + done)
            nbytes = min(stop - done, max_bytes - staging_offset)
            if nbytes < min(stop - done, _MAX_GAP) and batch.reads:  # avoid a small copy at the end of a batch
                yield batch
                batch = Batch()
                continue
            stored = min(nbytes, record.nbytes - done)
            batch.add_read(record.byte_offset + done, staging_offset, stored)
            batch.copies.append(TensorCopy(index, staging_offset, done, stored, is_expanded))
            done += nbytes
        if whole_words < end:
            if batch.nbytes + WORD > max_bytes:
                yield batch
                batch = Batch()
            staging_offset = batch.add_tail(record.byte_offset + whole_words, record.nbytes - whole_words)
            batch.copies.append(TensorCopy(index, staging_offset, whole_words, WORD, is_expanded=False))
    yield batch


def round_up(nbytes: int) -> int:
    """Return `nbytes` rounded up to a whole word."""
    return -(-nbytes // WORD) * WORD
