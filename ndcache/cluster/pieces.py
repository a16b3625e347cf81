"""Read pieces of shards, and write those that come from other nodes.

A shard in one piece is checked and published at once. A larger one is received in order, piece by piece, into a partial
file. Each task closes that file before it tells the client, who gives its name to the next task: so one writer at a
time writes to it. When the client cannot know whether a writer has ended, as its worker was lost, a new partial file
begins with a copy.
"""

from __future__ import annotations

from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import CacheUnavailableError, ChecksumError, SizeMismatchError
from ..format.manifest import Shard
from ..store.partials.file import PartialFile
from .call import Held, PartialState, Piece
from .here import Here

__all__ = ["Data", "append_piece", "begin_partial", "publish_whole", "read_piece"]

#: Bytes on their way. Both Dask and Ray send such arrays without copying them first.
Data: TypeAlias = npt.NDArray[np.uint8]
#: In a note: the bytes come from other nodes. No download continues them, as it could not know their version.
_PEERS = "peers"


def read_piece(here: Here, piece: Piece, partial: str | None, target: memoryview) -> None:
    """Read a piece from the complete shard, or from the partial file of this name."""
    name = piece.shard.data_path
    with here.cache.layout.translate_errors(name):
        file: BinaryIO | None = here.cache.open_shard(piece.shard)
        if file is None and partial is not None:
            file = here.cache.partials.folder.open(partial)
        if file is None:
            raise CacheUnavailableError("a shard was deleted while it was sent to another node", shard=name)
        with file:
            file.seek(piece.start)
            while target:
                count = file.readinto(target)  # type: ignore[attr-defined]
                if not count:
                    raise CacheUnavailableError("a shard was truncated while it was sent to another node", shard=name)
                target = target[count:]


def publish_whole(here: Here, shard: Shard, held: Held, data: memoryview) -> None:
    """Write a whole shard, and publish it if it is right."""
    if here.find(shard) is not None:
        return  # another process was faster
    with here.cache.partials.create(shard.data_path) as partial:
        _add_hashers(here, partial, shard, held)
        partial.write(data)
        _publish(here, partial, shard, held)


def begin_partial(here: Here, shard: Shard) -> PartialState:
    """Begin a partial file with a copy of the longest one that is there; return an empty state if there is none."""
    cache, check = here.cache, here.context.cancellation.check
    with cache.partials.create(shard.data_path) as partial:
        cache.partials.copy_longest(
            partial,
            shard,
            here.content_id(shard),
            check,
            is_checked=here.context.compares_digests,
            is_exclusive=False,
        )
        if not partial.nbytes:
            partial.source = None
            return PartialState("", 0)
        partial.keep_prefix(min(partial.nbytes, shard.nbytes - 1))  # the last piece is what publishes
        _set_source(here, partial, shard)
        return PartialState(partial.file_name, partial.nbytes)


def append_piece(here: Here, piece: Piece, held: Held, data: memoryview, state: PartialState) -> PartialState | None:
    """Append a piece to a partial file; publish the shard if that was the last one, and return None."""
    shard, partials = piece.shard, here.cache.partials
    opened: Any = partials.reopen(shard.data_path, state.file_name) if state.file_name else None
    with opened or partials.create(shard.data_path) as partial:
        if partial.nbytes != piece.start:
            raise CacheUnavailableError("a partial file is not as its last writer left it", shard=shard.data_path)
        if partial.source is None:
            _set_source(here, partial, shard)
        partial.write_at(data, piece.start)
        if piece.end < shard.nbytes:
            return PartialState(partial.file_name, partial.nbytes)
        _add_hashers(here, partial, shard, held)
        partial.hasher.catch_up(here.context.cancellation.check, wait=True)
        _publish(here, partial, shard, held)
        return None


def _set_source(here: Here, partial: PartialFile, shard: Shard) -> None:
    partial.set_source(_PEERS, f'"{_PEERS}"', here.content_id(shard), None)


def _add_hashers(here: Here, partial: PartialFile, shard: Shard, held: Held) -> None:
    for algorithm in here.expected_digests(shard, held):
        partial.hasher.add(algorithm, here.context.cancellation.check)


def _publish(here: Here, partial: PartialFile, shard: Shard, held: Held) -> None:
    """Compare size and digests of a complete file, and publish it; refuse it otherwise, and leave nothing of it."""
    name = shard.data_path
    hint = "The bytes came from another node of the cluster, and were not used."
    try:
        if partial.nbytes != shard.nbytes:
            raise SizeMismatchError(
                "another node sent a shard of the wrong size",
                shard=name,
                expected=shard.nbytes,
                received=partial.nbytes,
                hint=hint,
            )
        for algorithm, expected in here.expected_digests(shard, held).items():
            received = partial.hasher.hexdigest(algorithm)
            if received != expected:
                raise ChecksumError(
                    f"another node sent wrong bytes: their {algorithm} is {received}, expected {expected}",
                    shard=name,
                    expected=expected,
                    received=received,
                    hint=hint,
                )
    except (SizeMismatchError, ChecksumError):
        partial.source = None  # so that nobody continues it
        raise
    here.cache.publish(partial, name, etag=held.etag, content_id=here.content_id(shard)).close()
