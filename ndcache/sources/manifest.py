"""Open the manifest of a model on a server: the server's, or the cached one if the server does not give it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..caller import warn_caller
from ..context import LoadContext
from ..errors import (
    AuthError,
    CacheError,
    CacheUnavailableError,
    ChecksumError,
    ConnectError,
    ManifestError,
    ManifestSyntaxError,
    NdcacheError,
    NotFoundError,
    OfflineError,
    RateLimitedError,
    StallError,
    TLSError,
    TransferError,
)
from ..files.folder import is_gone
from ..format.integrity import check_manifest_digest, manifest_names_to_try, verify_and_parse
from ..format.manifest import Manifest
from ..format.parse import parse_manifest
from ..format.strict_json import MAX_MANIFEST_BYTES
from ..http.retry import RetryPolicy
from ..location import Location
from ..store.directory import ModelDirectory
from ..store.metadata import FileMetadata
from .client import Client
from .manifest_request import ManifestBody, NotThereError, refusal_of, request_manifest

__all__ = ["ManifestSource", "OpenedManifest", "offline_error", "open_manifest"]

logger = logging.getLogger("ndcache")

_FAILURES = (TransferError, ManifestError, ChecksumError)
#: Failures that say nothing about the request itself.
_NO_ANSWER = (ConnectError, StallError, TLSError, RateLimitedError)
_ONE_TRY = RetryPolicy(retries=0)


@dataclass(frozen=True)
class OpenedManifest:
    """A manifest, and the SHA-256 of its bytes.

    Attributes
    ----------
    manifest : Manifest
    digest : str
    data : bytes
        The bytes, for other processes; empty if none will need them.
    """

    manifest: Manifest
    digest: str
    data: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class ManifestSource:
    """Where the manifest of one load comes from.

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
        cached = self._cached()
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
            if not isinstance(error, _NO_ANSWER):
                self._forget_version(name)
            message = f"using the cached manifest of {self.locations[0]}: {error}"
            warn_caller(message)
            return cached

    @property
    def _names(self) -> tuple[str, ...]:
        return manifest_names_to_try(self.locations[0].manifest_names, self.client.context.integrity)

    def _cached(self) -> OpenedManifest | None:
        for name in self._names:
            data = self.cache.read(name, MAX_MANIFEST_BYTES)
            if data is None:
                continue
            try:
                return self._parse(data, name, str(self.locations[0]))
            except (ManifestError, ChecksumError) as error:
                logger.warning("the cached manifest cannot be used: %s", str(error))
        return None

    def _fetch_renamed(self, old: str) -> OpenedManifest | None:
        """Fetch the manifest under its other usual name, if the server has it there now."""
        for name in self._names:
            if name == old:
                continue
            try:
                opened = self._request(self.locations[0], name, _ONE_TRY)
            except (*_FAILURES, NotThereError):
                continue
            with contextlib.suppress(CacheError):  # with a read-only cache, the next load asks for both again
                self.cache.quarantine(old)
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
        first: NdcacheError | None = None
        for name in self._names:
            try:
                return self._request(location, name, self.client.context.policy)
            except NotThereError as error:
                first = first or error.reason
        assert first is not None
        if isinstance(first, (NotFoundError, AuthError)):
            raise self._no_such_file(location, first) from first
        raise first

    def _no_such_file(self, location: Location, first: NotFoundError | AuthError) -> TransferError:
        names = " or ".join(self._names)
        if isinstance(first, NotFoundError):
            return NotFoundError(
                f"there is no {names} at {location} (status {first.status})",
                url=str(location),
                status=first.status,
                hint="Give the URL of the directory that holds the manifest, or of the manifest itself.",
            )
        return AuthError(
            f"the server refuses access to {names} at {location}, or has no such file (status {first.status})",
            url=str(location),
            status=first.status,
            hint=first.hint,
        )

    def _request(
        self, location: Location, name: str, policy: RetryPolicy, cached: OpenedManifest | None = None
    ) -> OpenedManifest:
        """Request a manifest, parse it and cache it; return the cached one if the server says it has not changed."""
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
        self.keep(name, body, opened.digest)
        return opened

    def _parse(self, data: bytes, name: str, url: str) -> OpenedManifest:
        return open_manifest(data, name, url, self.client.context)

    def _metadata(self, name: str, digest: str) -> FileMetadata | None:
        """Return the metadata of the cached manifest, or None if it does not describe the bytes that were read.

        Somebody may have edited the file, or another process may have replaced it since. A 304 would not be about these
        bytes then.
        """
        metadata = self.cache.metadata(name)
        return metadata if metadata is not None and metadata.digests.get("sha256") == digest else None

    def _forget_version(self, name: str) -> None:
        """Ask for the manifest without a condition next time, as this one may have made the server fail."""
        metadata = self.cache.metadata(name)
        if metadata is not None and metadata.conditions:
            self.cache.try_to_remember(name, replace(metadata, etag=None, last_modified=None))

    def keep(self, name: str, body: ManifestBody, digest: str) -> None:
        """Publish a manifest in the cache, if it can be written."""
        cache, data = self.cache, body.data
        try:
            if cache.read(name, MAX_MANIFEST_BYTES) == data:
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


def open_manifest(data: bytes, name: str, url: str, context: LoadContext) -> OpenedManifest:
    """Parse the bytes of a manifest, and check them.

    Raises
    ------
    ManifestError, ChecksumError, CancelledError
    """
    manifest = verify_and_parse(data, name=name, url=url, integrity=context.integrity, check=context.cancellation.poll)
    return OpenedManifest(manifest, hashlib.sha256(data).hexdigest(), data)


def offline_error(location: Location, missing: list[str]) -> OfflineError:
    """Return the error for files that are not in the cache and must not be fetched."""
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    error = OfflineError(
        f"offline, and not in the cache: {shown} of {location}",
        hint="Run once with the network: not offline, and NDCACHE_OFFLINE and HF_HUB_OFFLINE unset.",
    )
    error.missing = tuple(missing)
    return error
