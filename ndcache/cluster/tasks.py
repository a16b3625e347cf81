"""The tasks of a call. Each runs on a worker, and works on the cache of the worker's node.

Tasks keep nothing in their process from one to the next: a task may run in any process of its node. They return what
fails as a `Failure`, and also return a `Failure` that they are given.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import numpy as np

from ..companions.peers import CompanionFiles, keep_companions, read_companions
from ..errors import CancelledError, NdcacheError
from ..format.manifest import Shard
from ..workers.ordered import map_ordered
from .call import Call, Failure, Held, HeldFiles, ManifestFile, NodeId, PartialState, Piece, Survey
from .engine import IsSet
from .here import Here, open_here
from .pieces import Data, append_piece, begin_partial, publish_whole, read_piece

__all__ = [
    "LONG",
    "begin",
    "cached_manifest",
    "fetch_files",
    "finish",
    "identify",
    "keep_files",
    "obtain",
    "open_manifest",
    "read",
    "read_files",
    "survey",
    "write",
]

F = TypeVar("F", bound=Callable[..., Any])


def _task(function: F) -> F:
    """Return errors as a `Failure`, and pass on one that is among the arguments."""

    @functools.wraps(function)
    def run(*args: Any, cancel: IsSet | None = None) -> Any:
        for argument in args:
            if isinstance(argument, Failure):
                return Failure(argument.error, is_passed_on=True)
        try:
            return function(*args, cancel=cancel)
        except Exception as error:
            return Failure(error.with_traceback(None))

    return run  # type: ignore[return-value]


@_task
def identify(call: Call, *, cancel: IsSet | None = None) -> NodeId:
    """Return what distinguishes the worker's node from others."""
    with open_here(call, cancel) as here:
        return here.identify()


@_task
def open_manifest(call: Call, *, cancel: IsSet | None = None) -> ManifestFile:
    """Fetch the manifest, or confirm the cached one, and return it."""
    with open_here(call, cancel) as here:
        return here.open_manifest()


@_task
def cached_manifest(call: Call, *, cancel: IsSet | None = None) -> ManifestFile:
    """Return the call's manifest from the cache."""
    with open_here(call, cancel) as here:
        return here.cached_manifest(call.manifest_name, call.manifest_sha256)


@_task
def survey(
    call: Call,
    wanted: Collection[int] | None,
    manifest: ManifestFile,
    verify: str | None = None,
    *,
    cancel: IsSet | None = None,
) -> Survey:
    """Publish the manifest, and look which shards are there and right.

    Parameters
    ----------
    call : Call
    wanted : collection of int or None
        The shards to look at, by their index in the manifest; None for all.
    manifest : ManifestFile
        Made by `cached_manifest` on another node.
    verify : str, optional
        Replaces the option ``verify``.
    """
    options: dict[str, Any] = {} if verify is None else {"verify": verify}
    with open_here(call, cancel, **options) as here:
        here.keep_manifest(manifest)
        held, missing = {}, []
        for index, shard in enumerate(here.parse(manifest).shards):
            if wanted is None or index in wanted:
                if (found := here.find(shard)) is not None:
                    held[index] = found
                else:
                    missing.append(shard)
        if missing:
            here.check_free_space(missing)
        return Survey(here.cache.directory, held, here.held_files())


@_task
def fetch_files(call: Call, *, cancel: IsSet | None = None) -> HeldFiles:
    """Fetch the companion files, unless they are there."""
    with open_here(call, cancel) as here:
        return here.fetch_files()


@_task
def read_files(call: Call, *, cancel: IsSet | None = None) -> CompanionFiles:
    """Return the companion files in the cache."""
    with open_here(call, cancel) as here:
        return read_companions(here.cache)


@_task
def keep_files(call: Call, files: CompanionFiles, digests: Mapping[str, str], *, cancel: IsSet | None = None) -> None:
    """Publish what `read_files` has returned on another node; the digests did not come with it."""
    with open_here(call, cancel) as here:
        keep_companions(here.cache, files, digests, here.context.cancellation.check)


