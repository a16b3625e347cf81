"""The data's way, from a source to tensors: start reading here.

::

    source ─ locate ─> Location ─ open_model ─> Model, with its manifest ─ select ─> shards
    shards ─ obtain (the cached file | download ─> check ─> publish)               in workers, with limited look-ahead
           ─ cut ─> segments ─ stage ─>                                            in workers
           ─ place ─> tensors ─> Weights                                           on the caller's thread, in order

A usual shard is one segment; a large file has many, which several workers stage. The first one's task obtains the file.

A `Loader` opens the model, and consumes one of the generators and loops below. Whatever fails, in whichever thread,
sets the load's `Cancellation`: sleepers wake, sockets are shut, partial files are closed, and workers are joined.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from .context import LoadContext
from .devices.base import Device, Upload
from .devices.into import LentMemory
from .devices.segments import Segment, cut_shard
from .format.manifest import Manifest, NameFilter, Shard
from .processes.beside import HelperProcesses
from .progress import Progress, Reporter
from .sources.model import Flaw, Model, ShardFile
from .trace import Trace, open_trace
from .workers.ordered import map_ordered
from .workers.shared import SharedResource
from .workers.stop_iteration import wrap_stop_iteration

__all__ = ["VerifyReport", "check_shards", "fetch_shards", "place_tensors", "tracing"]

T = TypeVar("T")
Staged = TypeVar("Staged")
Tensor = TypeVar("Tensor")
logger = logging.getLogger("ndcache")

#: Segments are smaller than the device prefers if `memory_limit` is, but not smaller than this.
_MIN_SEGMENT_BYTES = 1 << 20

#: Marks a shard as done: the bytes that it counts, and the file that they came from.
_Done: TypeAlias = Callable[[Shard, int, ShardFile], None]


def place_tensors(
    model: Model,
    context: LoadContext,
    device: Device[Tensor],
    names: NameFilter,
    lent: LentMemory,
    progress: Progress,
    helpers: HelperProcesses,
    *,
    decode: bool,
    copy: bool,
    memory_limit: int,
    keeps_all: bool = False,
) -> Generator[tuple[str, Tensor], None, None]:
    """Check at once what is wanted; return a generator of names and tensors, in manifest order."""
    shards = model.manifest.select(names)
    lent.check(device, shards, decode=decode)
    placed = _place_tensors(
        model,
        context,
        device,
        shards,
        lent,
        progress,
        helpers,
        decode=decode,
        copy=copy,
        memory_limit=memory_limit,
        keeps_all=keeps_all,
    )
    return lent.tracked(placed, completes_late=device.completes_late and keeps_all)


def _place_tensors(
    model: Model,
    context: LoadContext,
    device: Device[Tensor],
    shards: Sequence[Shard],
    lent: LentMemory,
    progress: Progress,
    helpers: HelperProcesses,
    *,
    decode: bool,
    copy: bool,
    memory_limit: int,
    keeps_all: bool,
) -> Generator[tuple[str, Tensor], None, None]:
    """Yield names and tensors in manifest order. Workers obtain and stage the files, this thread places the tensors."""
    stats = context.stats
    files = _cut_files(shards, device, lent, memory_limit)
    segments = list(itertools.chain.from_iterable(files))
    with wrap_stop_iteration():
        context.cancellation.resume()
        context.pool.start(1)
        upload: Upload[Any, Tensor] = device.open_upload(
            segments,
            pool=context.pool,
            stats=stats,
            decode=decode,
            copy=copy,
            memory_limit=memory_limit,
            keeps_all=keeps_all,
            into=lent.destinations,
        )
        # The files and the upload are closed last, when no worker is in `stage` any more.
        with (
            upload,
            _staging(model, context, upload, files) as work,
            _map_files(model, context, files, work, progress, helpers, memory_limit) as (order, arriving, done),
        ):
            for obtained, staged in arriving:
                segment, nbytes = next(order)
                placed = upload.place(staged, segment)
                for record, tensor in stats.timed_iterator("place", placed, file=segment.shard.data_path):
                    stats.tensors += 1
                    yield record.name, tensor
                    del tensor
                    context.cancellation.resume()  # before the next one is made, which nobody would own
                del staged, placed  # and with them all tensors, before the next segment is staged
                if segment is segments[-1]:
                    with stats.timed("finish"):
                        upload.finish()
                if nbytes is not None:
                    done(segment.shard, nbytes, obtained)


def _cut_files(
    shards: Sequence[Shard], device: Device[Any], lent: LentMemory, memory_limit: int
) -> list[list[Segment]]:
    """Cut the file of each shard into segments."""
    segment_bytes = min(device.segment_bytes, max(memory_limit, _MIN_SEGMENT_BYTES))
    return [
        cut_shard(shard, segment_bytes, cuts_records=device.cuts_records, also_cut=lent.in_parts) for shard in shards
    ]


class _SharedFile(SharedResource[ShardFile]):
    """The file of a shard that has several segments. The first one's task obtains it."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(len(segments), lambda obtained: obtained.file.close())
        self.first = segments[0]


