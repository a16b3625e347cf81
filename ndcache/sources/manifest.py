"""Which manifest a model on a server has now: the server's if it can be had, else the one in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ..caller import warn_caller
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
from ..format.integrity import Integrity, check_manifest_digest, manifest_names_to_try, verify_and_parse
from ..format.manifest import Manifest
from ..format.parse import parse_manifest
from ..format.strict_json import MAX_MANIFEST_BYTES
from ..http.retry import RetryPolicy
from ..location.locate import Location
from ..store.metadata import FileMetadata
from .download import Downloader
from .manifest_request import ManifestBody, NotThereError, refusal_of, request_manifest

__all__ = ["ManifestSource", "offline_error"]

logger = logging.getLogger("ndcache")

#: A manifest, and the SHA-256 of its bytes.
Opened: TypeAlias = tuple[Manifest, str]
_FAILURES = (TransferError, ManifestError, ChecksumError)
#: Failures that say nothing of the request itself.
_NO_ANSWER = (ConnectError, StallError, TLSError, RateLimitedError)
_ONE_TRY = RetryPolicy(retries=0)


@dataclass(frozen=True)
class ManifestSource:
    """Where the manifest of one load comes from.

    Attributes
    ----------
    bases : sequence of Location
        Where the model is; and its mirrors, for a manifest that the caller has pinned.
    downloader : Downloader
    integrity : mapping
        The digests that the caller demands.
    offline : bool
        Use what is cached and nothing else.
    """

    bases: Sequence[Location]
    downloader: Downloader
    integrity: Integrity
    offline: bool

    def open(self) -> Opened:
        """The manifest, and its digest.

        Raises
        ------
        TransferError, ManifestError, ChecksumError
            It cannot be had, or is of no use, and none is cached.
        OfflineError
        """
        cached = self._cached()
        if self.offline:
            if cached is None:
                raise offline_error(self.bases[0], [self._names[0]])
            return cached
        if cached is None:
            return self._first()
        name = cached[0].name
        try:
            # One request and no second try: there is something to fall back on.
            return self._request(self.bases[0], name, _ONE_TRY, cached)
        except (*_FAILURES, NotThereError) as failure:
            error: NdcacheError = failure
            if isinstance(failure, NotThereError):
                if renamed := self._under_another_name(name):
                    return renamed
                error = failure.reason
            if not isinstance(error, _NO_ANSWER):
                self._forget_version(name)
            message = f"using the cached manifest of {self.bases[0]}: {error}"
            warn_caller(message)
            return cached

    @property
    def _names(self) -> tuple[str, ...]:
        return manifest_names_to_try(self.bases[0].manifest_names, self.integrity)

    def _cached(self) -> Opened | None:
        for name in self._names:
            data = self.downloader.cache.read(name, MAX_MANIFEST_BYTES)
            if data is None:
                continue
            try:
                manifest = self._parsed(data, name, str(self.bases[0]))
            except (ManifestError, ChecksumError) as error:
                logger.warning("the cached manifest is of no use: %s", str(error))
                continue
            return manifest, _sha256(data)
        return None

    def _under_another_name(self, old: str) -> Opened | None:
        """The manifest under its other usual name, if the server has it there now."""
        for name in self._names:
            if name == old:
                continue
            try:
                opened = self._request(self.bases[0], name, _ONE_TRY)
            except (*_FAILURES, NotThereError):
                continue
            with contextlib.suppress(CacheError):  # a read-only cache asks for both next time, too
                self.downloader.cache.quarantine(old)
            return opened
        return None

    def _first(self) -> Opened:
        """Of the source; one that the caller has pinned may come from a mirror, too."""
        try:
            return self._of(self.bases[0])
        except _FAILURES as error:
            mirrors = self.bases[1:] if set(self._names) <= self.integrity.keys() else ()
            for mirror in mirrors:
                try:
                    return self._of(mirror)
                except _FAILURES as other:
                    error.others += (other,)
            raise

    def _of(self, location: Location) -> Opened:
        """The first there is under one of its usual names."""
        first: NdcacheError | None = None
        for name in self._names:
            try:
                return self._request(location, name, self.downloader.policy)
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

    def _request(self, location: Location, name: str, policy: RetryPolicy, cached: Opened | None = None) -> Opened:
        cancellation = self.downloader.cancellation
        url, source_url = location.url(name), self.bases[0].url(name)
        known = None if cached is None else self._known(name, cached[1])

        def once() -> ManifestBody | None:
            body = request_manifest(self.downloader, url, source_url, known)
            if body is not None and body.is_manifest:
                check_manifest_digest(body.data, name, url, self.integrity)
            return body

        # In a worker, so that this thread can cancel it, and end it if the server drips. Parsing is for this thread:
        # it can be interrupted here, and would have to be waited for there.
        to_come = None if cached is None else len(cached[0].shards)
        body = self.downloader.workers.run(lambda: self.downloader.retrying(once, policy), tasks_to_come=to_come)
        if body is None:
            assert cached is not None
            return cached
        if not body.is_manifest:
            try:
                parse_manifest(body.data, name=name, url=url, check=cancellation.poll)
            except ManifestSyntaxError as error:
                raise refusal_of(body, error) from error
        manifest = self._parsed(body.data, name, url)
        self._keep(name, body)
        return manifest, _sha256(body.data)

    def _parsed(self, data: bytes, name: str, url: str) -> Manifest:
        return verify_and_parse(
            data, name=name, url=url, integrity=self.integrity, check=self.downloader.cancellation.poll
        )

    def _known(self, name: str, digest: str) -> FileMetadata | None:
        """What is known of the cached manifest that was read: its ETag, unless that is of other bytes.

        The file may have been edited here, or replaced by another process since: a 304 would not be about these bytes.
        """
        known = self.downloader.cache.metadata(name)
        return known if known is not None and known.digests.get("sha256") == digest else None

    def _forget_version(self, name: str) -> None:
        """Ask for the manifest without a condition next time: perhaps this one is what the server failed at."""
        cache = self.downloader.cache
        known = cache.metadata(name)
        if known is not None and known.conditions:
            cache.try_to_remember(name, replace(known, etag=None, last_modified=None))

    def _keep(self, name: str, body: ManifestBody) -> None:
        cache, data = self.downloader.cache, body.data
        try:
            if cache.read(name, MAX_MANIFEST_BYTES) == data:
                version = cache.version(name)
                if version is not None:
                    known = FileMetadata(
                        len(data), version[1], {"sha256": _sha256(data)}, body.etag, body.last_modified
                    )
                    cache.try_to_remember(name, known)
                return
            with cache.partials.create(name) as part:
                part.hasher.add("sha256", self.downloader.cancellation.check)
                part.write(data)
                cache.publish(part, name, etag=body.etag, last_modified=body.last_modified).close()
        except NdcacheError as error:
            # Another process that keeps its own, most likely the same one, is no reason to worry. As to others: what is
            # cached can still be served, and what must be written will say so.
            overtaken = is_gone(error.__cause__)
            if isinstance(error, CacheUnavailableError) and not overtaken:
                if not cache.fall_back(error):
                    raise
                return  # the caller is told of it once
            level = logging.DEBUG if overtaken else logging.WARNING
            logger.log(level, "the manifest could not be kept: %s", str(error))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def offline_error(location: Location, missing: list[str]) -> OfflineError:
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    error = OfflineError(
        f"offline, and not in the cache: {shown} of {location}",
        hint="Run once with the network: not offline, and NDCACHE_OFFLINE and HF_HUB_OFFLINE unset.",
    )
    error.missing = tuple(missing)
    return error
