"""The state of one shard's transfer: the bytes received, the next action, and the check of each response.

A transfer that breaks off continues where it was, now or in another process, and several ranges of a large file are
received at once. Both need a server that answers each range with status 206, the exact Content-Range and the strong
ETag of the bytes that are there. Otherwise the file starts over, as one stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from ...errors import ChecksumError, NdcacheError, RemoteChangedError, SizeMismatchError, TruncatedError
from ...format.integrity import has_right_header
from ...format.manifest import Shard
from ...http.response import Response
from ...http.transport import RedirectTarget
from ...store.metadata import FileMetadata
from ...store.partials.file import PartialFile
from ...store.partials.ranges import ByteRanges
from ...urls.url import parse
from ...workers.cancellation import Cancellation
from .range_queue import RangeQueue, RangeTask
from .shard_request import DownloadPlan, Request, check_length, unexpected_status

__all__ = ["Action", "Transfer"]


class Action(Enum):
    """The next need of a transfer."""

    FETCH = "send the next request"
    WAIT = "wait for the helpers, which have the last ranges"
    CHECK = "compare the digests of the complete file"
    PUBLISH = "publish the complete file"
    KEEP_RANGES = "keep the wanted ranges, which are complete"
    USE_CACHED = "use the cached file, which has not changed"


@dataclass
class _Versions:
    """The versions of a file that servers have named, by their ETags.

    Attributes
    ----------
    etags : set of str
        The ETags of all versions that this transfer has begun or continued.
    changes : int
        How often the file has changed.
    are_told_by_ranges : bool
        Whether the ETag of a range says which version it belongs to.
    """

    etags: set[str]
    changes: int = 0
    are_told_by_ranges: bool = True

    def begin(self, etag: str) -> None:
        """Note the version that the transfer begins to receive."""
        if self.changes and etag in self.etags:
            self.are_told_by_ranges = False
        self.etags.add(etag)

    def change(self, etag: str | None, url: str, name: str, *, was_read: bool) -> None:
        """Note that a response is of another version than the one being received.

        Parameters
        ----------
        etag : str or None
            That of the response.
        url, name : str
        was_read : bool
            Whether some of the version being received was given out.

        Raises
        ------
        RemoteChangedError
            The file changed for the second time, or after some of it was given out.
        """
        if not self.are_told_by_ranges or etag is None or etag in self.etags:
            # The server leaves the ETag out of ranges, or gives them ETags of their own; or there are several servers
            # with different ETags.
            self.are_told_by_ranges = False
            return
        self.changes += 1
        if was_read:
            raise RemoteChangedError(
                "the file changed on the server after some of its tensors had been given out",
                url=url,
                shard=name,
                hint="Begin again: all tensors should be of one version.",
                retryable=False,
            )
        if self.changes > 1:
            raise RemoteChangedError(
                "the file changed on the server while it was being read, and again after a fresh start",
                url=url,
                shard=name,
                hint="Is it being uploaded just now? Try again later.",
            )


@dataclass(eq=False)
class Transfer:
    """One shard's transfer: `next_action` says what to do, and only methods change the state.

    Attributes
    ----------
    plan : DownloadPlan
    partial : PartialFile
        The bytes received, and their version.
    cancellation : Cancellation
    checks_digests : bool
        Whether the complete file's digests are compared.
    task_bytes : tuple of int or None
        The least and the most bytes of a range, if several are received at once.
    max_helpers : int
        How many other workers may receive ranges.
    url : str
        The URL to request from now.
    wanted : ByteRanges
        The ranges that must be received.
    request : Request
        The request to send now.
    queue : RangeQueue or None
        The ranges that are still to come, while the file is received in ranges.
    redirects : dict of str to RedirectTarget
        Where servers have redirected to.
    """

    plan: DownloadPlan
    partial: PartialFile
    cancellation: Cancellation
    checks_digests: bool
    task_bytes: tuple[int, int] | None = None
    max_helpers: int = 0
    url: str = field(init=False)
    wanted: ByteRanges = field(init=False)
    request: Request = field(default_factory=lambda: Request({}), init=False)
    queue: RangeQueue | None = field(default=None, init=False)
    redirects: dict[str, RedirectTarget] = field(default_factory=dict, init=False)
    _versions: _Versions = field(init=False)
    _linked_sha256: str | None = field(init=False)  # the server's digest of the content
    _cached: FileMetadata | None = field(init=False)  # None once the condition may have made the server fail
    _is_copied: bool = field(init=False)  # whether the first bytes come from somebody else's partial file
    _accepts_ranges: bool = field(default=True, init=False)
    _body: RangeTask | None = field(default=None, init=False)  # the range that the accepted response has
    _is_given: bool = field(
        default=False, init=False
    )  # whether the server has sent the file; an empty one takes no bytes
    _is_unchanged: bool = field(default=False, init=False)
    _is_checked: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        plan, source = self.plan, self.partial.source
        self.url = plan.urls[0]
        self.wanted = _all_of(plan.shard) if plan.ranges is None else plan.ranges
        self._versions = _Versions(set() if source is None else {source.etag})
        self._linked_sha256 = None if source is None else source.sha256
        self._cached = plan.cached
        self._is_copied = bool(self.partial.ranges)

    @property
    def missing(self) -> ByteRanges:
        """Return the wanted ranges that have not been received."""
        return self.wanted.without(self.partial.ranges)

    @property
    def nbytes(self) -> int:
        """Return how many of the wanted bytes are here. Any thread may ask."""
        return self.wanted.nbytes - self.missing.nbytes

    @property
    def is_partial(self) -> bool:
        """Return whether less than the whole shard is wanted."""
        return self.wanted.nbytes < self.plan.shard.nbytes

    @property
    def expected_digests(self) -> dict[str, str]:
        """Return the digests that the complete file must have: the server's, the manifest's and the caller's."""
        if not self.checks_digests:
            return {}
        linked = {} if self._linked_sha256 is None else {"sha256": self._linked_sha256}
        return {**linked, **self.plan.shard.digests}

    @property
    def source_etag(self) -> str | None:
        """Return the ETag of the bytes received if the source gave it; a mirror's would mean nothing to the source."""
        source = self.partial.source
        return source.etag if source is not None and source.url == parse(self.plan.urls[0]).address else None

    def use_url(self, index: int) -> None:
        """Request from another of the plan's URLs; a mirror must send the whole shard if its digest can be checked."""
        self.end_queue()
        self.url = self.plan.urls[index]
        self._accepts_ranges = True
        if index > 0 and self.checks_digests and self.plan.shard.digests:
            self.wanted = _all_of(self.plan.shard)

    def next_action(self) -> Action:
        """Return what to do now; for `Action.FETCH`, `request` is the request to send."""
        if self._is_unchanged:
            return Action.USE_CACHED
        if (self.partial.source is not None or self._is_given) and not self.missing:
            if self.partial.nbytes < self.plan.shard.nbytes:
                return Action.KEEP_RANGES
            return Action.PUBLISH if self._is_checked else Action.CHECK
        task = self._next_task()
        if task is None and self.queue is not None:
            return Action.WAIT
        self.request = self._request(task, continues=task is not None and self._has_begun_here())
        return Action.FETCH

    def request_for_helper(self, task: RangeTask) -> Request:
        """Return the request for a helper's task."""
        return self._request(task, continues=True)

    @contextmanager
    def fetching(self) -> Iterator[Request]:
        """Yield `request`, which the block sends; handle the errors of the block.

        If the request's condition may have made the server fail, suppress the error: the next request has no condition.

        Raises
        ------
        TruncatedError
            The body of the accepted response ended early.
        """
        request, queue, self._body = self.request, self.queue, None
        try:
            yield request
            if self._body is not None and not self._body.is_done:
                raise self._truncated()
        except NdcacheError as error:
            self.redirects.pop(self.url, None)  # the target may be at fault
            if isinstance(error, SizeMismatchError) and self._body is not None:
                self._restart()  # the body went on where it should have ended
            if request.may_have_caused(error):
                self._cached = None
                return
            if isinstance(error, TruncatedError):
                raise self._truncated() from error.__cause__
            raise
        finally:
            if request.task is not None and queue is not None:
                queue.put_back(request.task)

    def accept(self, response: Response) -> RangeTask | None:
        """Check the response to `request`, before its body is read.

        Returns
        -------
        RangeTask or None
            The range to receive from the body. None if there is nothing to receive, and `next_action` tells how to go
            on: the cached file has not changed, or the response is of another version than the one being received.

        Raises
        ------
        TransferError, SizeMismatchError
            The response is of no use.
        """
        self._body = self._find_body(response)
        growing = self.plan.growing
        # A response without a length may be of another file.
        has_size = response.status == 206 or response.content_length is not None
        if self._body is not None and growing is not None and has_size and not self.expected_digests:
            self.partial.let_read(growing)
        return self._body

    def _find_body(self, response: Response) -> RangeTask | None:
        request, cached, size = self.request, self._cached, self.plan.shard.nbytes
        if response.status == 304 and request.is_conditional and cached is not None:
            self._is_unchanged = cached.is_confirmed_by(response.headers)
            if self._is_unchanged:
                return None
        if request.range is None and response.status != 200:
            raise unexpected_status(response)
        if response.status == 206 and request.range is not None and response.is_range(*request.range, size):
            if request.continues:
                if self._is_same_version(response):
                    return request.task
                self._change_version(response)
                return None
            if response.etag is not None:
                self._begin(response)
                return request.task
            self._versions.are_told_by_ranges = False
        if response.status != 200:  # another range, one without an ETag, or 416: the server's file is shorter
            self._accepts_ranges = False
            self.end_queue()
            return None
        check_length(response, self.plan.shard)
        if request.continues and not self._is_same_version(response):
            self._change_version(response)
        else:
            self._accepts_ranges = request.range is None  # otherwise the server seems to ignore ranges
        self.end_queue()
        self._begin(response)
        return RangeTask(0, size)

    def accept_for_helper(self, task: RangeTask, response: Response) -> bool:
        """Return whether a response has the range that a helper requested, of the version being received."""
        is_range = response.status == 206 and response.is_range(*task.missing, self.plan.shard.nbytes)
        return is_range and self._is_same_version(response)

    def check_digests(self) -> None:
        """Compare the digests of the complete file, which must have been computed.

        Bytes that were copied from somebody else's partial file may have been torn in a crash. If the digests are
        wrong then, the transfer starts over.

        Raises
        ------
        ChecksumError
            The server sent wrong bytes.
        """
        for algorithm, digest in self.expected_digests.items():
            actual = self.partial.hasher.hexdigest(algorithm)
            if actual != digest:
                self._restart()
                if self._is_copied:
                    self._is_copied = False
                    return
                raise ChecksumError(
                    f"wrong {algorithm}: received {actual}, expected {digest}",
                    url=self.url,
                    shard=self.plan.shard.data_path,
                    expected=digest,
                    received=actual,
                    hint="The file on the server is damaged, or of another version than the manifest.",
                )
        self.check_header()
        self._is_checked = True

    def check_header(self) -> None:
        """Check that a safetensors file, or the ranges of one, is of the version whose header is known.

        Raises
        ------
        RemoteChangedError
            It is not.
        """
        if not has_right_header(self.partial.file, self.plan.shard):
            self._restart()
            raise RemoteChangedError(
                "the file is of another version than the header that was read before",
                url=self.url,
                shard=self.plan.shard.data_path,
                hint="It has just changed on the server: try again.",
            )

    def wait(self) -> None:
        """Wait until there is a range to fetch, or no helper is at work."""
        if self.queue is not None:
            self.queue.wait()

    def end_queue(self) -> None:
        """Stop the helpers; return when none works on the file any more."""
        if self.queue is not None:
            self.queue.end()
            self.queue = None

    def _next_task(self) -> RangeTask | None:
        """Return the next range to request; None means the whole file, or nothing if there is a queue."""
        if self.queue is None:
            has_begun = self._has_begun_here()
            if not (self._accepts_ranges and self._versions.are_told_by_ranges):
                return None
            if not (has_begun or self.task_bytes or self.is_partial):
                return None
            ranges = self.missing if has_begun else self.wanted
            is_streamed = self.plan.growing is not None
            self.queue = RangeQueue(
                ranges, self.cancellation, self.task_bytes, self.max_helpers, is_streamed=is_streamed
            )
        return self.queue.next()

    def _request(self, task: RangeTask | None, *, continues: bool) -> Request:
        etag = self._cached.etag if self._cached is not None and self.url == self.plan.urls[0] else None
        condition = {"If-None-Match": etag} if etag else {}
        if task is None:
            return Request(condition)
        headers = {"Range": f"bytes={task.position}-{task.end - 1}"}
        if not continues:
            return Request({**headers, **condition}, task)
        assert self.partial.source is not None
        return Request({**headers, "If-Range": self.partial.source.etag}, task, continues=True)

    def _has_begun_here(self) -> bool:
        """Return whether the bytes received are of a version that this URL has given."""
        source = self.partial.source
        has_begun = bool(self.partial.ranges) or self.queue is not None  # helpers may receive the first bytes
        return has_begun and source is not None and source.url == parse(self.url).address

    def _is_same_version(self, response: Response) -> bool:
        source = self.partial.source
        return source is not None and response.etag == source.etag

    def _begin(self, response: Response) -> None:
        self._is_given = True
        if self.partial.ranges or self.partial.source is not None:
            self.partial.restart()
        self._linked_sha256 = response.linked_sha256
        if response.etag is not None:
            self._versions.begin(response.etag)
            address = parse(self.url).address
            self.partial.set_source(address, response.etag, self.plan.content_id, response.linked_sha256)

    def _restart(self) -> None:
        """Delete what has been received."""
        self.end_queue()
        self.partial.restart()

    def _change_version(self, response: Response) -> None:
        was_read = self.partial.was_read
        self._restart()
        self._versions.change(response.etag, self.url, self.plan.shard.data_path, was_read=was_read)

    def _truncated(self) -> TruncatedError:
        expected = self.wanted.nbytes
        received = expected - self.missing.nbytes
        return TruncatedError(
            f"the body ended early, after {received:,} of {expected:,} bytes",
            url=self.url,
            shard=self.plan.shard.data_path,
            expected=expected,
            received=received,
        )


def _all_of(shard: Shard) -> ByteRanges:
    return ByteRanges([(0, shard.nbytes)])
