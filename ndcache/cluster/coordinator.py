"""Bring one model to all nodes of a cluster, from the client's thread.

::

    identify     every worker           which workers share a node; one of each represents it
    open_manifest on one node           the only request for the manifest; its bytes go on by the engine's data plane
    survey       every node             publish the manifest; which shards are there and right
    obtain       each missing shard     on one node, from the origin, into that node's cache
    read, write  each other node        bytes of shards, in pieces; checked again, and published there
    fetch_files  on one node, and read_files there, keep_files on the others: the companion files
    finish       every node             remove shards of earlier versions

All of this is under way at once. The client's thread keeps what is known, reacts to tasks that end and to workers that
come and go, and starts what can be started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..companions.lock import as_sri, required_digests
from ..errors import CancelledError, ChecksumError, NdcacheError, OfflineError
from ..format.manifest import Manifest, NameFilter
from ..format.slices import check_slices
from ..location import locate
from ..options import LoaderOptions
from ..progress import Arrivals, Progress, Reporter
from ..sources.manifests.opened import parse_kept
from . import tasks
from .call import Call, Failure, ManifestFile, Survey, without_records
from .dispatch import Dispatcher
from .engine import Engine
from .errors import on_node
from .files import Files
from .members import Members
from .origin import Origin
from .spread import MAX_PIECE_BYTES, Spread
from .state import Node, ShardState, State

__all__ = ["fetch_to_nodes"]

Handle = TypeVar("Handle")

#: Seconds to wait for tasks before looking at everything else.
_TICK_SECONDS = 0.2
#: Pieces that a node may hold at once, as `Spread` says.
_PIECES_PER_NODE = 4
#: How long to wait for nodes that do not say what they have, as their workers are busy, before shards are downloaded
#: that these nodes may have.
_STRAGGLER_SECONDS = 30.0
#: The most nodes that try to fetch the manifest, if an error may be the node's own.
_MAX_MANIFEST_TRIES = 3

logger = logging.getLogger("ndcache")


def fetch_to_nodes(
    engine: Engine[Handle],
    source: str,
    options: Mapping[str, Any],
    *,
    names: NameFilter = None,
    files: Mapping[str, Any] | None = None,
    progress: Progress = None,
) -> dict[str, Path]:
    """Bring a model to every node of a running cluster; block until it is there.

    Parameters
    ----------
    engine : Engine
    source : str
        A URL, or ``hf://…``.
    options : mapping of str to object
        Options of `LoaderOptions`, checked here; those that cannot travel raise a TypeError or ValueError.
    names, progress
        See `ndcache.fetch`.
    files : mapping of str to object, optional
        Which companion files to bring: the arguments of `Companions`. Default: the usual ones.

    Returns
    -------
    dict
        The model's directory on each node, by the worker that published it there.
    """
    check_slices(names)
    checked = LoaderOptions(**options)
    call = Call(source, _travelling(checked), _wanted_files(files or {}))
    _check_source(source, checked.revision)
    coordinator = Coordinator(engine, call, checked, names, progress)
    with contextlib.closing(coordinator):
        return coordinator.run()


def _check_source(source: object, revision: str | None) -> None:
    if not isinstance(source, str) or not locate(source, revision=revision).is_remote:
        raise ValueError("a cluster fetches from a server: give an http(s) URL or hf://owner/name, not a local path")


def _travelling(options: LoaderOptions) -> dict[str, Any]:
    """Return the options for the workers.

    Raises
    ------
    ValueError
        One of them cannot be sent to another process.
    """
    values = {each.name: getattr(options, each.name) for each in dataclasses.fields(options)}
    if values.pop("session") is not None:
        raise ValueError("session cannot be used with a cluster: connections cannot be sent to its workers")
    if values.pop("processes", 1) != 1:
        raise ValueError("processes cannot be used with a cluster: its workers are the processes")
    if values.pop("limit_rate") is not None:
        raise ValueError("limit_rate cannot be used with a cluster: its workers download on their own")
    del values["cancel"], values["max_workers"], values["progress_interval"]
    if options.headers is not None:
        values["headers"] = dict(options.headers)
    if options.cache_dir is not None:
        values["cache_dir"] = os.fspath(options.cache_dir)
    if options.integrity is not None:
        # Workers need not see a lock file. Its digest of the manifest vouches for the list of shards.
        values["integrity"] = {
            name: as_sri(algorithm, digest) for name, (algorithm, digest) in required_digests(options.integrity).items()
        }
    values["mirrors"] = [options.mirrors] if isinstance(options.mirrors, str) else list(options.mirrors)
    return values


def _wanted_files(files: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of `Companions` for the workers; None if no companion file is wanted."""
    wanted = dict(files)
    return wanted if wanted.pop("files", True) else None


