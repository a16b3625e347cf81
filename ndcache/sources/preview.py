"""Find out what the download of shards would bring, without writing anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..context import LoadContext
from ..format.manifest import Shard
from .equal_files import EqualFiles
from .manifests.opened import offline_error
from .remote import RemoteModel
from .verifier import ShardVerifier

__all__ = ["ShardPreview", "preview_shards"]


@dataclass(frozen=True)
class ShardPreview:
    """A shard, and the bytes of it that a download would fetch.

    Attributes
    ----------
    nbytes : int
        The bytes of the shard, or of the wanted ranges.
    is_cached : bool
        Whether nothing need be done.
    has_equal : bool
        Whether another model in the cache seems to have the same file.
    to_fetch : int
        The bytes that would come from the server, without those that an interrupted download has left.
    """

    nbytes: int
    is_cached: bool
    has_equal: bool
    to_fetch: int


def preview_shards(model: RemoteModel, context: LoadContext, shards: Sequence[Shard]) -> Iterator[ShardPreview]:
    """Yield a preview of the download of each shard.

    Raises
    ------
    OfflineError
        Something is missing, and no request may be made.
    """
    missing = {shard.data_path for shard in shards if not model.is_ready(shard)}
    if missing and context.offline:
        raise offline_error(model.locations[0], [shard.data_path for shard in shards if shard.data_path in missing])
    verifier = ShardVerifier(context, model.cache, model.opened)
    equal = EqualFiles(context, model.cache, model.manifest, verifier)
    for shard in shards:
        nbytes, is_cached = model.nbytes(shard), shard.data_path not in missing
        has_equal, left = not is_cached and equal.are_likely(shard), 0
        if not (is_cached or has_equal or context.force):
            is_checked = bool(shard.digests) and context.compares_digests and nbytes == shard.nbytes
            left = model.cache.partials.longest(shard, verifier.content_id(shard), is_checked=is_checked)
        yield ShardPreview(nbytes, is_cached, has_equal, 0 if is_cached or has_equal else max(0, nbytes - left))
