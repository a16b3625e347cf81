"""Which manifest a model on a server has now: the server's if it can be had, else the one in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .caller import warn_caller
from .download import Downloader
from .errors import (
    CacheError,
    ChecksumError,
    ManifestError,
    ManifestSyntaxError,
    NdcacheError,
    NotFoundError,
    OfflineError,
    ProtocolError,
    TransferError,
    TruncatedError,
)
from .locate import Location
from .manifest import Manifest
from .pins import Pins, manifest_names_to_try, open_manifest
from .retry import RetryPolicy
from .strict_json import MAX_MANIFEST_BYTES
from .validator import Validator

__all__ = ["ManifestSource", "offline_error"]

logger = logging.getLogger("ndcache")

#: A manifest, and the SHA-256 of its bytes.
Opened: TypeAlias = tuple[Manifest, str]
_FAILURES = (TransferError, ManifestError, ChecksumError)
_ONE_TRY = RetryPolicy(retries=0)


@dataclass(frozen=True)
class ManifestSource:
    """Where the manifest of one load comes from.

    Attributes
    ----------
    bases : sequence of Location
        Where the model is; and its mirrors, for a manifest that the caller has pinned.
    downloader : Downloader
    pins : mapping
        The digests that the caller demands.
    offline : bool
        Use what is cached and nothing else.
    """

    bases: Sequence[Location]
    downloader: Downloader
    pins: Pins
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
        except _FAILURES as error:
            if isinstance(error, NotFoundError) and (renamed := self._under_another_name(name)):
                return renamed
            message = f"using the cached manifest of {self.bases[0]}: {error}"
            warn_caller(message)
            return cached

    @property
    def _names(self) -> tuple[str, ...]:
        return manifest_names_to_try(self.bases[0].manifest_names, self.pins)

    def _cached(self) -> Opened | None:
        for name in self._names:
            data = self.downloader.cache.read(name, MAX_MANIFEST_BYTES)
            if data is None:
                continue
            try:
                manifest = open_manifest(data, name=name, url=str(self.bases[0]), pins=self.pins)
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
            except _FAILURES:
                continue
            with contextlib.suppress(CacheError):  # a read-only cache asks for both next time, too
                self.downloader.cache.set_aside(old)
            return opened
        return None

    def _first(self) -> Opened:
        """Of the source; one that the caller has pinned may come from a mirror, too."""
        try:
            return self._of(self.bases[0])
        except _FAILURES as error:
            mirrors = self.bases[1:] if set(self._names) <= self.pins.keys() else ()
            for mirror in mirrors:
                try:
                    return self._of(mirror)
                except _FAILURES as other:
                    error.others += (other,)
            raise

    def _of(self, location: Location) -> Opened:
        """The first there is under one of its usual names."""
        first: NotFoundError | None = None
        for name in self._names:
            try:
                return self._request(location, name, self.downloader.policy)
            except NotFoundError as error:
                first = first or error
        assert first is not None
        raise NotFoundError(
            f"there is no {' or '.join(self._names)} at {location} (status {first.status})",
            url=str(location),
            status=first.status,
            hint="Give the URL of the directory that holds the manifest, or of the manifest itself.",
        ) from first

    def _request(self, location: Location, name: str, policy: RetryPolicy, cached: Opened | None = None) -> Opened:
        def once() -> Opened:
            return self._request_once(location, name, cached)

        # In a worker, so that this thread can cancel it, and end it if the server drips.
        to_come = None if cached is None else len(cached[0].shards)
        return self.downloader.workers.run(lambda: self.downloader.retrying(once, policy), tasks_to_come=to_come)

    def _request_once(self, location: Location, name: str, cached: Opened | None) -> Opened:
        known = None if cached is None else self._known(name, cached[1])
        url, owner = location.url(name), self.bases[0].url(name)
        with self.downloader.get(url, owner, _conditions(known)) as response:
            if response.status == 304 and cached is not None and known is not None:
                return cached
            if response.status != 200:
                raise ProtocolError(
                    f"the server answered with status {response.status}", url=url, status=response.status
                )
            length = response.content_length
            data = response.read(MAX_MANIFEST_BYTES)
            headers = response.headers
        if length is not None and len(data) < length <= MAX_MANIFEST_BYTES:
            raise ProtocolError("the manifest came only in part", url=url, shard=name)
        try:
            manifest = open_manifest(data, name=name, url=url, pins=self.pins)
        except (ManifestSyntaxError, ChecksumError) as error:
            if not response.is_cut:
                raise
            raise TruncatedError("the body ended early", url=url, shard=name) from error
        # What a mirror calls a version says nothing to the source.
        etag, last_modified = (headers.get("ETag"), headers.get("Last-Modified")) if url == owner else (None, None)
        self._keep(name, data, etag, last_modified)
        return manifest, _sha256(data)

    def _known(self, name: str, digest: str) -> Validator | None:
        """What is known of the cached manifest that was read: its ETag, unless that is of other bytes.

        The file may have been edited here, or replaced by another process since: a 304 would not be about these bytes.
        """
        known = self.downloader.cache.validator(name)
        return known if known is not None and known.digests.get("sha256") == digest else None

    def _keep(self, name: str, data: bytes, etag: str | None, last_modified: str | None) -> None:
        cache = self.downloader.cache
        try:
            if cache.read(name, MAX_MANIFEST_BYTES) == data:
                mtime_ns = cache.path(name).stat().st_mtime_ns
                known = Validator(len(data), mtime_ns, {"sha256": _sha256(data)}, etag, last_modified)
                cache.try_to_remember(name, known)
                return
            with cache.part(name) as part:
                part.compute("sha256", self.downloader.stop.check)
                part.write(data)
                cache.publish(part, name, etag=etag, last_modified=last_modified).close()
        except (NdcacheError, FileNotFoundError) as error:
            # Another process that keeps its own, most likely the same one, is no reason to worry. As to others: what is
            # cached can still be served, and what must be written will say so.
            overtaken = isinstance(error.__cause__ or error, FileNotFoundError)
            level = logging.DEBUG if overtaken else logging.WARNING
            logger.log(level, "the manifest could not be kept: %s", str(error))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _conditions(known: Validator | None) -> dict[str, str]:
    if known is None:
        return {}
    if known.etag:
        return {"If-None-Match": known.etag}
    return {"If-Modified-Since": known.last_modified} if known.last_modified else {}


def offline_error(location: Location, missing: list[str]) -> OfflineError:
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    error = OfflineError(
        f"offline, and not in the cache: {shown} of {location}",
        hint="Run once with the network: not offline, and NDCACHE_OFFLINE and HF_HUB_OFFLINE unset.",
    )
    error.missing = tuple(missing)
    return error
