"""The transfer of one companion file from one server, which continues where an earlier one broke off."""

from __future__ import annotations

import contextlib
from types import TracebackType

from ..errors import ChecksumError, IntegrityError, TruncatedError
from ..format.manifest import Shard
from ..format.paths import flatten
from ..http.response import Response
from ..sources.downloads.download import Downloader
from ..sources.downloads.range_queue import RangeTask
from ..store.partials.file import PartialFile
from ..urls.url import parse
from .publish import writing
from .wanted import WantedFile, check_headers

__all__ = ["FileTransfer"]


class FileTransfer:
    """The transfer of one companion file from one server. Use it in a ``with`` block.

    It continues what is there of the file, from an earlier attempt or an interrupted process, if the server still has
    that version. A partial file is created once there is something to write.

    Parameters
    ----------
    downloader : Downloader
    wanted : WantedFile
    url : str
    """

    def __init__(self, downloader: Downloader, wanted: WantedFile, url: str) -> None:
        self._downloader = downloader
        self._context = downloader.client.context
        self._partials = downloader.cache.partials
        self._wanted = wanted
        self._url = url
        self._address = parse(url).address
        self._open = contextlib.ExitStack()
        self._partial: PartialFile | None = None

    def __enter__(self) -> FileTransfer:
        if self._partials.find(flatten(self._wanted.name)):
            self._copy_leftover(self._create())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.__exit__(kind, error, at)

    @property
    def nbytes(self) -> int:
        """Return how many bytes are there."""
        return 0 if self._partial is None else self._partial.furthest

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that ask for the rest of the file; none if nothing of it is there."""
        partial = self._partial
        if partial is None or partial.source is None or not partial.nbytes:
            return {}
        return {"Range": f"bytes={partial.nbytes}-", "If-Range": partial.source.etag}

    def receive(self, response: Response) -> PartialFile | None:
        """Receive the body of a response to a request with `headers`, and check size and digests.

        Returns
        -------
        PartialFile or None
            The complete file. None if the server does not have the rest of what is there: ask again, for all of it.

        Raises
        ------
        TransferError, IntegrityError
            What was received is kept if the next attempt can continue it.
        """
        partial, start = self._partial or self._create(), 0
        if response.status in (206, 416) and partial.nbytes:
            if not self._is_rest(response, partial):
                partial.restart()
                return None
            start = partial.nbytes
        try:
            length = check_headers(response, self._wanted, self._url, start)
            if not start:
                self._begin(response, partial)
            self._receive(response, partial, RangeTask(start, self._wanted.most if length is None else length), length)
        except IntegrityError:
            partial.restart()
            raise
        return partial

    def _create(self) -> PartialFile:
        self._open.enter_context(writing(self._downloader.cache, self._wanted.name))
        self._partial = self._open.enter_context(self._partials.create(self._wanted.name))
        return self._partial

    def _copy_leftover(self, partial: PartialFile) -> None:
        name, digests = self._wanted.name, self._wanted.digests if self._context.compares_digests else {}
        self._partials.copy_longest(
            partial,
            Shard(name, self._wanted.most, None, None, "raw-shard", ()),
            self._address,
            self._context.cancellation.check,
            is_checked=bool(digests),
            is_exclusive=False,
        )

    def _begin(self, response: Response, partial: PartialFile) -> None:
        """Begin anew, and note which version the bytes will be of."""
        if partial.nbytes:
            partial.restart()
        if response.etag is not None:
            partial.set_source(self._address, response.etag, self._address, response.linked_sha256)

    def _is_rest(self, response: Response, partial: PartialFile) -> bool:
        """Return whether a response has all bytes that are not there, of the same version."""
        length, start, source = response.content_length, partial.nbytes, partial.source
        if response.status != 206 or length is None or source is None or response.etag != source.etag:
            return False
        return response.is_range(start, start + length, start + length)

    def _receive(self, response: Response, partial: PartialFile, body: RangeTask, length: int | None) -> None:
        check = self._context.cancellation.check
        linked = {} if response.linked_sha256 is None else {"sha256": response.linked_sha256}
        expected = {**linked, **self._wanted.digests} if self._context.compares_digests else {}
        for algorithm in {"sha256", *expected}:
            partial.hasher.add(algorithm, check)
        partial.hasher.catch_up(check, wait=True)
        self._downloader.receive(response, partial, body, self._context.cancellation)
        if (response.may_be_truncated and length is None) or (length is not None and partial.nbytes < length):
            raise TruncatedError(
                "the body ended early", url=self._url, shard=self._wanted.name, expected=length, received=partial.nbytes
            )
        for algorithm, digest in expected.items():
            actual = partial.hasher.hexdigest(algorithm)
            if actual != digest:
                raise ChecksumError(
                    f"wrong {algorithm}: received {actual}, expected {digest}",
                    url=self._url,
                    shard=self._wanted.name,
                    expected=digest,
                    received=actual,
                    hint="The file on the server is damaged, or of another version.",
                )
