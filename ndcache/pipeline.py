"""The data's way, from a source to tensors: start reading here.

::

    source ─ locate ─> Location ─ open_model ─> Model, with its manifest ─ select ─> shards
    shards ─ obtain (the cached file | download ─> check ─> publish)               in workers, with limited look-ahead
           ─ cut ─> segments ─ stage ─>                                            in workers
           ─ place ─> tensors ─> Weights                                           on the caller's thread, in order

A usual shard is one segment; a large file has many, which several workers stage. The first one's task obtains the file.
A stream stages segments of a file without a digest while the rest of the file is downloaded.

A `Loader` opens the model, and consumes one of the generators and loops below. Whatever fails, in whichever thread,
sets the load's `Cancellation`: sleepers wake, sockets are shut, partial files are closed, and workers are joined.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, TypeAlias, TypeVar

from .companions import Companions
from .context import LoadContext
from .devices.base import Device, Upload
from .devices.into import LentMemory
from .devices.segments import Segment, cut_shards
from .format.manifest import NameFilter, Shard
from .processes.beside import HelperProcesses
from .progress import Progress, Reporter, telling_what_is_kept
from .sources.downloads.shared_files import SharedFiles, may_stream
from .sources.model import Model, ShardFile
from .workers.ordered import map_ordered
from .workers.stop_iteration import wrap_stop_iteration

__all__ = ["fetch_shards", "place_tensors"]

T = TypeVar("T")
Staged = TypeVar("Staged")
Tensor = TypeVar("Tensor")
logger = logging.getLogger("ndcache")

#: Marks a segment as done: the bytes of its shard if it is the last one, and the file that they came from.
_Done: TypeAlias = Callable[[Segment, "int | None", ShardFile], None]


def place_tensors(
    model: Model,
    context: LoadContext,
    device: Device[Tensor],
    names: NameFilter,
    lent: LentMemory,
    progress: Progress,
    helpers: HelperProcesses,
    companions: Companions,
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
        companions,
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
    companions: Companions,
    decode: bool,
    copy: bool,
    memory_limit: int,
    keeps_all: bool,
) -> Generator[tuple[str, Tensor], None, None]:
    """Yield names and tensors in manifest order. Workers obtain and stage the files, this thread places the tensors."""
    stats, files = context.stats, _cut_files(model, context, device, shards, lent, memory_limit, keeps_all)
    segments = list(itertools.chain.from_iterable(files))
    how = functools.partial(_how_cached, device, shards, lent, decode, copy)
    context.cancellation.resume()
    # Readers start when tensors are allocated, which needs the interpreter's lock, and end before all this is closed.
    with (
        wrap_stop_iteration(),
        _prepared(model, context, files, helpers, companions, device) as prepared,
        device.open_upload(
            segments,
            pool=context.pool,
            stats=stats,
            decode=decode,
            copy=copy,
            memory_limit=memory_limit,
            keeps_all=keeps_all,
            into=lent.destinations,
        ) as upload,
        SharedFiles(files, model, context, are_streamed=not (keeps_all or prepared.cache_only)) as shared,
        _map_files(
            prepared, _staging(model, context, upload, shared), progress, memory_limit, how, shared.needs_slot
        ) as (order, arriving, done),
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
            done(segment, nbytes, obtained)


def _cut_files(
    model: Model,
    context: LoadContext,
    device: Device[Any],
    shards: Sequence[Shard],
    lent: LentMemory,
    memory_limit: int,
    keeps_all: bool,
) -> list[list[Segment]]:
    """Cut the file of each shard into segments."""

    def is_early(shard: Shard) -> bool:
        return not keeps_all and may_stream(shard, context) and not model.has(shard)

    return cut_shards(
        shards,
        device.segment_bytes,
        memory_limit,
        is_early,
        cuts_records=device.cuts_records,
        also_cut=lent.in_parts,
    )


def _how_cached(device: Device[Any], shards: Sequence[Shard], lent: LentMemory, decode: bool, copy: bool) -> str:
    """Return in a word how files of the cache are loaded."""
    if not device.maps_files or copy or lent.destinations:
        return "Loaded"
    expands = decode and any(record.is_bf16_encoded for shard in shards for record in shard.records)
    return "Loaded" if expands else "Mapped"


def _staging(
    model: Model, context: LoadContext, upload: Upload[Staged, Any], shared: SharedFiles
) -> Callable[[Segment], tuple[ShardFile, Staged]]:
    """Return the function that obtains a segment's file, unless another one's task does, and stages the segment."""

    def work(segment: Segment) -> tuple[ShardFile, Staged]:
        if (file := shared.of(segment.shard)) is None:
            obtained = model.obtain(segment.shard)
            with obtained.file:
                context.arrivals.add(segment.shard.data_path)
                return obtained, upload.stage(obtained.file, segment)
        if segment is file.first:
            file.begin()
        with file.opened(segment) as obtained:
            if not obtained.is_complete:
                segment = replace(segment, is_early=True)
            return obtained, upload.stage(obtained.file, segment)

    return work


def fetch_shards(
    model: Model,
    context: LoadContext,
    shards: Sequence[Shard],
    progress: Progress,
    helpers: HelperProcesses,
    companions: Companions,
    use: Callable[[Shard, BinaryIO], None] = lambda shard, file: None,
) -> None:
    """Obtain the file of each shard, call `use` with it, and close it again."""

    def work(segment: Segment) -> ShardFile:
        obtained = model.obtain(segment.shard)
        with obtained.file:
            context.arrivals.add(segment.shard.data_path)
            use(segment.shard, obtained.file)
        return obtained

    files = [[Segment(shard, shard.records, shard.nbytes)] for shard in shards]
    # Nothing waits for a device, so only the disk limits how far workers look ahead.
    with (
        _prepared(model, context, files, helpers, companions) as prepared,
        _map_files(prepared, work, progress, sys.maxsize, lambda: "Cached") as (order, arriving, done),
    ):
        for (segment, nbytes), obtained in zip(order, arriving, strict=True):
            done(segment, nbytes, obtained)


@dataclass(frozen=True)
class _Prepared:
    """The files that a load wants, all of which can be obtained, and the threads for them.

    Attributes
    ----------
    model : Model
    context : LoadContext
    helpers : HelperProcesses
    files : sequence of sequence of Segment
        The segments of each file.
    sizes : list of int
        The bytes that each file counts.
    cache_only : bool
        Whether none of them is likely to need the network.
    beside : callable or None
        Work for one more thread: the companion files.
    start : callable
        Start the threads, unless they have started.
    """

    model: Model
    context: LoadContext
    helpers: HelperProcesses
    files: Sequence[Sequence[Segment]]
    sizes: list[int]
    cache_only: bool
    beside: Callable[[], None] | None
    start: Callable[[], None]


@contextmanager
def _prepared(
    model: Model,
    context: LoadContext,
    files: Sequence[Sequence[Segment]],
    helpers: HelperProcesses,
    companions: Companions,
    device: Device[Any] | None = None,
) -> Iterator[_Prepared]:
    """Prepare the files and the threads; at the end, clean up the model."""
    with wrap_stop_iteration(), closing(model):
        shards = [file[0].shard for file in files]
        cache_only = model.prepare(shards)
        sizes = [model.nbytes(shard) for shard in shards]
        context.stats.note_shards(shards, sizes)
        context.arrivals.expect({shard.data_path: size for shard, size in zip(shards, sizes, strict=True)})
        beside = companions.plan(model, context, is_warm=cache_only)
        start = context.pool.start
        if cache_only:  # no spare threads are needed, as nothing waits for the disk to sync
            workers = context.pool.max_workers
            if device is not None and context.verify != "always":  # which fetches damaged files again
                workers = device.readers(workers)
            start = functools.partial(start, min(sum(map(len, files)), workers) + (beside is not None), workers)
        if not cache_only or (device is not None and device.needs_serial_thread):
            start()
        helpers.start(model, context)
        yield _Prepared(model, context, helpers, files, sizes, cache_only, beside, start)
        helpers.finish(context)
        model.finish()
    context.stats.seconds["total"] = time.perf_counter() - context.started
    logger.info("%s: %r", model.directory, context.stats)
    companions.finish(context)


@contextmanager
def _map_files(
    prepared: _Prepared,
    work: Callable[[Segment], T],
    progress: Progress,
    memory_limit: int,
    how: Callable[[], str],
    needs_slot: Callable[[Segment], bool] = lambda _: True,
) -> Iterator[tuple[Iterator[tuple[Segment, int | None]], Iterator[T], _Done]]:
    """Do the work for each segment of each shard's file in a worker, and report progress.

    Yields
    ------
    order : iterator
        Each segment, in manifest order, and the bytes that its shard counts if this is the last one of it, else None.
    arriving : iterator
        The result of the work for each of them.
    done : callable
        To be called for each segment before the next is asked for.
    """
    files, sizes, context, stats = prepared.files, prepared.sizes, prepared.context, prepared.context.stats
    stats.note_how(how_cached := how() if prepared.cache_only else "")
    reporter = Reporter(
        progress,
        sizes,
        cache_only=prepared.cache_only,
        arrivals=context.arrivals,
        received=lambda: stats.network_bytes,
        interval=context.progress_interval,
        model=context.model,
        how=lambda: how_cached,
        opening=time.perf_counter() - context.started,
    )
    prepared.start()
    segments = list(itertools.chain.from_iterable(files))
    begun, freed = _memory(files, sizes, in_memory=not (prepared.cache_only or prepared.model.is_kept))
    results = map_ordered(
        segments,
        work,
        pool=context.pool,
        sizes=begun,
        freed=freed,
        memory_limit=memory_limit,
        stats=stats,
        tick=reporter.tick if reporter.is_heard else None,
        beside=prepared.beside,
        needs_slot=needs_slot,
    )

    def done(segment: Segment, nbytes: int | None, obtained: ShardFile) -> None:
        if nbytes is None:
            reporter.part_done(segment.nbytes)
            return
        stats.shard_done(segment.shard.data_path, nbytes, from_cache=obtained.from_cache, checked=obtained.checked)
        if obtained.from_cache:
            prepared.helpers.note_cached(segment.shard, nbytes)
        reporter.shard_done(nbytes)

    kept = telling_what_is_kept(context.arrivals, lambda: not prepared.cache_only and prepared.model.is_kept)
    with wrap_stop_iteration(), reporter, kept, closing(results):
        reporter.start()
        yield zip(segments, _ends(files, sizes), strict=True), results, done


def _ends(files: Sequence[Sequence[Segment]], sizes: Sequence[int]) -> Iterator[int | None]:
    """Yield, for each segment, the bytes of its shard if it is the last one, else None."""
    for file, nbytes in zip(files, sizes, strict=True):
        yield from [None] * (len(file) - 1)
        yield nbytes


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