@_task
def obtain(
    call: Call, shards: Mapping[int, Shard], threads: int, *, cancel: IsSet | None = None
) -> dict[int, Held | Failure | None]:
    """Download shards into the cache, unless they are there, and return what is known of each.

    Parameters
    ----------
    call : Call
    shards : mapping of int to Shard
        By their index in the manifest; without records.
    threads : int
        How many may be downloaded at once.

    Returns
    -------
    dict
        A `Failure` for shards that cannot be obtained; None for those that were not tried after that.
    """
    with open_here(call, cancel, threads=threads) as here:
        model, has_failed = here.model(shards), False

        def work(shard: Shard) -> Held | Failure | None:
            nonlocal has_failed
            if has_failed:
                return None
            try:
                return here.add_digest(shard, model.obtain(shard))
            except CancelledError:
                raise
            except NdcacheError as error:
                has_failed = True
                return Failure(error)

        ordered = list(shards.values())
        with contextlib.closing(model):
            model.prepare(ordered)
            here.context.pool.start(None)
            results = map_ordered(
                ordered,
                work,
                pool=here.context.pool,
                sizes=[shard.nbytes for shard in ordered],
                memory_limit=sys.maxsize,
                stats=here.context.stats,
            )
            return dict(zip(shards, results, strict=True))


@_task
def read(call: Call, pieces: Collection[Piece], partials: Mapping[int, str], *, cancel: IsSet | None = None) -> Data:
    """Return the bytes of pieces, one after the other.

    Parameters
    ----------
    call : Call
    pieces : collection of Piece
    partials : mapping of int to str
        By shard, the partial file of this node that has the piece if the shard is not complete.
    """
    data = np.empty(sum(piece.size for piece in pieces), np.uint8)
    with open_here(call, cancel) as here:
        for piece, part in _split(pieces, data):
            read_piece(here, piece, partials.get(piece.index), part)
    return data


@_task
def begin(call: Call, shard: Shard, *, cancel: IsSet | None = None) -> PartialState:
    """Prepare to receive a shard in several pieces: continue what an interrupted call left, in a file of its own."""
    with open_here(call, cancel) as here:
        return begin_partial(here, shard)


@_task
def write(
    call: Call,
    pieces: Collection[Piece],
    held: Mapping[int, Held],
    data: Data,
    partial: PartialState | None = None,
    *,
    cancel: IsSet | None = None,
) -> dict[int, PartialState | Failure | None]:
    """Write what `read` has returned on another node, and publish the shards that are complete and right.

    Parameters
    ----------
    call : Call
    pieces : collection of Piece
        Whole shards; or a single piece, the next one of its shard.
    held : mapping of int to Held
        By shard, the digests that it must have. They did not come with the bytes.
    data : array of uint8
    partial : PartialState, optional
        Where to append a single piece that is not a whole shard.

    Returns
    -------
    dict
        By shard: None if it is published, how far it is otherwise, or a `Failure`.
    """
    with open_here(call, cancel) as here:
        return {
            piece.index: _write(here, piece, held[piece.index], part, partial) for piece, part in _split(pieces, data)
        }


def _write(
    here: Here, piece: Piece, held: Held, data: memoryview, partial: PartialState | None
) -> PartialState | Failure | None:
    try:
        if piece.is_whole:
            publish_whole(here, piece.shard, held, data)
            return None
        assert partial is not None
        return append_piece(here, piece, held, data, partial)
    except CancelledError:
        raise
    except NdcacheError as error:
        return Failure(error)


@_task
def finish(call: Call, *, cancel: IsSet | None = None) -> None:
    """Remove shards of earlier versions from the cache, as every complete load does."""
    with open_here(call, cancel) as here:
        here.model().finish()


def _split(pieces: Collection[Piece], data: Data) -> list[tuple[Piece, memoryview]]:
    """Return each piece with its part of the data."""
    view, parts, at = data.data, [], 0
    for piece in pieces:
        parts.append((piece, view[at : at + piece.size]))
        at += piece.size
    return parts


#: Tasks that may run for long.
LONG = (open_manifest, survey, obtain, fetch_files)
