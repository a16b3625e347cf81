"""Shards whose bytes another model of the cache has: they are linked, not downloaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace

from ..context import LoadContext
from ..errors import NdcacheError
from ..files.descriptors import check_shortage
from ..format.manifest import Manifest, Shard
from ..store.digest_index import Place
from ..store.directory import ModelDirectory
from ..store.linking import taken_over
from ..store.metadata import Match
from ..store.partials.file import PartialFile
from .model import ShardFile
from .verifier import ShardVerifier

__all__ = ["EqualFiles"]

logger = logging.getLogger("ndcache")


class EqualFiles:
    """Find and link files of other models that have the bytes of a shard.

    Parameters
    ----------
    context : LoadContext
    cache : ModelDirectory
        The model's directory. One outside the cache gets no links.
    manifest : Manifest
        The model's.
    verifier : ShardVerifier
    """

    def __init__(
        self, context: LoadContext, cache: ModelDirectory, manifest: Manifest, verifier: ShardVerifier
    ) -> None:
        self._context = context
        self._cache = cache
        self._manifest = manifest
        self._verifier = verifier
        self._places: dict[str, tuple[Place, ...]] | None = None  # read when the first shard is missing

    def announce(self, shards: Iterable[Shard]) -> None:
        """Note that this model will have these shards."""
        if self._cache.digests is not None and self._cache.why_not_kept is None:
            self._cache.digests.add(self._cache.directory.name, shards)

    def announce_learnt(self, shards: Iterable[Shard]) -> None:
        """Note shards whose SHA-256 has come with them, and is noted in the cache."""
        known = ((shard, self._cache.metadata(shard.data_path)) for shard in shards)
        self.announce(
            replace(shard, sha256sum=metadata.digests["sha256"])
            for shard, metadata in known
            if metadata is not None and "sha256" in metadata.digests
        )

    def are_likely(self, shard: Shard) -> bool:
        """Return whether there seems to be an equal file, by its size."""
        return any(source.size(place.name) == shard.nbytes for source, place in self._sources(shard))

    def take(self, shard: Shard) -> ShardFile | None:
        """Publish an equal file as this model's own, and return it; None if there is none.

        Its digests are compared before, unless the load compares none: then it must not have changed since they were.
        """
        content_id = self._verifier.content_id(shard)
        for source, place in self._sources(shard) if self._cache.why_not_kept is None else ():
            try:
                with taken_over(source, place.name, self._cache, shard, self._context.cancellation.check) as partial:
                    if partial is None:
                        continue
                    if self._has_right_bytes(partial, shard, source, place, content_id):
                        logger.debug("%s is the same file as %s of %s", shard.data_path, place.name, place.model)
                        with self._context.stats.timed("publish", file=shard.data_path):
                            file = self._cache.publish(partial, shard.data_path, content_id=content_id)
                        self._context.arrivals.end(shard.data_path, shard.nbytes)  # nobody else brought it
                        return ShardFile(file, from_cache=True, checked=self._verifier.strongest(shard.digests))
                logger.debug("%s of %s is not what it was", place.name, place.model)
            except OSError as error:
                if not isinstance(error, NdcacheError):
                    check_shortage(error)
                logger.debug("%s of %s cannot be linked: %s", place.name, place.model, str(error))
        return None

    def _sources(self, shard: Shard) -> Iterable[tuple[ModelDirectory, Place]]:
        index = self._cache.digests
        if index is None or self._context.force or not shard.digests:
            return
        if self._places is None:
            self._places = index.find(self._manifest.shards)
        own = Place(self._cache.directory.name, shard.data_path)
        for place in self._places.get(shard.data_path, ()):
            if place != own:
                yield ModelDirectory(index.scope.path / place.model, root=index.scope.root), place

    def _has_right_bytes(
        self, partial: PartialFile, shard: Shard, source: ModelDirectory, place: Place, content_id: str
    ) -> bool:
        if not self._context.compares_digests:
            metadata, status = source.metadata(place.name), os.fstat(partial.file.fileno())
            return (
                metadata is not None
                and metadata.is_unchanged(status)
                and metadata.compare_content(shard, content_id) is Match.SAME
            )
        self._context.pool.turns.release()  # others can work meanwhile
        check = self._context.cancellation.check
        with self._context.stats.timed("hash", file=shard.data_path):
            for algorithm in shard.digests:
                partial.hasher.add(algorithm, check)
            partial.hasher.catch_up(check, wait=True)
        return all(partial.hasher.hexdigest(algorithm) == digest for algorithm, digest in shard.digests.items())
