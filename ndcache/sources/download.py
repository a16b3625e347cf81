"""One file from a server to its place in the cache: received, counted, checked, published."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

from ..errors import (
    ChecksumError,
    IntegrityError,
    NdcacheError,
    SizeMismatchError,
    TransferError,
    TruncatedError,
    redact,
)
from ..format.manifest import Shard
from ..http.rate_limits import Limits, Permit, Served, is_refusal, origin_of
from ..http.response import Response
from ..http.retry import RetryPolicy, with_retries
from ..http.transport import RedirectTarget, Transport
from ..location.hub import at_commit, branch
from ..stats import LoadStats
from ..store.directory import ModelDirectory
from ..store.metadata import FileMetadata
from ..store.partial import PartialFile
from ..store.ranges import ByteRanges
from ..urls.url import parse
from ..workers.cancellation import Cancellation
from ..workers.pool import WorkerPool
from .range_queue import RangeQueue, RangeTask
from .transfer import Transfer, unasked

__all__ = ["DownloadResult", "Downloader"]

#: The most that is read at once: little enough to be in the CPU's cache when it is hashed and written. A cold fetch
#: with 256 KiB takes 1.07 times as long in /dev/shm and 1.04 times to a disk (benchmarks/fetch.py, 15 pairs each).
_READ_BYTES = 1 << 20
#: Bytes of a file that comes in pieces, of which several may be under way at once.
RANGE_THRESHOLD = 64 << 20
#: Bytes of a piece, at least and at most: each costs a round trip, and what comes before it is its turn to be hashed
#: is read back later.
PIECE_LIMITS = (16 << 20, 64 << 20)

logger = logging.getLogger("ndcache")

T = TypeVar("T")


@dataclass(frozen=True)
class DownloadResult:
    """What came of a shard.

    Attributes
    ----------
    file : binary file or None
        Open for reading; None if the one in the cache is still right.
    is_whole : bool
        Whether it is all there and was checked; if not, it has the wanted bytes, and holes.
    checked : tuple of str
        The algorithms of the digests that were compared.
    """

    file: BinaryIO | None
    is_whole: bool
    checked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Downloader:
    """What every transfer of one load shares.

    Attributes
    ----------
    transport : Transport
    policy : RetryPolicy
    cancellation : Cancellation
    stats : LoadStats
    cache : ModelDirectory
        Where files go.
    digests : bool
        Whether digests are checked, or sizes only.
    workers : WorkerPool
        Of the load, some of whom may bring pieces of a large file. Without threads unless given.
    limits : Limits
        What the servers accept; several loads may share it.
    """

    transport: Transport
    policy: RetryPolicy
    cancellation: Cancellation
    stats: LoadStats
    cache: ModelDirectory
    digests: bool = True
    workers: WorkerPool = field(default_factory=WorkerPool)
    limits: Limits = field(default_factory=Limits)
    _failing: set[int] = field(default_factory=set)  # which of the URLs are tried last
    _commits: dict[str, str] = field(default_factory=dict)  # of branches on Hugging Face
    _served: Served = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_served", Served(self.limits))

    def shard(
        self,
        shard: Shard,
        urls: Sequence[str],
        content_id: str,
        *,
        cached: FileMetadata | None = None,
        is_exclusive: bool = False,
        wanted: ByteRanges | None = None,
    ) -> DownloadResult:
        """Bring one shard into the cache, from the first of `urls` that gives the right bytes.

        What comes of a file of more than 64 MiB, or a few bytes of any, is asked for in pieces, with the help of
        workers that have nothing else to do.

        Parameters
        ----------
        shard : Shard
        urls : sequence of str
            Of the source, which the caller's session is for, and of mirrors: the same ones in each call.
        content_id : str
            What the manifest says of its content; see `FileMetadata.compare_content`.
        cached : FileMetadata, optional
            Of the file that is there. If the source says that it is still the same, nothing comes back.
        is_exclusive : bool
            Whether nobody else downloads this shard now.
        wanted : ByteRanges, optional
            The bytes that are enough. A mirror is asked for all if there is a digest to compare it with.

        Returns
        -------
        DownloadResult

        Raises
        ------
        TransferError, IntegrityError
            The first URL's error, those of the others attached.
        CacheError, CancelledError
        """
        with self.cache.partials.create(shard.data_path) as part:
            expected = self._expected(shard, None) if wanted is None else {}
            self._compute(part, expected)
            with self.stats.timed("write", file=shard.data_path):
                self.cache.partials.copy_longest(
                    part,
                    shard,
                    content_id,
                    self.cancellation.check,
                    is_checked=bool(expected),
                    is_exclusive=is_exclusive,
                )
            in_pieces = self.workers.max_helpers > 0 and (shard.nbytes > RANGE_THRESHOLD or wanted is not None)
            transfer = Transfer(
                shard,
                content_id,
                urls[0],
                part,
                cached,
                ByteRanges([(0, shard.nbytes)]) if wanted is None else wanted,
                self.cancellation,
                PIECE_LIMITS if in_pieces else None,
                self.workers.max_helpers,
                is_inherited=bool(part.ranges),
            )
            self.stats.count(resumed_bytes=transfer.wanted.nbytes - transfer.missing.nbytes)
            try:
                return self._from_any(transfer, urls)
            finally:
                transfer.leave_pieces()

    def file(self, name: str, url: str, limit: int) -> Path:
        """Bring a file of unknown size, up to `limit` bytes, into the cache."""

        def once() -> Path:
            with self.get(url, url, {}) as response, self.cache.partials.create(name) as part:
                if response.status != 200:
                    raise unasked(response)
                part.hasher.add("md5", self.cancellation.check)
                length = response.content_length
                if length is not None and length > limit:
                    raise SizeMismatchError(
                        "the file is larger than it may be",
                        url=url,
                        shard=name,
                        expected=limit,
                        received=length,
                    )
                self._receive(response, part, RangeTask(0, limit if length is None else length), self.cancellation)
                if response.may_be_truncated or (length is not None and part.nbytes < length):
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

        return self.retrying(once)

    def get(
        self,
        url: str,
        source_url: str,
        headers: Mapping[str, str],
        cancellation: Cancellation | None = None,
        redirects: dict[str, RedirectTarget] | None = None,
        *,
        may_be_encoded: bool = False,
    ) -> Response:
        """`Transport.get`, counted, and at the pace that the server accepts.

        A branch stays at the commit that it had when it was asked for first.
        """
        cancellation, name = cancellation or self.cancellation, branch(url)
        commit = self._commits.get(name) if name else None
        start = at_commit(url, commit) if commit else None
        self.stats.count(requests=1)
        with self.stats.timed("request", url=redact(url), range=headers.get("Range")) as others:

            def enter(url: str) -> Permit:
                begun = time.perf_counter()
                try:
                    return self.limits.of(url).enter(cancellation)
                finally:
                    others["rate_limit"] = others.get("rate_limit", 0.0) + time.perf_counter() - begun

            response = self.transport.get(
                url,
                headers,
                cancellation,
                source_url=source_url,
                redirects=redirects,
                enter=enter,
                may_be_encoded=may_be_encoded,
                start=start,
            )
        if name and response.commit:
            self._commits.setdefault(name, response.commit)
        self._served.gave(origin_of(response.url))
        if response.url != url:
            self._served.gave(origin_of(url))  # which told where to go
        return response

    def retrying(
        self, attempt: Callable[[], T], policy: RetryPolicy | None = None, progress: Callable[[], int] = lambda: 0
    ) -> T:
        """`with_retries`, as the load's policy says if there is no other."""
        return with_retries(attempt, policy or self.policy, self.cancellation, self.stats, progress, self._served)

    def _from_any(self, transfer: Transfer, urls: Sequence[str]) -> DownloadResult:
        errors: dict[int, NdcacheError] = {}
        for index in sorted(range(len(urls)), key=lambda index: index in self._failing):
            transfer.leave_pieces()
            transfer.with_ranges = True
            if index > 0 and self._expected(transfer.shard, None):
                transfer.want_whole_file()
            try:
                return self.retrying(
                    lambda url=urls[index]: self._shard_once(transfer, url),  # type: ignore[misc]
                    progress=lambda: transfer.part.furthest,
                )
            except (TransferError, IntegrityError) as error:
                error.shard = transfer.shard.data_path
                errors[index] = error
                if error.retryable and type(error).max_retries is None:
                    self._failing.add(index)  # it was tried again and again; the next shards need not wait for that
        first, *others = (errors[index] for index in sorted(errors))
        first.others = tuple(others)
        raise first

    def _shard_once(self, transfer: Transfer, url: str) -> DownloadResult:
        """Ask once for each piece that has not come, and publish the file if it is whole and right."""
        part, shard = transfer.part, transfer.shard
        try:
            while not transfer.is_complete:
                piece = transfer.take(url)
                if piece is None and transfer.pieces is not None:
                    transfer.pieces.wait()  # for those who have the last ones
                elif not self._bring(transfer, url, piece):
                    return DownloadResult(None, is_whole=True)
            if not transfer.has_whole_file:
                with self.stats.timed("publish", file=shard.data_path):
                    return DownloadResult(part.keep_with_holes(shard.nbytes), is_whole=False)
            expected = self._expected(shard, transfer.linked_sha256)
            self._compute(part, expected)
            self._catch_up(part, wait=True)
            transfer.check(url, expected)
        except ChecksumError:
            if not transfer.is_inherited:
                raise
            transfer.is_inherited = False  # what was left may have been torn: that is not the server's fault
            return self._shard_once(transfer, url)
        # What a mirror calls a version says nothing to the source, which will be asked.
        origin = part.source
        etag = origin.etag if origin is not None and origin.url == parse(transfer.source_url).address else None
        self.workers.release_slot()
        with self.stats.timed("publish", file=shard.data_path):
            file = self.cache.publish(part, shard.data_path, etag=etag, content_id=transfer.content_id)
        return DownloadResult(file, is_whole=True, checked=tuple(expected))

    def _bring(self, transfer: Transfer, url: str, piece: RangeTask | None) -> bool:
        """Ask for a piece, or for the whole file, once; False if the cached file is still right."""
        request, pieces = transfer.request(url, piece), transfer.pieces
        try:
            with self.get(url, transfer.source_url, request.headers, redirects=transfer.redirects) as response:
                if transfer.is_unchanged(request, response):
                    return False
                if not transfer.accept(url, request, response):
                    return True
                if response.status == 200 or not transfer.is_partial:
                    self._compute(transfer.part, self._expected(transfer.shard, response.linked_sha256))
                if pieces is not None and pieces is transfer.pieces:
                    for _ in range(pieces.helpers_wanted()):
                        self.workers.submit_helper(functools.partial(self._help, transfer, pieces, url))
                coming = piece if piece is not None and response.status == 206 else RangeTask(0, transfer.shard.nbytes)
                try:
                    self._receive(response, transfer.part, coming, self.cancellation)
                except SizeMismatchError:
                    transfer.restart()
                    raise
                if coming.position < coming.end:
                    raise transfer.truncated(url)
        except NdcacheError as error:
            transfer.redirects.pop(url, None)  # it may be the fault of where that led to
            if transfer.drop_condition(request, error):
                return True
            if isinstance(error, TruncatedError):
                raise transfer.truncated(url) from error.__cause__
            raise
        finally:
            if piece is not None and pieces is not None:
                pieces.put_back(piece)
        self._catch_up(transfer.part)
        return True

    def _help(self, transfer: Transfer, pieces: RangeQueue, url: str) -> None:
        """Bring pieces of another worker's file, until there are none or the server does not give one."""
        part, is_good = transfer.part, True
        while is_good:
            with pieces.help() as piece:
                if piece is None:
                    return
                request, is_good = transfer.request(url, piece, is_helping=True), False
                try:
                    with self.get(
                        url, transfer.source_url, request.headers, pieces.cancellation, transfer.redirects
                    ) as response:
                        is_right = response.status == 206 and response.is_range(*piece.span, transfer.shard.nbytes)
                        if is_right and transfer.is_of_version(response):
                            self._receive(response, part, piece, pieces.cancellation)
                            is_good = piece.position == piece.end
                    self._catch_up(part)
                except (NdcacheError, OSError) as error:
                    if isinstance(error, NdcacheError) and is_refusal(error):
                        self._served.note_limit(error)
                    logger.debug("a piece of %s did not come: %s", transfer.shard.data_path, str(error))
                    is_good = False
                except BaseException as error:
                    pieces.helper_done(error)
                    raise
                if not is_good:
                    pieces.helper_done()  # what to make of it is for the owner to see, whose turn it is next

    def _expected(self, shard: Shard, linked_sha256: str | None) -> dict[str, str]:
        """The digests that will be compared: the manifest's, the caller's, and the server's own."""
        if not self.digests:
            return {}
        linked = {} if linked_sha256 is None else {"sha256": linked_sha256}
        return {**linked, **shard.digests}

    def _compute(self, part: PartialFile, algorithms: Iterable[str]) -> None:
        with self.stats.timed("hash", file=part.name):
            for algorithm in algorithms:
                part.hasher.add(algorithm, self.cancellation.check)

    def _catch_up(self, part: PartialFile, *, wait: bool = False) -> None:
        with self.stats.timed("hash", file=part.name):
            part.hasher.catch_up(self.cancellation.check, wait=wait)

    def _receive(self, response: Response, part: PartialFile, piece: RangeTask, cancellation: Cancellation) -> None:
        """Write the body to `part`; one byte more than there should be is asked for, to notice what is too long."""
        start, spent, origin = piece.position, {"write": 0.0, "hash": 0.0}, origin_of(response.url)
        with self.stats.timed("network", file=part.name, start=start, nbytes=piece.end - start) as others:
            try:
                while data := response.read_some(min(_READ_BYTES, piece.end + 1 - piece.position)):
                    cancellation.check()
                    self.stats.count(network_bytes=len(data))
                    self._served.gave(origin)
                    if piece.position + len(data) > piece.end:
                        raise SizeMismatchError(
                            "the server sends more than there should be",
                            url=response.url,
                            expected=piece.end - start,
                        )
                    begun = time.perf_counter()
                    part.write_at(data, piece.position)
                    written = time.perf_counter()
                    part.hasher.feed(data, piece.position)
                    spent["write"] += written - begun
                    spent["hash"] += time.perf_counter() - written
                    piece.position += len(data)
            finally:
                others.update(spent)