@contextmanager
def _staging(
    model: Model, context: LoadContext, upload: Upload[Staged, Any], files: Sequence[Sequence[Segment]]
) -> Iterator[Callable[[Segment], tuple[ShardFile, Staged]]]:
    """Yield the function that obtains a segment's file, unless another one's task does, and stages the segment."""
    shared = {file[0].shard.data_path: _SharedFile(file) for file in files if len(file) > 1}

    def work(segment: Segment) -> tuple[ShardFile, Staged]:
        if (file := shared.get(segment.shard.data_path)) is None:
            obtained = model.obtain(segment.shard)
            with obtained.file:
                return obtained, upload.stage(obtained.file, segment)
        if segment is file.first:
            file.provide(model.obtain(segment.shard), context.pool)
        with file as obtained:
            return obtained, upload.stage(obtained.file, segment)

    try:
        yield work
    finally:
        for file in shared.values():
            file.abandon()


def fetch_shards(
    model: Model, context: LoadContext, shards: Sequence[Shard], progress: Progress, helpers: HelperProcesses
) -> None:
    """Obtain the file of each shard, and close it again."""

    def work(segment: Segment) -> ShardFile:
        obtained = model.obtain(segment.shard)
        obtained.file.close()
        return obtained

    files = [[Segment(shard, shard.records, shard.nbytes)] for shard in shards]
    # Nothing waits for a device, so only the disk limits how far workers look ahead.
    with _map_files(model, context, files, work, progress, helpers, sys.maxsize) as (order, arriving, done):
        for (segment, nbytes), obtained in zip(order, arriving, strict=True):
            assert nbytes is not None
            done(segment.shard, nbytes, obtained)


def check_shards(model: Model, context: LoadContext) -> dict[str, str | Flaw]:
    """Read the file of each shard; return what it was checked by, or what is wrong, by its ``dataPath``."""
    shards = model.manifest.shards
    context.pool.start(len(shards))
    sizes = [shard.nbytes for shard in shards]
    results = map_ordered(
        shards, model.check, pool=context.pool, sizes=sizes, memory_limit=sys.maxsize, stats=context.stats
    )
    with closing(results):
        return {shard.data_path: found for shard, found in zip(shards, results, strict=True)}


