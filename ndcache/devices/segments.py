"""Cut shards into segments, the units that workers stage and the caller's thread places.

A shard of a usual size is one segment. Files may have many gigabytes; cut into segments, they are staged by several
workers at once, within the memory limit, like as many small shards.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..format.manifest import Record, Shard

__all__ = ["Segment", "cut_shard"]

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
    """

    shard: Shard
    records: tuple[Record, ...]
    nbytes: int
    part: tuple[int, int] | None = None

    @property
    def ends_record(self) -> bool:
        """Return whether its records are complete with it: false for all parts of a record but the last."""
        return self.part is None or self.part[1] == self.records[0].nbytes


def cut_shard(shard: Shard, segment_bytes: int, *, cuts_records: bool, also_cut: Collection[str] = ()) -> list[Segment]:
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

    Returns
    -------
    list of Segment
        At least one, in manifest order.
    """
    if shard.nbytes <= segment_bytes:
        return [Segment(shard, shard.records, shard.nbytes)]
    segments: list[Segment] = []
    records: list[Record] = []
    nbytes = 0
    for record in shard.records:
        if records and nbytes + record.nbytes > segment_bytes:
            segments.append(Segment(shard, tuple(records), nbytes))
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
