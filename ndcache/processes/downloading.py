"""The work of a helper process: download the shards that nobody else has begun, and report."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ..context import LoadContext
from ..errors import AuthError, IntegrityError, NdcacheError, TransferError
from ..format.manifest import Shard
from ..http.retry import RetryPolicy
from ..options import LoaderOptions
from ..progress import Arrivals
from ..resources import LoaderResources
from ..sources.remote import RemoteModel, open_known_model
from ..stats import LoadStats
from ..trace import Trace
from ..workers.outcomes import Outcomes, Task
from .messages import HelperReport, HelperRequest

__all__ = ["download"]

#: Seconds between two reports.
_REPORT_EVERY = 0.1

logger = logging.getLogger("ndcache")


def download(fields: dict[str, Any], reports: int, on_end: Callable[[Callable[[], None]], None]) -> None:
    """Download the shards of a request that nobody else has begun.

    Parameters
    ----------
    fields : dict
        Of the `HelperRequest`.
    reports : int
        The descriptor to which reports are written.
    on_end : callable
        Called with a function that cancels the download.
    """
    request = HelperRequest(**fields)
    resources = LoaderResources(_loader_options(**request.options), os.environ)
    location = resources.locate(request.source)
    local_dir = None if request.local_dir is None else Path(request.local_dir)
    force = request.old_files is not None
    with resources.context(
        location, must_keep=True, local_dir=local_dir, force=force, bucket=request.bucket
    ) as context:
        if request.trace_started is not None:
            context.stats.record_to(Trace(request.trace_started, "ndcache helper"))
        reporter = _Reporter(reports, context.stats, context.arrivals)
        logger.addHandler(reporter.handler)
        logger.propagate = False
        logger.setLevel(request.log_level)
        on_end(context.cancellation.set)
        is_done = False
        try:
            model = open_known_model(
                location, context, request.manifest_name, request.manifest_text.encode(), request.commits
            )
            model.cache.old_files.versions.update(request.old_files or {})
            reporter.report()  # from now on, there may be something to keep
            _download_free(model, request.shards(model.manifest), context, reporter)
            is_done = True
        finally:
            if not is_done:
                context.cancellation.set()
            context.pool.shutdown()
            reporter.report(is_done=is_done)


def _download_free(model: RemoteModel, shards: Sequence[Shard], context: LoadContext, reporter: _Reporter) -> None:
    """Let the workers download all shards that nobody else has begun, in no fixed order."""
    is_useless = False

    def work(shard: Shard) -> None:
        nonlocal is_useless
        if is_useless:
            return
        try:
            model.download_if_free(shard)
            if model.has_prefetched(shard):
                reporter.published.put(shard.data_path)
        except (NdcacheError, OSError) as error:
            # The parent meets it, too, and decides. Only the error of a single file leaves others to try.
            is_useless |= isinstance(error, AuthError) or not isinstance(error, (TransferError, IntegrityError))
            logger.debug("a helper process could not download %s: %s", shard.data_path, str(error))

    context.pool.start(len(shards))
    outcomes = Outcomes[None](context.cancellation)
    for index, shard in enumerate(shards):
        context.pool.submit(Task(functools.partial(work, shard), outcomes, index))
    for index in range(len(shards)):
        outcomes.wait_for(index, reporter.tick)
        outcomes.take(index)
        reporter.tick()


def _loader_options(*, retries: dict[str, Any], timeout: list[float], **others: Any) -> LoaderOptions:
    """Return the options of a request, in the types that they had before they were JSON."""
    connect, read = timeout
    return LoaderOptions(retries=RetryPolicy(**retries), timeout=(connect, read), **others)


class _Reporter:
    """Write reports, on the main thread; other threads only fill its queues.

    Attributes
    ----------
    published : SimpleQueue of str
    handler : logging.Handler
        Puts log records into the reports.
    """

    def __init__(self, descriptor: int, stats: LoadStats, arrivals: Arrivals) -> None:
        self.published: SimpleQueue[str] = SimpleQueue()
        self.handler = _QueueHandler()
        self._descriptor = descriptor
        self._stats = stats
        self._arrivals = arrivals
        self._last = 0.0

    def tick(self) -> None:
        """Report, unless the last report is recent."""
        if time.monotonic() - self._last >= _REPORT_EVERY:
            self.report()

    def report(self, *, is_done: bool = False) -> None:
        """Report what has been done."""
        report = HelperReport.of(
            self._stats,
            published=_take_all(self.published),
            log=_take_all(self.handler.records),
            events=[] if self._stats.trace is None else self._stats.trace.take_events(),
            coming=self._arrivals.coming,
            pause=self._arrivals.first_pause,
            is_done=is_done,
        )
        line = memoryview(report.encode())
        while line:
            line = line[os.write(self._descriptor, line) :]
        self._last = time.monotonic()


class _QueueHandler(logging.Handler):
    """Keep log records until the next report."""

    def __init__(self) -> None:
        super().__init__()
        self.records: SimpleQueue[tuple[int, str]] = SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.put((record.levelno, record.getMessage()))


def _take_all(queue: SimpleQueue[Any]) -> list[Any]:
    taken = []
    while True:
        try:
            taken.append(queue.get_nowait())
        except Empty:
            return taken
