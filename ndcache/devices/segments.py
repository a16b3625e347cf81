"""Cut shards into segments, the units that workers stage and the caller's thread places.

A shard of a usual size is one segment. Files may have many gigabytes; cut into segments, they are staged by several
workers at once, within the memory limit, like as many small shards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from ..format.manifest import Record, Shard

__all__ = ["Segment", "cut_shard", "cut_shards"]

#: Segments are smaller than the device prefers if `memory_limit` is, but not smaller than this.
_MIN_SEGMENT_BYTES = 1 << 20
#: The most bytes of the first segment of a file that is read while it is downloaded: its tensors wait for all of them.
_FIRST_SEGMENT_BYTES = 8 << 20
#: Each of the next ones may have this part of the bytes before it.
_GROWTH = 4

#: Parts of a record begin at multiples of this many of its bytes: the size of a page, and so of whole values.
_PART_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class Segment:
    """Some records of a shard, or a part of a large one, which are staged and placed together.

    Attributes
    ----------
    shard : Shard
        The shard; its records are the selected ones.
    records : tuple of Record
        Consecutive records, in manifest order; exactly one if `part` is given.
    nbytes : int
        Bytes of memory to count for it.
    part : tuple of int or None
        The start and end in the record's stored bytes, if the segment is a part of a record. None for whole records.
    is_early : bool
        Whether its file is still being downloaded. It has the segment's bytes, but is not as long as the shard.
    """

    shard: Shard
    records: tuple[Record, ...]
    nbytes: int
    part: tuple[int, int] | None = None
    is_early: bool = False

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Return the start and end of each record in the file, or those of the part."""
        if self.part is not None:
            start = self.records[0].byte_offset
            return [(start + self.part[0], start + self.part[1])]
        return [(record.byte_offset, record.byte_offset + record.nbytes) for record in self.records]

    @property
    def ends_record(self) -> bool:
        """Return whether its records are complete with it: false for all parts of a record but the last."""
        return self.part is None or self.part[1] == self.records[0].nbytes


def cut_shards(
    shards: Sequence[Shard],
    segment_bytes: int,
    memory_limit: int,
    is_early: Callable[[Shard], bool],
    *,
    cuts_records: bool,
    also_cut: Collection[str] = (),
) -> list[list[Segment]]:
    """Cut each shard into segments.

    Parameters
    ----------
    shards : sequence of Shard
    segment_bytes : int
        The size that the device prefers.
    memory_limit : int
        Bytes of memory for all segments that are not placed yet.
    is_early : callable
        Return `cut_shard`'s parameter of this name for a shard.
    cuts_records, also_cut
        See `cut_shard`.

    Returns
    -------
    list of list of Segment
        Those of each shard.
    """
    most = min(segment_bytes, max(memory_limit, _MIN_SEGMENT_BYTES))
    return [
        cut_shard(shard, most, cuts_records=cuts_records, also_cut=also_cut, is_early=is_early(shard))
        for shard in shards
    ]


def cut_shard(
    shard: Shard,
    segment_bytes: int,
    *,
    cuts_records: bool,
    also_cut: Collection[str] = (),
    is_early: bool = False,
) -> list[Segment]:
    """Cut a shard into segments.

    Parameters
    ----------
    shard : Shard
    segment_bytes : int
        The most bytes of a segment, unless it is a single larger record.
    cuts_records : bool
        Whether such a record becomes several segments, of about the same size.
    also_cut : collection of str
        Names of records for which it does anyway.
    is_early : bool
        Whether tensors may be wanted while the file is downloaded. Then the first segments are smaller. Default False.

    Returns
    -------
    list of Segment
        At least one, in manifest order.
    """
    most = min(segment_bytes, _FIRST_SEGMENT_BYTES) if is_early else segment_bytes
    if shard.nbytes <= most:
        return [Segment(shard, shard.records, shard.nbytes)]
    segments: list[Segment] = []
    records: list[Record] = []
    nbytes = before = 0
    for record in shard.records:
        if records and nbytes + record.nbytes > most:
            segments.append(Segment(shard, tuple(records), nbytes))
            before += nbytes
            most = min(segment_bytes, max(most, before // _GROWTH))
            records, nbytes = [], 0
        if record.nbytes > segment_bytes and (cuts_records or record.name in also_cut):
            segments += _cut_record(shard, record, segment_bytes)
        else:
            records.append(record)
            nbytes += record.nbytes
    if records or not segments:
        segments.append(Segment(shard, tuple(records), nbytes))
    return segments


def _cut_record(shard: Shard, record: Record, segment_bytes: int) -> Iterator[Segment]:
    count = -(-record.nbytes // segment_bytes)
    step = -(-record.nbytes // (count * _PART_ALIGNMENT)) * _PART_ALIGNMENT
    for start in range(0, record.nbytes, step):
        end = min(start + step, record.nbytes)
        yield Segment(shard, (record,), end - start, part=(start, end))