@contextmanager
def _map_files(
    model: Model,
    context: LoadContext,
    files: Sequence[Sequence[Segment]],
    work: Callable[[Segment], T],
    progress: Progress,
    helpers: HelperProcesses,
    memory_limit: int,
) -> Iterator[tuple[Iterator[tuple[Segment, int | None]], Iterator[T], _Done]]:
    """Do the work for each segment of each shard's file in a worker, and report progress.

    Yields
    ------
    order : iterator
        Each segment, in manifest order, and the bytes that its shard counts if this is the last one of it, else None.
    arriving : iterator
        The result of the work for each of them.
    done : callable
        To be called for each of these last segments before the next is asked for.
    """
    stats = context.stats
    with wrap_stop_iteration(), closing(model):
        shards = [file[0].shard for file in files]
        model.prepare(shards)
        sizes = [model.nbytes(shard) for shard in shards]
        cache_only = all(model.is_ready(shard) for shard in shards)
        context.pool.start(sum(map(len, files)) if cache_only else None)
        helpers.start(model, context)
        reporter = Reporter(
            progress, sizes, cache_only=cache_only, received=lambda: stats.network_bytes + stats.resumed_bytes
        )
        segments = list(itertools.chain.from_iterable(files))
        begun, freed = _memory(files, sizes, in_memory=not (cache_only or model.is_kept))
        results = map_ordered(
            segments,
            work,
            pool=context.pool,
            sizes=begun,
            freed=freed,
            memory_limit=memory_limit,
            stats=stats,
            tick=reporter.tick,
        )

        def done(shard: Shard, nbytes: int, obtained: ShardFile) -> None:
            stats.shard_done(nbytes, from_cache=obtained.from_cache, checked=obtained.checked)
            if obtained.from_cache:
                helpers.note_cached(shard, nbytes)
            reporter.shard_done(nbytes)

        ends = itertools.chain.from_iterable(
            [*[None] * (len(file) - 1), nbytes] for file, nbytes in zip(files, sizes, strict=True)
        )
        with closing(reporter), closing(results):
            reporter.start()
            yield zip(segments, ends, strict=True), results, done
        helpers.finish(context)
        model.finish()
    stats.seconds["total"] = time.perf_counter() - context.started
    logger.info("%s: %s", model.directory, stats)


def _memory(
    files: Sequence[Sequence[Segment]], sizes: Sequence[int], *, in_memory: bool
) -> tuple[list[int], list[int]]:
    """Return the bytes of memory that each segment takes when it begins, and those that it frees when it is placed.

    A large file counts by segments if it lies on disk. If it is held in memory, it counts as a whole, from its first
    segment to its last.
    """
    begun: list[int] = []
    freed: list[int] = []
    for file, nbytes in zip(files, sizes, strict=True):
        if len(file) == 1:
            each = [min(nbytes, file[0].nbytes)]
        elif not in_memory:
            each = [segment.nbytes for segment in file]
        else:
            others = [0] * (len(file) - 1)
            begun += [nbytes, *others]
            freed += [*others, nbytes]
            continue
        begun += each
        freed += each
    return begun, freed


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    Attributes
    ----------
    checked : dict of str to str
        The good shards, and how each was checked: ``"sha256"``, ``"md5"``, the algorithm of a required digest, or
        ``"size"`` where no digest is known.
    bad : tuple of str
        Shards that have wrong bytes or the wrong size, or that cannot be read. In the cache they were set aside, and
        the next load fetches them.
    missing : tuple of str
        Shards that are not there, or belong to another version of the model.
    nbytes : int
        Bytes of the good shards.
    kept : tuple of str
        Bad shards in a cache that cannot be written. They could not be set aside, so loads still use them, except with
        ``verify="always"``.
    """

    checked: dict[str, str]
    bad: tuple[str, ...]
    missing: tuple[str, ...]
    nbytes: int
    kept: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is bad."""
        return not self.bad

    @classmethod
    def _of(cls, manifest: Manifest, found: dict[str, str | Flaw]) -> VerifyReport:
        """Report the results of `check_shards`."""
        return cls(
            checked={name: kind for name, kind in found.items() if isinstance(kind, str)},
            bad=tuple(name for name, kind in found.items() if kind in (Flaw.BAD, Flaw.BAD_AND_KEPT)),
            missing=tuple(name for name, kind in found.items() if kind in (Flaw.MISSING, Flaw.OF_ANOTHER_VERSION)),
            nbytes=sum(shard.nbytes for shard in manifest.shards if isinstance(found[shard.data_path], str)),
            kept=tuple(name for name, kind in found.items() if kind is Flaw.BAD_AND_KEPT),
        )


@contextmanager
def tracing(path: str | os.PathLike[str] | None) -> Iterator[Trace | None]:
    """Write a trace at the end of the block, however it ends; yield None if none is wanted."""
    if path is None:
        yield None
        return
    trace = open_trace(path)
    try:
        yield trace
    finally:
        try:
            trace.write()
        except OSError as error:
            logger.warning("the trace was not written: %s", error)  # the load's result, or its own error, matters more
