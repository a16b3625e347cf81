"""Download one file into the cache: receive it, check its size and digests, publish it."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ...errors import IntegrityError, NdcacheError, SizeMismatchError, TransferError, TruncatedError
from ...http.limits.rate_limits import origin_of
from ...http.response import Response
from ...http.retry import Attempt
from ...store.directory import ModelDirectory
from ...store.partials.file import PartialFile
from ...workers.cancellation import Cancellation
from ..client import Client
from .range_queue import RangeQueue, RangeTask
from .shard_request import DownloadPlan, unexpected_status
from .transfer import Action, Transfer

__all__ = ["DownloadResult", "Downloader"]

#: The most bytes that are read at once: few enough to stay in the CPU's cache until they are hashed and written, and
#: enough that workers do not wake each other all the time. On 16 cores, 8 workers receive 1.24 times as much over TLS,
#: and 1.05 times as much without, as with 1 MiB; on 2 cores the CPU time is the same.
_READ_BYTES = 2 << 20
#: Several ranges of a file that has more bytes than this are received at once.
RANGE_THRESHOLD = 64 << 20
#: The least and the most bytes of such a range. Each range costs a round trip. Bytes that arrive before those in front
#: of them are read back from the file later, to be hashed.
RANGE_BYTES = (8 << 20, 64 << 20)

logger = logging.getLogger("ndcache")


@dataclass(frozen=True)
class DownloadResult:
    """The result of a shard's download.

    Attributes
    ----------
    file : binary file or None
        Open for reading: the complete shard, or a file with the wanted ranges and holes. None if the cached file is
        still right.
    checked : tuple of str
        The algorithms of the digests that were compared.
    """

    file: BinaryIO | None
    checked: tuple[str, ...] = ()


class Downloader:
    """Download files of one model into its cache directory.

    Parameters
    ----------
    client : Client
        Makes the requests.
    cache : ModelDirectory
        Where the files go.

    Attributes
    ----------
    client : Client
    cache : ModelDirectory
    """

    def __init__(self, client: Client, cache: ModelDirectory) -> None:
        self.client = client
        self._context = client.context
        self.cache = cache
        self._failing: set[int] = set()  # indices of the URLs that are tried last

    def download_shard(self, plan: DownloadPlan, *, is_exclusive: bool = False) -> DownloadResult:
        """Download a shard from the first URL that gives the right bytes.

        Idle workers help to receive a file of more than 64 MiB, or the wanted ranges of any file.

        Parameters
        ----------
        plan : DownloadPlan
        is_exclusive : bool
            Whether nobody else downloads this shard now.

        Raises
        ------
        TransferError, IntegrityError
            The first URL's error, with those of the others attached.
        CacheError, CancelledError
        """
        with self._begin(plan, is_exclusive=is_exclusive) as transfer:
            for attempt in self._attempts(transfer):
                with attempt:
                    match transfer.next_action():
                        case Action.FETCH:
                            with (
                                transfer.fetching() as request,
                                self.client.get(
                                    transfer.url,
                                    plan.urls[0],
                                    request.headers,
                                    redirects=transfer.redirects,
                                    waiting=transfer.partial.touch,
                                ) as response,
                            ):
                                if (body := self._accept(transfer, response)) is not None:
                                    self.receive(response, transfer.partial, body, self._context.cancellation)
                            self._catch_up(transfer.partial)
                        case Action.WAIT:
                            transfer.wait()
                        case Action.CHECK:
                            self._check(transfer)
                        case Action.PUBLISH:
                            return self._publish(transfer)
                        case Action.KEEP_RANGES:
                            return self._keep_ranges(transfer)
                        case Action.USE_CACHED:
                            return DownloadResult(None)
        raise AssertionError("the last attempt of the last URL returns or raises")

    def download_file(self, name: str, url: str, limit: int) -> Path:
        """Download a file of unknown size, up to `limit` bytes."""
        for attempt in self.client.attempts():
            with attempt, self.client.get(url, url, {}) as response, self.cache.partials.create(name) as partial:
                if response.status != 200:
                    raise unexpected_status(response)
                partial.hasher.add("md5", self._context.cancellation.check)
                length = response.content_length
                if length is not None and length > limit:
                    raise SizeMismatchError(
                        "the file is larger than allowed", url=url, shard=name, expected=limit, received=length
                    )
                body = RangeTask(0, limit if length is None else length)
                self.receive(response, partial, body, self._context.cancellation)
                if response.may_be_truncated or (length is not None and partial.nbytes < length):
                    raise TruncatedError(
                        "the body ended early", url=url, shard=name, expected=length, received=partial.nbytes
                    )
                etag, last_modified = response.headers.get("ETag"), response.headers.get("Last-Modified")
                with self._context.stats.timed("publish", file=name):
                    self.cache.publish(partial, name, etag=etag, last_modified=last_modified).close()
        return self.cache.path(name)

    @contextmanager
    def _begin(self, plan: DownloadPlan, *, is_exclusive: bool) -> Iterator[Transfer]:
        """Yield a new transfer, which continues from the bytes that an interrupted one left."""
        context, shard, pool = self._context, plan.shard, self._context.pool
        with self.cache.partials.create(shard.data_path) as partial:
            digests = shard.digests if context.compares_digests and plan.ranges is None else {}
            self._compute(partial, digests)
            with context.stats.timed("write", file=shard.data_path):
                self.cache.partials.copy_longest(
                    partial,
                    shard,
                    plan.content_id,
                    context.cancellation.check,
                    is_checked=bool(digests),
                    is_exclusive=is_exclusive,
                )
            in_ranges = pool.max_helpers > 0 and (shard.nbytes > RANGE_THRESHOLD or plan.ranges is not None)
            transfer = Transfer(
                plan,
                partial,
                context.cancellation,
                checks_digests=context.compares_digests,
                task_bytes=RANGE_BYTES if in_ranges else None,
                max_helpers=pool.max_helpers,
            )
            context.stats.count(resumed_bytes=transfer.nbytes)
            context.arrivals.begin(shard.data_path, lambda: transfer.nbytes)
            try:
                yield transfer
            finally:
                transfer.end_queue()
                context.arrivals.end(shard.data_path, transfer.nbytes if partial.source is not None else 0)

    def _attempts(self, transfer: Transfer) -> Iterator[_UrlAttempt]:
        """Yield the current attempt before each action, at each URL in turn; raise the first URL's last error."""
        errors: dict[int, NdcacheError] = {}
        count, partial = len(transfer.plan.urls), transfer.partial
        for index in sorted(range(count), key=lambda index: index in self._failing):
            transfer.use_url(index)
            for attempt in self.client.attempts(
                transfer.plan.policy, progress=lambda: partial.furthest, waiting=partial.touch
            ):
                current = _UrlAttempt(attempt, errors, index)
                while not current.has_failed:
                    yield current
            error = errors[index]
            error.shard = transfer.plan.shard.data_path
            if transfer.plan.policy is None and error.retryable and type(error).max_retries is None:
                self._failing.add(index)  # it failed at every attempt: other shards try it last
        first, *others = (errors[index] for index in range(count))
        first.others = tuple(others)
        raise first

    def _accept(self, transfer: Transfer, response: Response) -> RangeTask | None:
        """Return the range to receive from a response, if any, and ask for helpers."""
        body = transfer.accept(response)
        if body is not None:
            if response.status == 200 or not transfer.is_partial:
                self._compute(transfer.partial, transfer.expected_digests)
            if (queue := transfer.queue) is not None:
                for _ in range(queue.helpers_wanted()):
                    self._context.pool.submit_helper(functools.partial(self._help, transfer, queue))
        return body

    def _help(self, transfer: Transfer, queue: RangeQueue) -> None:
        """Receive ranges of another worker's file, until none is left or one cannot be received."""
        client, partial, is_good = self.client, transfer.partial, True
        while is_good:
            with queue.next_for_helper() as task:
                if task is None:
                    return
                headers, is_good = transfer.request_for_helper(task).headers, False
                try:
                    with client.get(
                        transfer.url,
                        transfer.plan.urls[0],
                        headers,
                        cancellation=queue.cancellation,
                        redirects=transfer.redirects,
                    ) as response:
                        if transfer.accept_for_helper(task, response):
                            self.receive(response, partial, task, queue.cancellation)
                            is_good = task.is_done
                    self._catch_up(partial)
                    with self._context.stats.timed("write", file=partial.name):
                        partial.write_back()
                except (NdcacheError, OSError) as error:
                    if isinstance(error, NdcacheError):
                        client.note_refusal(error)
                    logger.debug("a range of %s was not received: %s", transfer.plan.shard.data_path, str(error))
                    is_good = False
                except BaseException as error:
                    queue.helper_done(error)
                    raise
                if not is_good:
                    queue.helper_done()  # the owner requests this range itself, and handles its error

    def _check(self, transfer: Transfer) -> None:
        self._compute(transfer.partial, transfer.expected_digests)
        self._catch_up(transfer.partial, wait=True)
        transfer.check_digests()

    def _publish(self, transfer: Transfer) -> DownloadResult:
        name, content_id = transfer.plan.shard.data_path, transfer.plan.content_id
        self._context.pool.release_slot()
        with self._context.stats.timed("publish", file=name):
            file = self.cache.publish(
                transfer.partial,
                name,
                etag=transfer.source_etag,
                content_id=content_id,
                syncing=self._context.pool.turns.paused,
            )
        return DownloadResult(file, checked=tuple(transfer.expected_digests))

    def _keep_ranges(self, transfer: Transfer) -> DownloadResult:
        shard = transfer.plan.shard
        transfer.check_header()
        with self._context.stats.timed("publish", file=shard.data_path):
            return DownloadResult(transfer.partial.keep_with_holes(shard.nbytes))

    def _compute(self, partial: PartialFile, algorithms: Iterable[str]) -> None:
        with self._context.stats.timed("hash", file=partial.name):
            for algorithm in algorithms:
                partial.hasher.add(algorithm, self._context.cancellation.check)

    def _catch_up(self, partial: PartialFile, *, wait: bool = False) -> None:
        with self._context.stats.timed("hash", file=partial.name):
            partial.hasher.catch_up(self._context.cancellation.check, wait=wait)

    def receive(self, response: Response, partial: PartialFile, body: RangeTask, cancellation: Cancellation) -> None:
        """Write the body to `partial`; ask for one byte more than it should have, to notice a body that is too long."""
        start, spent, origin = body.position, {"write": 0.0, "hash": 0.0}, origin_of(response.url)

        def received() -> int:
            return body.position - start

        with self._context.stats.timed("network", file=partial.name, start=start, nbytes=received) as others:
            try:
                while data := response.read_some(min(_READ_BYTES, body.end + 1 - body.position)):
                    cancellation.check()
                    self.client.count_received(origin, len(data))
                    if body.position + len(data) > body.end:
                        raise SizeMismatchError(
                            "the server sends more bytes than expected",
                            url=response.url,
                            expected=body.end - start,
                        )
                    begun = time.perf_counter()
                    partial.write_at(data, body.position)
                    written = time.perf_counter()
                    partial.hasher.feed(data, body.position)
                    spent["write"] += written - begun
                    spent["hash"] += time.perf_counter() - written
                    body.position += len(data)
            finally:
                if response.limited:
                    spent["limit_rate"] = response.limited
                others.update(spent)


@dataclass
class _UrlAttempt:
    """An attempt at one URL. Its last error is collected, as another URL may give the shard."""

    attempt: Attempt
    errors: dict[int, NdcacheError]
    index: int
    has_failed: bool = False

    def __enter__(self) -> None:
        self.attempt.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        self.has_failed = error is not None
        if self.attempt.__exit__(kind, error, at):
            return True
        if isinstance(error, (TransferError, IntegrityError)):
            self.errors[self.index] = error
            return True
        return False