class _NodeArrivals(Arrivals):
    """The bytes that have arrived on a node, as the average of all nodes."""

    def __init__(self, count: Callable[[], int]) -> None:
        super().__init__()
        self._count = count

    @property
    def nbytes(self) -> int:
        """Return the bytes of shards that a node has."""
        return self._count()


class Coordinator(Generic[Handle]):
    """The coordinator of one call: it keeps what is known, and starts what can be started.

    Parameters
    ----------
    engine : Engine
    call : Call
    options : LoaderOptions
        Checked.
    names, progress
        See `ndcache.fetch`.
    """

    def __init__(
        self, engine: Engine[Handle], call: Call, options: LoaderOptions, names: NameFilter, progress: Progress
    ) -> None:
        self._call = call
        self._options = options
        self._names = names
        self._progress = progress
        self._state = State(options.verify != "never")
        self._dispatcher = Dispatcher(engine)
        self._members = Members(call, engine, self._state, self._dispatcher, self._lost)
        self._opening: str | None = None  # the worker that opens the manifest
        self._manifest_errors: dict[Node, NdcacheError] = {}
        self._file = ManifestFile("", b"")
        self._have_manifest: set[Node] = set()
        self._manifest: tuple[str, Handle] | None = None  # the worker that reads it for others, and what it reads
        self._parts: tuple[Origin[Handle], Spread[Handle], Files[Handle]] | None = None  # once the manifest is known
        self._opened_at = 0.0
        self._has_surveyed = False
        self._reporter: Reporter | None = None
        self._has_ended = False
        self._reported: set[int] = set()

    def run(self) -> dict[str, Path]:
        """Do everything; return the model's directory on each node, by the node's worker."""
        cancel = self._options.cancel
        while True:
            if cancel is not None and cancel.is_set():
                raise CancelledError("the fetch was cancelled", hint="What is complete on a node stays there.")
            self._members.look()
            self._assign()
            self._report()
            if self._is_done():
                self._raise_failure()
                self._has_ended = True
                return {node.worker: node.directory for node in self._state.nodes.values() if node.directory}
            self._dispatcher.collect(_TICK_SECONDS)

    def close(self) -> None:
        """Release all tasks and results, and end the bar."""
        self._dispatcher.close()
        if self._reporter is not None:
            self._reporter.close(is_done=self._has_ended)

    def _assign(self) -> None:
        if self._parts is None:
            self._open_manifest()
            return
        for node in list(self._state.nodes.values()):
            if not node.is_ready and not node.is_surveying:
                self._survey(node)
        origin, spread, files = self._parts
        if self._may_download():
            origin.assign()
        spread.assign()
        files.assign()
        for node in self._state.ready_nodes():
            if len(node.have) == len(self._state.shards) and not node.is_finished and not node.is_finishing:
                self._finish(node)

    def _may_download(self) -> bool:
        """Return whether shards that seem to be nowhere may be downloaded: once the first nodes say what they have."""
        if not self._has_surveyed:
            are_ready = self._members.are_known and all(node.is_ready for node in self._state.nodes.values())
            self._has_surveyed = are_ready or time.monotonic() > self._opened_at + _STRAGGLER_SECONDS
        return self._has_surveyed

    def _is_done(self) -> bool:
        nodes = self._state.nodes.values()
        if self._parts is None or not self._members.are_known or not self._parts[2].is_done:
            return False
        return all(node.is_finished for node in nodes)

    def _raise_failure(self) -> None:
        """Raise the error of companion files that could not be fetched, now that all shards are there."""
        if self._parts is not None and (failure := self._parts[2].failure) is not None:
            raise failure

    def _lost(self, worker: str) -> None:
        """React to a worker that is gone, whose tasks have been dropped."""
        if self._manifest is not None and self._manifest[0] == worker:
            self._manifest = None
        if self._parts is not None:
            self._parts[2].lose(worker)

    # --- the manifest

    def _open_manifest(self) -> None:
        """Let one node open the manifest, if none does."""
        untried = (node for node in self._state.nodes.values() if node not in self._manifest_errors)
        node = None if self._opening else next(untried, None)
        if node is None:
            return
        self._opening = node.worker

        def lost() -> None:
            self._opening = None

        def done(result: Any) -> None:
            self._opening = None
            if isinstance(result, ManifestFile):
                self._have_manifest.add(node)
                self._opened(result)
            else:
                self._not_opened(node, result)

        self._dispatcher.submit(node.worker, tasks.open_manifest, self._call, done=done, lost=lost)

    def _not_opened(self, node: Node, failure: Failure) -> None:
        error = on_node(failure.error, node.worker)
        if not isinstance(error, NdcacheError):
            raise error
        if isinstance(error, CancelledError):
            return  # its worker is shutting down
        self._manifest_errors[node] = error
        first = next(iter(self._manifest_errors.values()))
        # Without a network, another node may have it in its cache.
        can_try_elsewhere = isinstance(error, OfflineError) or (
            error.retryable and len(self._manifest_errors) < _MAX_MANIFEST_TRIES
        )
        if not can_try_elsewhere or set(self._state.nodes.values()) <= self._manifest_errors.keys():
            raise first

    def _opened(self, file: ManifestFile) -> None:
        manifest, digest = self._parse(file), hashlib.sha256(file.data).hexdigest()
        self._file, self._opened_at = file, time.monotonic()
        self._call = dataclasses.replace(self._call, manifest_name=file.name, manifest_sha256=digest)
        wanted = {shard.data_path for shard in manifest.shards_with(self._names)}
        for index, shard in enumerate(manifest.shards):
            if shard.data_path in wanted:
                self._state.shards[index] = ShardState(without_records(shard))
        origin = Origin(self._call, self._state, self._dispatcher, self._options.max_workers)
        piece_bytes = min(MAX_PIECE_BYTES, max(1, self._options.memory_limit // _PIECES_PER_NODE))
        spread = Spread(self._call, self._state, self._dispatcher, self._manifest_bytes, piece_bytes)
        files = Files(self._call, self._state, self._dispatcher, self._options.memory_limit)
        self._parts = origin, spread, files
        sizes = [each.shard.nbytes for each in self._state.shards.values()]
        self._reporter = Reporter(
            self._progress,
            sizes,
            cache_only=False,
            arrivals=_NodeArrivals(self._received),
            received=self._received,
            interval=self._options.progress_interval,
            model=locate(self._call.source).title,
        )
        self._reporter.start()

    def _parse(self, file: ManifestFile) -> Manifest:
        integrity = required_digests(self._options.integrity)
        return parse_kept(
            file.data, file.name, str(locate(self._call.source, revision=self._options.revision)), integrity
        )

    def _manifest_bytes(self) -> Handle | ManifestFile:
        """Return the manifest for a task: the result of another one, on a node that has it, if there is one."""
        if self._manifest is None:
            node = next((node for node in self._state.nodes.values() if node in self._have_manifest), None)
            if node is None:
                return self._file
            handle = self._dispatcher.submit_staying(node.worker, tasks.cached_manifest, self._call)
            self._manifest = node.worker, handle
        return self._manifest[1]

    # --- a node's beginning and end

    def _survey(self, node: Node) -> None:
        """Publish the manifest on a node, and find out which shards it has."""
        node.is_surveying = True
        wanted, manifest = tuple(self._state.shards), self._manifest_bytes()

        def lost() -> None:
            node.is_surveying = False

        def done(result: Any) -> None:
            node.is_surveying = False
            if isinstance(result, Survey):
                self._have_manifest.add(node)
                node.directory, node.files = result.directory, result.files
                for index in node.have - result.held.keys():
                    self._state.loses(node, index)
                for index, held in result.held.items():
                    self._state.gains(node, index, held)
            elif manifest is not self._file and (result.is_passed_on or isinstance(result.error, ChecksumError)):
                # The node that should have the manifest does not, or sends another: send what the client has.
                self._have_manifest.clear()
                self._manifest = None
            elif not isinstance(result.error, CancelledError):
                raise on_node(result.error, node.worker)

        self._dispatcher.submit(node.worker, tasks.survey, self._call, wanted, manifest, done=done, lost=lost)

    def _finish(self, node: Node) -> None:
        node.is_finishing = True

        def lost() -> None:
            node.is_finishing = False

        def done(result: Any) -> None:
            node.is_finishing = False
            node.is_finished = True
            if isinstance(result, Failure):  # the next load will do it
                logger.debug("%s: the cache was not pruned: %s", node.worker, result.error)

        self._dispatcher.submit(node.worker, tasks.finish, self._call, done=done, lost=lost)

    # --- progress

    def _report(self) -> None:
        """Report the shards that all nodes have by now."""
        if self._reporter is None:
            return
        for index in sorted(self._state.changed - self._reported):
            if self._state.is_everywhere(index):
                self._reported.add(index)
                self._reporter.shard_done(self._state.shards[index].shard.nbytes)
        self._state.changed.clear()
        self._reporter.tick()

    def _received(self) -> int:
        """Return the bytes that a node has, on average."""
        shards = self._state.shards.values()
        return sum(len(each.holders) * each.shard.nbytes for each in shards) // max(1, len(self._state.nodes))
