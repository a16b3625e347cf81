"""One file from a server to its place in the cache: received, counted, checked, published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from .cache import ArtifactCache
from .errors import (
    ChecksumError,
    IntegrityError,
    NdcacheError,
    SizeMismatchError,
    TransferError,
    TruncatedError,
    redact,
)
from .manifest import Shard
from .parts import Part
from .retry import RetryPolicy, with_retries
from .stats import LoadStats
from .stop import Stop
from .transfer import Transfer, unasked
from .transport import Response, Transport
from .validator import Validator

__all__ = ["Downloader"]

#: The most that is read at once: it is still in the CPU's cache when it is hashed and written. With 1 MiB, a cold fetch
#: to a disk took a quarter longer (benchmarks/fetch.py, 9 and 15 pairs).
_READ_BYTES = 1 << 18


@dataclass(frozen=True)
class Downloader:
    """What every transfer of one load shares.

    Attributes
    ----------
    transport : Transport
    policy : RetryPolicy
    stop : Stop
    stats : LoadStats
    cache : ArtifactCache
        Where files go.
    digests : bool
        Whether digests are checked, or sizes only.
    """

    transport: Transport
    policy: RetryPolicy
    stop: Stop
    stats: LoadStats
    cache: ArtifactCache
    digests: bool = True
    _failing: set[int] = field(default_factory=set)  # which of the URLs are tried last

    def shard(
        self,
        shard: Shard,
        urls: Sequence[str],
        claim: str,
        *,
        cached: Validator | None = None,
        is_alone: bool = False,
    ) -> BinaryIO | None:
        """Bring one shard into the cache, from the first of `urls` that gives the right bytes; its file comes open.

        Parameters
        ----------
        shard : Shard
        urls : sequence of str
            Of the source, which the caller's session is for, and of mirrors: the same ones in each call.
        claim : str
            What the manifest says of its content; see `Validator.agrees`.
        cached : Validator, optional
            Of the file that is there. If the source says that it is still the same, nothing comes back.
        is_alone : bool
            Whether nobody else downloads this shard now.

        Raises
        ------
        TransferError, IntegrityError
            The first URL's error, those of the others attached.
        CacheError, CancelledError
        """
        with self.cache.part(shard.data_path) as part:
            expected = self._expected(shard, None)
            self._compute(part, expected)
            with self.stats.timed("write", file=shard.data_path) as others:
                self.cache.copy_longest_part(
                    part, shard, claim, self.stop.check, is_checked=bool(expected), is_alone=is_alone
                )
                others["hash"] = part.take_spent()["hash"]
            self.stats.count(resumed_bytes=part.nbytes)
            transfer = Transfer(shard, claim, urls[0], part, cached, is_inherited=part.nbytes > 0)
            return self._from_any(transfer, urls)

    def file(self, name: str, url: str, limit: int) -> Path:
        """Bring a file of unknown size, up to `limit` bytes, into the cache."""

        def once() -> Path:
            with self.get(url, url, {}) as response, self.cache.part(name) as part:
                if response.status != 200:
                    raise unasked(response)
                part.compute("md5", self.stop.check)
                length = response.content_length
                if length is not None and length > limit:
                    raise SizeMismatchError(
                        "the file is larger than it may be",
                        url=url,
                        shard=name,
                        expected=limit,
                        received=length,
                    )
                self._receive(response, part, limit if length is None else length)
                if length is not None and part.nbytes < length:
                    raise TruncatedError(
                        "the body ended early",
                        url=url,
                        shard=name,
                        expected=length,
                        received=part.nbytes,
                    )
                headers = response.headers
                etag, last_modified = headers.get("ETag"), headers.get("Last-Modified")
                with self.stats.timed("publish", file=name):
                    self.cache.publish(part, name, etag=etag, last_modified=last_modified).close()
                return self.cache.path(name)

        return with_retries(once, self.policy, self.stop, self.stats)

    def get(self, url: str, owner: str, headers: Mapping[str, str]) -> Response:
        """`Transport.get`, counted."""
        self.stats.count(requests=1)
        with self.stats.timed("request", url=redact(url), range=headers.get("Range")):
            return self.transport.get(url, headers, self.stop, owner=owner)

    def _from_any(self, transfer: Transfer, urls: Sequence[str]) -> BinaryIO | None:
        errors: dict[int, NdcacheError] = {}
        for index in sorted(range(len(urls)), key=lambda index: index in self._failing):
            transfer.with_ranges = True
            try:
                return with_retries(
                    lambda url=urls[index]: self._shard_once(transfer, url),  # type: ignore[misc]
                    self.policy,
                    self.stop,
                    self.stats,
                    lambda: transfer.part.furthest,
                )
            except (TransferError, IntegrityError) as error:
                error.shard = transfer.shard.data_path
                errors[index] = error
                if error.retryable and error.max_retries is None:
                    self._failing.add(index)  # it was tried again and again; the next shards need not wait for that
        first, *others = (errors[index] for index in sorted(errors))
        first.others = tuple(others)
        raise first

    def _shard_once(self, transfer: Transfer, url: str) -> BinaryIO | None:
        """One request, or none if all has come; the published file, or None if the cached one is still right."""
        part, shard = transfer.part, transfer.shard
        try:
            if transfer.is_complete:
                assert part.origin is not None
                expected = self._expected(shard, part.origin.sha256)
                self._compute(part, expected)
            else:
                conditions = transfer.conditions(url)
                with self.get(url, transfer.owner, conditions) as response:
                    if response.status == 304 and "If-None-Match" in conditions:
                        return None
                    is_usable = transfer.accept(url, response)
                    if is_usable:
                        expected = self._expected(shard, response.linked_sha256)
                        self._compute(part, expected)
                        self._receive(response, part, shard.nbytes)
                if not is_usable:
                    return self._shard_once(transfer, url)
            transfer.check(url, expected)
        except ChecksumError:
            if not transfer.is_inherited:
                raise
            transfer.is_inherited = False  # what was left may have been torn: that is not the server's fault
            return self._shard_once(transfer, url)
        # What a mirror calls a version says nothing to the source, which will be asked.
        origin = part.origin
        etag = origin.etag if origin is not None and origin.url == redact(transfer.owner) else None
        with self.stats.timed("publish", file=shard.data_path):
            return self.cache.publish(part, shard.data_path, etag=etag, claim=transfer.claim)

    def _expected(self, shard: Shard, linked_sha256: str | None) -> dict[str, str]:
        """The digests that will be compared: the manifest's, the caller's, and the server's own."""
        if not self.digests:
            return {}
        linked = {} if linked_sha256 is None else {"sha256": linked_sha256}
        return {**linked, **shard.digests}

    def _compute(self, part: Part, algorithms: Iterable[str]) -> None:
        with self.stats.timed("hash", file=part.name):
            for algorithm in algorithms:
                part.compute(algorithm, self.stop.check)

    def _receive(self, response: Response, part: Part, nbytes: int) -> None:
        """Write the body to `part`; one byte more than `nbytes` is asked for, to notice what is too long."""
        with self.stats.timed("network", file=part.name, start=part.nbytes) as others:
            try:
                self._receive_all(response, part, nbytes)
            finally:
                others.update(part.take_spent())

    def _receive_all(self, response: Response, part: Part, nbytes: int) -> None:
        try:
            while data := response.read_some(min(_READ_BYTES, nbytes + 1 - part.nbytes)):
                self.stop.check()
                self.stats.count(network_bytes=len(data))
                if part.nbytes + len(data) > nbytes:
                    part.restart()
                    raise SizeMismatchError(
                        "the server sends more than there should be", url=response.url, expected=nbytes
                    )
                part.write(data)
        except TruncatedError as error:
            error.expected, error.received = nbytes, part.nbytes
            error.message = f"the body ended early, after {part.nbytes:,} of {nbytes:,} bytes"
            raise
