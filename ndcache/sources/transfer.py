"""One shard on its way: what has come of it, what to ask the server for next, and whether to believe the answer.

A transfer that breaks off goes on where it was, now or in another process, and a large file comes in several pieces at
once, if the server says of each with a 206, the exact Content-Range and the same strong ETag that it belongs to what
is there. In all other cases the file starts over, as one stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import (
    ChecksumError,
    NdcacheError,
    ProtocolError,
    RangeError,
    RemoteChangedError,
    SizeMismatchError,
    TransferError,
    TruncatedError,
)
from ..format.manifest import Shard
from ..format.strict_json import WEB_PAGE_HINT
from ..http.response import Response
from ..http.transport import RedirectTarget
from ..store.metadata import FileMetadata, may_blame_condition
from ..store.partial import PartialFile
from ..store.ranges import ByteRange, ByteRanges
from ..urls.url import parse
from ..workers.cancellation import Cancellation
from .range_queue import RangeQueue, RangeTask

__all__ = ["Request", "Transfer", "unasked"]


@dataclass(frozen=True)
class Request:
    """What is asked of a server.

    Attributes
    ----------
    headers : dict of str to str
    span : Span or None
        Which bytes; None is the whole file.
    is_rest : bool
        Whether they are to be of the version that is there.
    """

    headers: dict[str, str]
    span: ByteRange | None = None
    is_rest: bool = False


@dataclass
class Transfer:
    """How far a shard's transfer has come.

    Attributes
    ----------
    shard : Shard
    content_id : str
        What the manifest says of its content; see `FileMetadata.compare_content`.
    source_url : str
        The source's URL, which the caller's session is for.
    part : Part
        What has come, and of which version.
    cached : FileMetadata or None
        What is known of an older file that may still be right.
    wanted : ByteRanges
        Which bytes are enough.
    cancellation : Cancellation
    piece_limits : tuple of int or None
        Bytes of the pieces that the file is asked for in, at least and at most; None is all at once.
    most_helpers : int
        How many threads besides may bring pieces.
    is_inherited : bool
        Whether the first bytes are what somebody else left.
    with_ranges : bool
        Whether the server may be asked for a part of the file.
    is_stream : bool
        Whether the file is asked for in one piece from now on, as nothing told which version its ranges were of.
    changes : int
        How often the file changed on the server.
    is_asked_for : bool
        Whether the server has said that it gives the file; without that, not even an empty one is there.
    pieces : Pieces or None
        What is still to come, while it comes in pieces.
    redirects : dict of str to RedirectTarget
        Where the servers have redirected to.
    linked_sha256 : str or None
        What the server has said of the content.
    """

    shard: Shard
    content_id: str
    source_url: str
    part: PartialFile
    cached: FileMetadata | None
    wanted: ByteRanges
    cancellation: Cancellation
    piece_limits: tuple[int, int] | None = None
    most_helpers: int = 0
    is_inherited: bool = False
    with_ranges: bool = True
    changes: int = 0
    is_stream: bool = field(default=False, init=False)
    is_asked_for: bool = field(default=False, init=False)
    pieces: RangeQueue | None = field(default=None, init=False)
    redirects: dict[str, RedirectTarget] = field(default_factory=dict, init=False)
    linked_sha256: str | None = field(init=False)
    _etags: set[str] = field(default_factory=set, init=False)  # of all versions that were begun or gone on with

    def __post_init__(self) -> None:
        origin = self.part.source
        self.linked_sha256 = None if origin is None else origin.sha256
        if origin is not None:
            self._etags.add(origin.etag)

    @property
    def is_complete(self) -> bool:
        """Whether all that is wanted is there already, left by somebody else or by a try that failed later."""
        return (self.part.source is not None or self.is_asked_for) and not self.missing

    @property
    def missing(self) -> ByteRanges:
        """What is wanted and has not come."""
        return self.wanted.without(self.part.ranges)

    @property
    def has_whole_file(self) -> bool:
        """Whether all bytes are there, be they wanted or not."""
        return self.part.nbytes == self.shard.nbytes

    @property
    def is_partial(self) -> bool:
        """Whether less than the whole file is wanted."""
        return self.wanted.nbytes < self.shard.nbytes

    def want_whole_file(self) -> None:
        """Have no less than the whole file be enough."""
        self.wanted = ByteRanges([(0, self.shard.nbytes)])

    def take(self, url: str) -> RangeTask | None:
        """The piece to ask this server for next; None is the whole file, or that others bring what is left."""
        if self.pieces is None:
            has_some = self._is_of(url)
            if not self.with_ranges or self.is_stream or not (has_some or self.piece_limits or self.is_partial):
                return None
            ranges = self.missing if has_some else self.wanted
            self.pieces = RangeQueue(ranges, self.cancellation, self.piece_limits, self.most_helpers)
        return self.pieces.take()

    def request(self, url: str, piece: RangeTask | None, *, is_helping: bool = False) -> Request:
        """How to ask for a piece, or for the whole file; it need not come if it is the one in the cache."""
        etag = self.cached.etag if self.cached is not None and url == self.source_url else None
        condition = {"If-None-Match": etag} if etag else {}
        if piece is None:
            return Request(condition)
        headers = {"Range": f"bytes={piece.position}-{piece.end - 1}"}
        if not (is_helping or self._is_of(url)):
            return Request({**headers, **condition}, piece.span)
        assert self.part.source is not None
        return Request({**headers, "If-Range": self.part.source.etag}, piece.span, is_rest=True)

    def accept(self, url: str, request: Request, response: Response) -> bool:
        """Judge an answer, before its body is read.

        Returns
        -------
        bool
            Whether the body is what was asked for; a whole file makes the part start over, as the first bytes of
            another version do. If not, ask again: then for the whole file.
        """
        if request.span is None and response.status != 200:
            raise unasked(response)
        if response.status == 206 and request.span is not None and response.is_range(*request.span, self.shard.nbytes):
            if request.is_rest:
                if self.is_of_version(response):
                    return True
                self._start_over(url, response.etag)
                return False
            if response.etag is not None:
                self._begin(url, response, keep_pieces=True)
                return True
            self.is_stream = True
        if response.status != 200:  # another range, one that could not be gone on with, or 416: the file is shorter
            self.with_ranges = False
            self.leave_pieces()
            return False
        _check_length(response, self.shard)
        if request.is_rest and not self.is_of_version(response):
            self._start_over(url, response.etag)
        else:
            self.with_ranges = request.span is None  # the server may not care for them
        self._begin(url, response)
        return True

    def is_unchanged(self, request: Request, response: Response) -> bool:
        """Whether an answer says that the file in the cache is still right."""
        is_asked = response.status == 304 and "If-None-Match" in request.headers
        return is_asked and self.cached is not None and self.cached.is_confirmed_by(response.headers)

    def drop_condition(self, request: Request, error: NdcacheError) -> bool:
        """Ask without a condition from now on if it may be what the server failed at; return whether it may."""
        if "If-None-Match" not in request.headers or not (
            isinstance(error, TransferError) and (error.status == 304 or may_blame_condition(error.status))
        ):
            return False
        self.cached = None
        return True

    def is_of_version(self, response: Response) -> bool:
        """Whether an answer is about the version that the part is of."""
        origin = self.part.source
        return origin is not None and response.etag == origin.etag

    def check(self, url: str, expected: Mapping[str, str]) -> None:
        """Raise unless what has come has the expected digests."""
        part, shard = self.part, self.shard
        for algorithm, digest in expected.items():
            actual = part.hasher.hexdigest(algorithm)
            if actual != digest:
                self.restart()
                raise ChecksumError(
                    f"wrong {algorithm}: {actual} came, {digest} is what it should be",
                    url=url,
                    shard=shard.data_path,
                    expected=digest,
                    received=actual,
                    hint="The file on the server is damaged, or of another version than the manifest.",
                )

    def truncated(self, url: str) -> TruncatedError:
        """The error for a body that ended before it should have."""
        expected = self.wanted.nbytes
        received = expected - self.missing.nbytes
        return TruncatedError(
            f"the body ended early, after {received:,} of {expected:,} bytes",
            url=url,
            shard=self.shard.data_path,
            expected=expected,
            received=received,
        )

    def restart(self) -> None:
        """Throw away what has come."""
        self.leave_pieces()
        self.part.restart()

    def leave_pieces(self) -> None:
        """Have nobody else work on the file any more."""
        if self.pieces is not None:
            self.pieces.end()
            self.pieces = None

    def _is_of(self, url: str) -> bool:
        """Whether what has come is of a version that this server has given."""
        origin = self.part.source
        has_begun = bool(self.part.ranges) or self.pieces is not None  # whose helpers may bring the first bytes
        return has_begun and origin is not None and origin.url == parse(url).address

    def _begin(self, url: str, response: Response, *, keep_pieces: bool = False) -> None:
        self.is_asked_for = True
        if not keep_pieces:
            self.leave_pieces()
        if self.part.ranges or self.part.source is not None:
            self.part.restart()
        self.linked_sha256 = response.linked_sha256
        if response.etag is not None:
            self.is_stream = self.is_stream or (self.changes > 0 and response.etag in self._etags)
            self._etags.add(response.etag)
            self.part.set_source(parse(url).address, response.etag, self.content_id, response.linked_sha256)

    def _start_over(self, url: str, etag: str | None) -> None:
        """Throw away what is of another version than what the server has now, or whose version it does not tell."""
        self.restart()
        if self.is_stream or etag is None or etag in self._etags:
            # It leaves the ETag out of ranges, gives them one of their own, or is several servers that do not agree.
            self.is_stream = True
            return
        self.changes += 1
        if self.changes > 1:
            raise RemoteChangedError(
                "the file changed on the server while it was being read, and again when it was begun anew",
                url=url,
                shard=self.shard.data_path,
                hint="Is it being uploaded just now? Try again later.",
            )


def unasked(response: Response) -> TransferError:
    kind = RangeError if response.status in (206, 416) else ProtocolError
    return kind(
        f"the server answered a plain request with status {response.status}", url=response.url, status=response.status
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
        return WEB_PAGE_HINT
    if length < 512 and response.read(512).startswith(b"version https://git-lfs"):
        return "It is a git-lfs pointer, not the file: serve the file itself (git lfs pull)."
    return "The manifest and the shard are of different versions, or the upload is not complete."
