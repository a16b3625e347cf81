"""One file from a server to its place in the cache: received, counted, checked, published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .cache import ArtifactCache, Part
from .errors import (
    ChecksumError,
    NdcacheError,
    ProtocolError,
    SizeMismatchError,
    TransferError,
    TruncatedError,
)
from .manifest import Shard
from .retry import RetryPolicy, with_retries
from .stats import LoadStats
from .stop import Stop
from .transport import Response, Transport

__all__ = ["Downloader"]

#: The most that is read at once: it is still in the CPU's cache when it is hashed and written.
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

    def shard(self, shard: Shard, urls: Sequence[str], claim: str) -> BinaryIO:
        """Bring one shard into the cache, from the first of `urls` that gives the right bytes; its file comes open.

        Parameters
        ----------
        shard : Shard
        urls : sequence of str
            Of the source, which the caller's session is for, and of mirrors.
        claim : str
            What the manifest says of its content; see `ArtifactCache.is_known`.

        Raises
        ------
        TransferError, IntegrityError
            The first URL's error, those of the others attached.
        CacheError, CancelledError
        """
        errors: list[NdcacheError] = []
        for url in urls:
            try:
                return with_retries(
                    lambda url=url: self._shard_once(shard, url, urls[0], claim),  # type: ignore[misc]
                    self.policy,
                    self.stop,
                    self.stats,
                )
            except (TransferError, ChecksumError, SizeMismatchError) as error:
                error.shard = shard.data_path
                errors.append(error)
        errors[0].others = tuple(errors[1:])
        raise errors[0]

    def file(self, name: str, url: str, limit: int) -> Path:
        """Bring a file of unknown size, up to `limit` bytes, into the cache."""

        def once() -> Path:
            with self._get(url, url) as response, self.cache.part(name, ("md5",)) as part:
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
                self._publish(part, name, response).close()
                return self.cache.path(name)

        return with_retries(once, self.policy, self.stop, self.stats)

    def _shard_once(self, shard: Shard, url: str, owner: str, claim: str) -> BinaryIO:
        algorithms = (shard.integrity,) if self.digests and shard.integrity != "size" else ()
        with self._get(url, owner) as response:
            _check_length(response, shard)
            with self.cache.part(shard.data_path, algorithms) as part:
                with self.stats.timed("network"):
                    self._receive(response, part, shard.nbytes)
                _check_part(part, shard, url)
                return self._publish(part, shard.data_path, response, claim)

    def _get(self, url: str, owner: str) -> Response:
        self.stats.count(requests=1)
        response = self.transport.get(url, {}, self.stop, owner=owner)
        if response.status != 200:
            with response:
                raise ProtocolError(
                    f"the server answered a plain request with status {response.status}",
                    url=url,
                    status=response.status,
                )
        return response

    def _receive(self, response: Response, part: Part, nbytes: int) -> None:
        """Write the body to `part`; one byte more than `nbytes` is asked for, to notice what is too long."""
        while data := response.read_some(min(_READ_BYTES, nbytes + 1 - part.nbytes)):
            self.stop.check()
            self.stats.count(network_bytes=len(data))
            if part.nbytes + len(data) > nbytes:
                raise SizeMismatchError("the server sends more than there should be", url=response.url, expected=nbytes)
            part.write(data)

    def _publish(self, part: Part, name: str, response: Response, claim: str | None = None) -> BinaryIO:
        with self.stats.timed("publish"):
            return self.cache.publish(
                part,
                name,
                etag=response.headers.get("ETag"),
                last_modified=response.headers.get("Last-Modified"),
                claim=claim,
            )


def _check_length(response: Response, shard: Shard) -> None:
    """Before the body is read: what is announced must be what the manifest promises."""
    length = response.content_length
    if length is None or length == shard.nbytes:
        return
    raise SizeMismatchError(
        f"the server has {length:,} bytes where the manifest says {shard.nbytes:,}",
        url=response.url,
        shard=shard.data_path,
        expected=shard.nbytes,
        received=length,
        hint=_what_it_is(response, length),
    )


def _what_it_is(response: Response, length: int) -> str:
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        return "It is a web page: check the URL, and whether it needs a login."
    if length < 512 and response.read(512).startswith(b"version https://git-lfs"):
        return "It is a git-lfs pointer, not the file: serve the file itself (git lfs pull)."
    return "The manifest and the shard are of different versions, or the upload is not complete."


def _check_part(part: Part, shard: Shard, url: str) -> None:
    if part.nbytes != shard.nbytes:
        raise TruncatedError(
            f"the body ended early, after {part.nbytes:,} of {shard.nbytes:,} bytes",
            url=url,
            shard=shard.data_path,
            expected=shard.nbytes,
            received=part.nbytes,
        )
    for algorithm, expected in (("sha256", shard.sha256sum), ("md5", shard.md5sum)):
        actual = part.digest(algorithm)
        if actual is not None and actual != expected:
            raise ChecksumError(
                f"wrong {algorithm}: {actual} came, {expected} is in the manifest",
                url=url,
                shard=shard.data_path,
                expected=expected,
                received=actual,
                hint="The file on the server is damaged or of another version than the manifest.",
            )
