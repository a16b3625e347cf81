"""The view of a task on its worker: the model's directory in the node's cache, with the options of the call."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..companions import Companions
from ..companions.peers import held_companions
from ..context import LoadContext
from ..errors import CacheUnavailableError, ChecksumError, DiskFullError, OfflineError
from ..files.folder import Folder
from ..files.system import boot_id
from ..format.integrity import new_hasher, update_from_file
from ..format.manifest import Manifest, Shard
from ..format.safetensors.headers import kept_as
from ..format.strict_json import MAX_KEPT_BYTES
from ..location import Location
from ..options import LoaderOptions
from ..resources import LoaderResources
from ..sources.cached_files import open_cached
from ..sources.client import Client
from ..sources.manifests.manifest import ManifestSource
from ..sources.manifests.manifest_request import ManifestBody
from ..sources.manifests.opened import OpenedManifest, parse_kept
from ..sources.model import ShardFile
from ..sources.remote import RemoteModel
from ..sources.verifier import ShardVerifier
from ..store.cleanup import check_free_space, evict_partials
from ..store.directory import ModelDirectory
from ..store.housekeeping.usage import begin_use
from .call import Call, Held, HeldFiles, ManifestFile, NodeId
from .engine import IsSet

__all__ = ["Here", "open_here"]


@dataclass(frozen=True)
class Here:
    """One model in the cache of the node that a task runs on.

    Attributes
    ----------
    call : Call
    location : Location
    context : LoadContext
    cache : ModelDirectory
    """

    call: Call
    location: Location
    context: LoadContext
    cache: ModelDirectory

    def identify(self) -> NodeId:
        """Make the cache's top directory if it is missing, and return what distinguishes this node."""
        root = self.cache.layout.model.root
        with self.cache.layout.translate_errors():
            Folder(root, (), self.cache.layout.model.is_private).make()
            status = os.stat(root)
        return NodeId(socket.gethostname(), boot_id(), status.st_dev, status.st_ino)

    # --- the manifest

    def open_manifest(self) -> ManifestFile:
        """Fetch the manifest into the cache, unless the cached one is current, and return it."""
        source = ManifestSource((self.location, *self.context.mirrors), Client(self.context), self.cache)
        opened = source.open()
        return self.cached_manifest(opened.manifest.name, opened.digest)

    def cached_manifest(self, name: str, sha256: str) -> ManifestFile:
        """Return the manifest from the cache.

        Raises
        ------
        CacheUnavailableError
            It is not there any more, or is another one.
        """
        data = self.cache.read(kept_as(name), MAX_KEPT_BYTES)
        if data is None or hashlib.sha256(data).hexdigest() != sha256:
            raise CacheUnavailableError("the manifest was deleted or replaced during the call", shard=name)
        metadata = self.cache.metadata(kept_as(name))
        if metadata is None or metadata.digests.get("sha256") != sha256:
            return ManifestFile(name, data)
        return ManifestFile(name, data, metadata.etag, metadata.last_modified)

    def keep_manifest(self, manifest: ManifestFile) -> None:
        """Publish the manifest that another node has fetched, with what the server calls its version."""
        digest = hashlib.sha256(manifest.data).hexdigest()
        if digest != self.call.manifest_sha256:
            raise ChecksumError(
                f"another node sent wrong bytes: their sha256 is {digest}, expected {self.call.manifest_sha256}",
                shard=manifest.name,
                expected=self.call.manifest_sha256,
                received=digest,
            )
        source = ManifestSource((self.location,), Client(self.context), self.cache)
        body = ManifestBody(manifest.data, manifest.etag, manifest.last_modified, is_html=False)
        source.keep_manifest(manifest.name, body, digest)

    def parse(self, manifest: ManifestFile) -> Manifest:
        """Parse a manifest, and attach the digests that the caller requires to its shards."""
        url, check = str(self.location), self.context.cancellation.poll
        return parse_kept(manifest.data, manifest.name, url, self.context.integrity, check)

    # --- companion files

    def held_files(self) -> dict[str, str] | None:
        """Return the SHA-256 of the companion files, by their names; None if they are not all there."""
        return held_companions(self.cache, f"{self.call.manifest_name} {self.call.manifest_sha256}")

    def fetch_files(self) -> HeldFiles:
        """Fetch the companion files into the cache, unless they are there."""
        wanted = dict(self.call.files or {})
        for again in (False, True):
            companions = Companions(**{**wanted, "force": wanted.get("force") or again}, are_required=True)
            with contextlib.closing(self.model()) as model:
                fetch = companions.plan(model, self.context, is_warm=False)
                if fetch is not None:
                    self.context.pool.run(fetch, tasks_to_come=0)
            companions.finish(self.context)
            if (digests := self.held_files()) is not None:  # otherwise, somebody has changed one
                return HeldFiles(digests, sum(self.cache.size(name) or 0 for name in digests))
            if self.context.offline:
                raise OfflineError("offline, and the companion files are not known to be complete")
        raise CacheUnavailableError("companion files were deleted or replaced during the call")

    # --- shards

    def content_id(self, shard: Shard) -> str:
        """Return what identifies the shard's content; see `FileMetadata.compare_content`."""
        return self._verifier.content_id(shard)

    def expected_digests(self, shard: Shard, held: Held) -> dict[str, str]:
        """Return the digests that a shard must have which comes from a node that holds it."""
        return {**held.digests, **shard.digests} if self.context.compares_digests else {}

    def find(self, shard: Shard) -> Held | None:
        """Return the shard if it is there and right; set aside a bad one."""
        cached = open_cached(self.cache, shard)
        if cached is None:
            self._verifier.quarantine_if_truncated(shard)
            return None
        with cached.file:
            if not self._verifier.accepts(shard, cached):
                return None
        return self.held(shard)

    def held(self, shard: Shard) -> Held:
        """Return what is noted of a shard that is right."""
        metadata = self.cache.metadata(shard.data_path)
        digests: Mapping[str, str] = {} if metadata is None else metadata.digests
        return Held({**digests, **shard.digests}, None if metadata is None else metadata.etag)

    def add_digest(self, shard: Shard, obtained: ShardFile) -> Held:
        """Compute the SHA-256 of a shard of which no digest is known, and note it; close the file."""
        with obtained.file:
            held = self.held(shard)
            if not held.digests and self.context.compares_digests:
                hasher = new_hasher("sha256")
                update_from_file({"sha256": hasher}, obtained.file, self.context.cancellation.check)
                held = replace(held, digests={"sha256": hasher.hexdigest()})
                metadata = self.cache.metadata(shard.data_path)
                if metadata is not None and metadata.is_unchanged(os.fstat(obtained.file.fileno())):
                    self.cache.try_to_remember(shard.data_path, replace(metadata, digests=held.digests))
        return replace(held, received=0 if obtained.from_cache else shard.nbytes)

    def check_free_space(self, missing: list[Shard]) -> None:
        """Raise `DiskFullError` if the disk has no room for shards that are missing."""
        needed = sum(shard.nbytes for shard in missing)
        self.context.cache.make_room(needed, self.cache.directory)
        try:
            check_free_space(self.cache, needed)
        except DiskFullError:
            evict_partials(self.cache, missing)
            check_free_space(self.cache, needed)

    def model(self, shards: Mapping[int, Shard] | None = None) -> RemoteModel:
        """Return the model with some of its shards, by default all; its manifest is in the cache."""
        if shards is None:
            manifest = self.parse(self.cached_manifest(self.call.manifest_name, self.call.manifest_sha256))
        else:
            manifest = Manifest({}, tuple(shards.values()), self.call.manifest_name)
        locations = (self.location, *self.context.mirrors)
        return RemoteModel(self._opened(manifest), locations, Client(self.context), self.cache)

    @property
    def _verifier(self) -> ShardVerifier:
        return ShardVerifier(self.context, self.cache, self._opened(Manifest({}, (), self.call.manifest_name)))

    def _opened(self, manifest: Manifest) -> OpenedManifest:
        return OpenedManifest(manifest, self.call.manifest_sha256)


@contextmanager
def open_here(call: Call, cancel: IsSet | None, *, threads: int = 1, **options: Any) -> Iterator[Here]:
    """Open the model of a call in this node's cache, with the worker's own environment.

    Parameters
    ----------
    call : Call
    cancel : IsSet or None
    threads : int
        How many threads may download.
    **options
        Options that differ from those of the call.
    """
    checked = LoaderOptions(**{**call.options, "max_workers": threads, **options, "cancel": cancel})
    resources = LoaderResources(checked, os.environ)
    location = resources.locate(call.source)
    with (
        contextlib.closing(resources),
        resources.context(location, threads=None if threads > 1 else 1, must_keep=True) as context,
    ):
        cache = context.open_directory(location)
        use = begin_use(cache.layout)
        try:
            yield Here(call, location, context, cache)
        finally:
            if use is not None:
                use.end()
