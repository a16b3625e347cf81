"""A model on a server: its files are in the cache, or are brought there when they are asked for."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import BinaryIO

from .cache import Validator
from .digests import mismatch
from .download import Downloader
from .errors import (
    CacheError,
    CacheUnavailableError,
    ManifestError,
    NdcacheError,
    NotFoundError,
    OfflineError,
    ProtocolError,
    TransferError,
)
from .fetch import in_worker
from .locate import Location
from .manifest import Manifest, Shard
from .model import Model, Obtained
from .parse import parse_manifest
from .retry import RetryPolicy, with_retries
from .strict_json import MAX_MANIFEST_BYTES

__all__ = ["RemoteModel"]

#: How often a shard is obtained before other processes that take it away count as an error.
_TRIES = 5

logger = logging.getLogger("ndcache")


class RemoteModel(Model):
    """A model on a server, its files in the cache.

    Parameters
    ----------
    location, mirrors : Location
        Where it is, and where else its shards may be had.
    downloader : Downloader
        Brings what is missing into its cache.
    verify : str
        The ``verify`` option.
    offline : bool
        Use what is cached and nothing else.
    """

    def __init__(
        self,
        location: Location,
        downloader: Downloader,
        *,
        mirrors: Iterable[Location] = (),
        verify: str,
        offline: bool,
    ) -> None:
        self._bases = (location, *mirrors)
        self._downloader = downloader
        self._cache = downloader.cache
        self._verify = verify
        self._offline = offline
        self._manifest_digest = ""
        super().__init__(self._open_manifest(), self._cache.directory)

    def has(self, shard: Shard, *, of_any_size: bool = False) -> bool:
        size = self._cache.size(shard.data_path)
        return size is not None and (of_any_size or size == shard.nbytes)

    def is_ready(self, shard: Shard) -> bool:
        return self.has(shard) and self._cache.is_known(shard, self._claim(shard)) is not False

    def prepare(self, shards: Sequence[Shard]) -> None:
        missing = [shard for shard in shards if not self.is_ready(shard)]
        if missing and self._offline:
            raise _offline(self._bases[0], [shard.data_path for shard in missing])
        if missing:
            self._cache.ensure_room(sum(shard.nbytes for shard in missing))

    def obtain(self, shard: Shard) -> Obtained:
        tries = 0
        while True:
            try:
                return self._obtain_once(shard)
            except CacheUnavailableError as error:
                tries += 1
                # Somebody else deleted the model, or published the shard of another version, just then.
                if tries == _TRIES or not isinstance(error.__cause__, FileNotFoundError):
                    raise

    def check(self, shard: Shard) -> bool:
        file = self._cache.open_shard(shard)
        if file is None:
            self._cache.set_aside(shard.data_path)
            return False
        with file:
            return self._has_right_bytes(shard, file)

    def _obtain_once(self, shard: Shard) -> Obtained:
        checked = "size" if self._verify == "never" else shard.integrity
        file = self._cache.open_shard(shard)
        if file is not None:
            try:
                if self._is_good(shard, file):
                    return Obtained(file, from_cache=True, checked=checked)
            except BaseException:
                file.close()
                raise
            file.close()
        if self._offline:
            raise _offline(self._bases[0], [shard.data_path])
        if file is None and self.has(shard, of_any_size=True):
            self._cache.set_aside(shard.data_path)  # it has another size
        urls = [base.url(shard.data_path) for base in self._bases]
        return Obtained(self._downloader.shard(shard, urls, self._claim(shard)), from_cache=False, checked=checked)

    def _is_good(self, shard: Shard, file: BinaryIO) -> bool:
        known = self._cache.is_known(shard, self._claim(shard), file)
        if known is False:
            return False  # of another version; the new one takes its name
        if self._verify == "never" or (self._verify == "download" and known):
            return True
        if self._has_right_bytes(shard, file):
            return True
        logger.warning("%s in the cache is not what the manifest says: set aside", shard.data_path)
        return False

    def _has_right_bytes(self, shard: Shard, file: BinaryIO) -> bool:
        name, claim = shard.data_path, self._claim(shard)
        with self._downloader.stats.timed("hash"):
            good = mismatch(file, shard, self._downloader.stop.check) is None
        if not good:
            self._cache.set_aside(name, file)
        elif not self._cache.is_known(shard, claim, file):
            status = os.fstat(file.fileno())
            known = Validator(status.st_size, status.st_mtime_ns, shard.md5sum, shard.sha256sum, claim=claim)
            self._cache.try_to_remember(name, known)
        return good

    def _claim(self, shard: Shard) -> str:
        """What the manifest says of the shard's content; without a digest, that it is of this manifest."""
        return shard.sha256sum or shard.md5sum or f"{self.manifest.name} {self._manifest_digest}"

    # --- the manifest

    def _open_manifest(self) -> Manifest:
        """The server's manifest if it can be had, else the cached one."""
        location = self._bases[0]
        cached = self._cached_manifest()
        if self._offline:
            if cached is None:
                raise _offline(location, [location.manifest_names[0]])
            return cached
        if cached is None:
            return self._first_manifest()
        try:
            # One request and no second try: there is something to fall back on.
            return self._request_manifest(cached.name, RetryPolicy(retries=0), cached)
        except (TransferError, ManifestError) as error:
            if isinstance(error, NotFoundError) and (renamed := self._under_another_name(cached.name)):
                return renamed
            warnings.warn(
                f"using the cached manifest of {location}: {error}", RuntimeWarning, stacklevel=_depth_below_caller()
            )
            return cached

    def _cached_manifest(self) -> Manifest | None:
        for name in self._bases[0].manifest_names:
            data = self._cache.read(name, MAX_MANIFEST_BYTES)
            if data is None:
                continue
            try:
                manifest = parse_manifest(data, name=name, url=str(self._bases[0]))
            except ManifestError as error:
                logger.warning("the cached manifest is damaged and will be fetched anew: %s", error)
                continue
            self._manifest_digest = hashlib.sha256(data).hexdigest()
            return manifest
        return None

    def _under_another_name(self, old: str) -> Manifest | None:
        """The manifest under its other usual name, if the server has it there now."""
        for name in self._bases[0].manifest_names:
            if name == old:
                continue
            try:
                manifest = self._request_manifest(name, RetryPolicy(retries=0), None)
            except (TransferError, ManifestError):
                continue
            with contextlib.suppress(CacheError):  # a read-only cache asks for both next time, too
                self._cache.set_aside(old)
            return manifest
        return None

    def _first_manifest(self) -> Manifest:
        location = self._bases[0]
        first: NotFoundError | None = None
        for name in location.manifest_names:
            try:
                return self._request_manifest(name, self._downloader.policy, None)
            except NotFoundError as error:
                first = first or error
        assert first is not None
        raise NotFoundError(
            f"there is no {' or '.join(location.manifest_names)} at {location} (status {first.status})",
            url=str(location),
            status=first.status,
            hint="Give the URL of the directory that holds the manifest, or of the manifest itself.",
        ) from first

    def _request_manifest(self, name: str, policy: RetryPolicy, cached: Manifest | None) -> Manifest:
        url = self._bases[0].url(name)
        stop, stats = self._downloader.stop, self._downloader.stats
        # In a worker, so that this thread can cancel it, and end it if the server drips.
        return in_worker(lambda: with_retries(lambda: self._request_once(name, url, cached), policy, stop, stats), stop)

    def _request_once(self, name: str, url: str, cached: Manifest | None) -> Manifest:
        known = None if cached is None else self._known_manifest(name)
        self._downloader.stats.count(requests=1)
        with self._downloader.transport.get(url, _conditions(known), self._downloader.stop) as response:
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
        manifest = parse_manifest(data, name=name, url=url)
        self._keep_manifest(name, data, headers.get("ETag"), headers.get("Last-Modified"))
        self._manifest_digest = hashlib.sha256(data).hexdigest()
        return manifest

    def _known_manifest(self, name: str) -> Validator | None:
        """What is known of the cached manifest that was read: its ETag, unless that is of other bytes.

        The file may have been edited here, or replaced by another process since: a 304 would not be about these bytes.
        """
        known = self._cache.validator(name)
        return known if known is not None and known.sha256 == self._manifest_digest else None

    def _keep_manifest(self, name: str, data: bytes, etag: str | None, last_modified: str | None) -> None:
        try:
            if self._cache.read(name, MAX_MANIFEST_BYTES) == data:
                mtime_ns = self._cache.path(name).stat().st_mtime_ns
                digest = hashlib.sha256(data).hexdigest()
                known = Validator(len(data), mtime_ns, None, digest, etag=etag, last_modified=last_modified)
                self._cache.try_to_remember(name, known)
                return
            with self._cache.part(name, ("sha256",)) as part:
                part.write(data)
                self._cache.publish(part, name, etag=etag, last_modified=last_modified).close()
        except (NdcacheError, FileNotFoundError) as error:
            # What is cached can still be served; what must be written will say so.
            logger.warning("the manifest could not be kept: %s", error)


def _depth_below_caller() -> int:
    """The ``stacklevel`` that makes a warning name the line that called ndcache."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__package__", "") in ("ndcache", "ndcache.devices"):
        depth, frame = depth + 1, frame.f_back
    return depth


def _conditions(known: Validator | None) -> dict[str, str]:
    if known is None:
        return {}
    if known.etag:
        return {"If-None-Match": known.etag}
    return {"If-Modified-Since": known.last_modified} if known.last_modified else {}


def _offline(location: Location, missing: list[str]) -> OfflineError:
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    error = OfflineError(
        f"offline, and not in the cache: {shown} of {location}",
        hint="Run once with the network: not offline, and NDCACHE_OFFLINE and HF_HUB_OFFLINE unset.",
    )
    error.missing = tuple(missing)
    return error
