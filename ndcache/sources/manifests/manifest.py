"""Open the manifest of a model on a server: the server's, or the cached one if the server does not give it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ...caller import warn_caller
from ...errors import (
    AuthError,
    CacheError,
    CacheUnavailableError,
    ChecksumError,
    ConnectError,
    ManifestError,
    ManifestSyntaxError,
    NdcacheError,
    NotFoundError,
    RateLimitedError,
    StallError,
    TLSError,
    TransferError,
    UnsupportedDtypeError,
)
from ...files.folder import is_gone
from ...format.integrity import check_manifest_digest, manifest_names_to_try
from ...format.parse import parse_manifest
from ...format.safetensors.headers import Headers, is_kept_header, kept_as
from ...format.safetensors.index import is_safetensors
from ...format.strict_json import MAX_KEPT_BYTES
from ...http.retry import RetryPolicy
from ...location import Location
from ...store.directory import ModelDirectory
from ...store.metadata import FileMetadata
from ..choice import choose_safetensors, say_names
from ..client import Client
from ..listing import has_listing, read_listing
from .manifest_request import ManifestBody, NotThereError, refusal_of, request_manifest
from .model_headers import HeadersRequest
from .opened import OpenedManifest, offline_error, open_manifest

__all__ = ["ManifestSource"]

logger = logging.getLogger("ndcache")

#: The errors of a manifest that cannot be used.
_UNUSABLE = (ManifestError, ChecksumError, UnsupportedDtypeError)
_FAILURES = (TransferError, *_UNUSABLE)
#: Failures that say nothing about the request itself.
_NO_ANSWER = (ConnectError, StallError, TLSError, RateLimitedError)
_ONE_TRY = RetryPolicy(retries=0)


@dataclass(frozen=True)
class ManifestSource:
    """The source of the manifest of one load.

    Attributes
    ----------
    locations : sequence of Location
        Where the model is; then its mirrors, for a manifest whose digest the caller demands.
    client : Client
    cache : ModelDirectory
    """

    locations: Sequence[Location]
    client: Client
    cache: ModelDirectory

    def open(self) -> OpenedManifest:
        """Open the manifest.

        Raises
        ------
        TransferError, ManifestError, ChecksumError
            The server does not give a manifest that can be used, and none is cached.
        OfflineError
        """
        cached = self._cached() or self._cached_choice()
        if self.client.context.offline:
            if cached is None:
                raise offline_error(self.locations[0], [self._names[0]])
            return cached
        if cached is None:
            return self._fetch_first()
        name = cached.manifest.name
        try:
            # A single attempt, as there is a manifest to fall back on.
            return self._request(self.locations[0], name, _ONE_TRY, cached)
        except (*_FAILURES, NotThereError) as failure:
            error: NdcacheError = failure
            if isinstance(failure, NotThereError):
                if renamed := self._fetch_renamed(name):
                    return renamed
                error = failure.reason
            if not isinstance(error, _NO_ANSWER) and not is_safetensors(name):
                self._forget_version(name)
            message = f"using the cached manifest of {self.locations[0]}: {error}"
            warn_caller(message)
            return cached

    def restore(self, opened: OpenedManifest) -> None:
        """Publish a manifest again that was removed from the cache since it was opened."""
        self.keep_manifest(opened.manifest.name, ManifestBody(opened.data, None, None, is_html=False), opened.digest)

    @property
    def _names(self) -> tuple[str, ...]:
        return manifest_names_to_try(self.locations[0].manifest_names, self.client.context.integrity)

    def _cached(self) -> OpenedManifest | None:
        for name in self._names:
            data = self.cache.read(kept_as(name), MAX_KEPT_BYTES)
            if data is None:
                continue
            try:
                # A file that was loaded by its own URL may not be the one that the directory's URL stands for.
                is_named = is_safetensors(name) and self.locations[0].is_folder and not self.client.context.offline
                if not is_named or Headers.decode(data).is_chosen:
                    return self._parse(data, name, str(self.locations[0]))
            except _UNUSABLE as error:
                logger.warning("the cached manifest cannot be used: %s", str(error))
        return None

    def _cached_choice(self) -> OpenedManifest | None:
        """Return the cached model that was chosen from a listing, as the directory has none of the usual names."""
        if not self._may_choose:
            return None
        for file in filter(is_kept_header, self.cache.manifest_names()):
            with contextlib.suppress(*_UNUSABLE):
                data = self.cache.read(file, MAX_KEPT_BYTES) or b""
                headers = Headers.decode(data)
                if headers.is_chosen and kept_as(headers.name) == file:
                    return self._parse(data, headers.name, str(self.locations[0]))
        return None

    @property
    def _may_choose(self) -> bool:
        """Return whether any safetensors file will do, if it is the only one of the directory."""
        return self.locations[0].is_folder and self._names == self.locations[0].manifest_names

    def _fetch_renamed(self, old: str) -> OpenedManifest | None:
        """Fetch the manifest under its other usual name, if the server has it there now."""
        for name in self._names:
            if name == old or is_safetensors(name) != is_safetensors(old):
                continue
            try:
                opened = self._request(self.locations[0], name, _ONE_TRY)
            except (*_FAILURES, NotThereError):
                continue
            with contextlib.suppress(CacheError):  # with a read-only cache, the next load asks for both again
                self.cache.quarantine(kept_as(old))
            return opened
        return None

    def _fetch_first(self) -> OpenedManifest:
        """Fetch the manifest from the source, or from a mirror if the caller demands its digest."""
        try:
            return self._fetch_from(self.locations[0])
        except _FAILURES as error:
            mirrors = self.locations[1:] if set(self._names) <= self.client.context.integrity.keys() else ()
            for mirror in mirrors:
                try:
                    return self._fetch_from(mirror)
                except _FAILURES as other:
                    error.others += (other,)
            raise

    def _fetch_from(self, location: Location) -> OpenedManifest:
        """Fetch the manifest under the first of its usual names that the server has."""
        reasons: dict[str, NdcacheError] = {}
        for name in self._names_at(location):
            try:
                return self._request(location, name, self.client.context.policy)
            except NotThereError as error:
                reasons[name] = error.reason
        first = next(iter(reasons.values()))
        if isinstance(first, (NotFoundError, AuthError)):
            refusals = {name: reason for name, reason in reasons.items() if isinstance(reason, AuthError)}
            raise self._no_such_file(location, first, refusals) from first
        raise first

    def _names_at(self, location: Location) -> Iterator[str]:
        """Yield the names to try; those of safetensors files come from a listing, if there is one.

        Before the listing come the names that MLC models have, which so need no more requests than without it.
        """
        names = {name: is_safetensors(name) for name in self._names}
        yield from (name for name, is_file in names.items() if not is_file)
        files = [name for name, is_file in names.items() if is_file]
        listed = self._list(location) if self._may_choose else None
        if listed is None:
            yield from files
        elif usual := [name for name in files if name in listed]:
            yield from usual
        elif chosen := choose_safetensors(listed, str(location), lambda name: f"{location}{name}"):
            yield chosen

    def _list(self, location: Location) -> list[str] | None:
        """Return the names of the files in a model's folder; None if the server does not list them."""
        if not has_listing(location):
            return None
        try:
            listed = self.client.context.pool.run(functools.partial(read_listing, location, self.client))
        except TransferError as error:  # a mirror of Hugging Face need not have its API
            logger.debug("the files of %s were not listed: %s", location, str(error))
            return None
        return None if listed is None else [name for name in listed if "/" not in name]

    def _no_such_file(
        self, location: Location, first: NotFoundError | AuthError, refusals: Mapping[str, AuthError]
    ) -> TransferError:
        if isinstance(first, NotFoundError):
            absent = [name for name in self._names if name not in refusals]
            text = f"there is no {say_names(absent, 'at', str(location), f' (status {first.status})')}"
            hint: str | None = "Give the URL of the directory that holds the manifest, or of the manifest itself."
            if refusals:  # a server that tells them apart means it
                refusal = next(iter(refusals.values()))
                text += f"; the server refuses access to {' and '.join(refusals)} (status {refusal.status})"
                hint = refusal.hint
            return NotFoundError(text, url=str(location), status=first.status, hint=hint)
        return AuthError(
            f"the server refuses access to {' or '.join(self._names[:2])} at {location}, or has no such file "
            f"(status {first.status})",
            url=str(location),
            status=first.status,
            hint=first.hint,
        )

    def _request(
        self, location: Location, name: str, policy: RetryPolicy, cached: OpenedManifest | None = None
    ) -> OpenedManifest:
        """Request a manifest, parse it and cache it; return the cached one if the server says it has not changed."""
        if is_safetensors(name):
            return self._request_headers(location, name, policy, cached)
        context = self.client.context
        url, source_url = location.url(name), self.locations[0].url(name)
        known = None if cached is None else self._metadata(name, cached.digest)

        def fetch() -> ManifestBody | None:
            for attempt in self.client.attempts(policy):
                with attempt:
                    received = request_manifest(self.client, url, source_url, known)
                    if received is not None and received.is_manifest:
                        check_manifest_digest(received.data, name, url, context.integrity)
            return received

        # In a worker, so that this thread can cancel the request, and end it if the server stalls. This thread parses:
        # Ctrl-C can interrupt it here, and would have to wait for a worker.
        shards_to_come = None if cached is None else len(cached.manifest.shards)
        body = context.pool.run(fetch, tasks_to_come=shards_to_come)
        if body is None:
            assert cached is not None
            return cached
        if not body.is_manifest:
            try:
                parse_manifest(body.data, name=name, url=url, check=context.cancellation.poll)
            except ManifestSyntaxError as error:
                raise refusal_of(body, error) from error
        opened = self._parse(body.data, name, url)
        self.keep_manifest(name, body, opened.digest)
        return opened

    def _request_headers(
        self, location: Location, name: str, policy: RetryPolicy, cached: OpenedManifest | None
    ) -> OpenedManifest:
        """Request the headers of safetensors files, check them and cache them."""
        kept = None if cached is None else Headers.decode(cached.data)
        is_right = cached is not None and self._metadata(cached.file, cached.digest) is not None
        known = kept if is_right else None
        headers = HeadersRequest(self.client, location, self.locations[0], name, policy).send(known)
        if headers is None:
            assert cached is not None
            return cached
        is_chosen = self.locations[0].is_folder or (kept is not None and kept.is_chosen)
        data = replace(headers, is_chosen=is_chosen).encode()
        opened = self._parse(data, name, location.url(name))
        self.keep_manifest(name, ManifestBody(data, None, None, is_html=False), opened.digest)
        return opened

    def _parse(self, data: bytes, name: str, url: str) -> OpenedManifest:
        return open_manifest(data, name, url, self.client.context)

    def _metadata(self, name: str, digest: str) -> FileMetadata | None:
        """Return the metadata of the cached manifest, or None if it does not describe the bytes that were read.

        Somebody may have edited the file, or another process may have replaced it since; or a file was found to be of
        another version than its header. A 304 would not be about these bytes then.
        """
        metadata = self.cache.metadata(name)
        return metadata if metadata is not None and metadata.digests.get("sha256") == digest else None

    def _forget_version(self, name: str) -> None:
        """Ask for the manifest without a condition next time, as this one may have made the server fail."""
        metadata = self.cache.metadata(name)
        if metadata is not None and metadata.conditions:
            self.cache.try_to_remember(name, replace(metadata, etag=None, last_modified=None))

    def keep_manifest(self, name: str, body: ManifestBody, digest: str) -> None:
        """Publish a manifest in the cache, or headers and their index, if the cache can be written."""
        if is_safetensors(name) and (index := Headers.decode(body.data).index) is not None:
            # Nobody else reads the headers, but other programs read the index.
            copy = ManifestBody(index.start, index.etag, index.last_modified, is_html=False)
            self._keep(index.name, copy, hashlib.sha256(index.start).hexdigest())
        self._keep(kept_as(name), body, digest)

    def _keep(self, name: str, body: ManifestBody, digest: str) -> None:
        cache, data = self.cache, body.data
        try:
            if cache.read(name, MAX_KEPT_BYTES) == data:
                version = cache.version(name)
                if version is not None:
                    digests = {"sha256": digest}
                    metadata = FileMetadata(len(data), version[1], digests, body.etag, body.last_modified)
                    cache.try_to_remember(name, metadata)
                return
            with cache.partials.create(name) as partial:
                partial.hasher.add("sha256", self.client.context.cancellation.check)
                partial.write(data)
                cache.publish(partial, name, etag=body.etag, last_modified=body.last_modified).close()
        except NdcacheError as error:
            if is_gone(error):
                # Another process took the file away, and keeps its own, most likely the same: no reason to worry.
                logger.debug("the manifest could not be kept: %s", str(error))
            elif not isinstance(error, CacheUnavailableError):
                # Cached files can still be used, and what must be written later raises the error again.
                logger.warning("the manifest could not be kept: %s", str(error))
            elif not cache.fall_back(error):  # which warns the caller, once
                raise
