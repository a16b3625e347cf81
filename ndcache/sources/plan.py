"""Plan a download: which byte ranges of a shard are wanted, and from where."""

from __future__ import annotations

from dataclasses import dataclass

from ..format.manifest import Shard
from ..store.metadata import FileMetadata
from ..store.ranges import ByteRanges

__all__ = ["DownloadPlan", "plan_ranges"]

#: Bytes between two wanted tensors that are fetched with them rather than left out, as another request costs about as
#: much; and so the least that must be saved by fetching less than the whole shard.
_GAP = 1 << 20


@dataclass(frozen=True)
class DownloadPlan:
    """What to download of one shard, and from where.

    Attributes
    ----------
    shard : Shard
    urls : tuple of str
        The source's URL, then those of mirrors.
    content_id : str
        What the manifest says of the shard's content; see `FileMetadata.compare_content`.
    cached : FileMetadata or None
        The metadata of a cached file that may still be right: then the source is asked whether it has changed.
    ranges : ByteRanges or None
        The wanted ranges; None is the whole shard.
    """

    shard: Shard
    urls: tuple[str, ...]
    content_id: str
    cached: FileMetadata | None = None
    ranges: ByteRanges | None = None


def plan_ranges(shard: Shard) -> ByteRanges | None:
    """Return the byte ranges that cover the requested tensors, or None for the whole shard.

    Parameters
    ----------
    shard : Shard
        With the records of the requested tensors only.
    """
    tensors = ((record.byte_offset, record.byte_offset + record.nbytes) for record in shard.records)
    # All tensors may be empty, but no request can ask for nothing.
    wanted = ByteRanges(tensors, gap=_GAP) or ByteRanges([(0, 1)])
    saved = shard.nbytes - wanted.nbytes
    return None if saved < max(_GAP, wanted.nbytes) else wanted
