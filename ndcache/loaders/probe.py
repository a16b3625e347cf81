"""Measure the network: receive what a load would receive, and do nothing with it. Find the files of a local source."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from ..format.manifest import NameFilter, Shard
from ..options import Source
from ..sources.client import Client
from ..sources.downloads.shard_request import plan_ranges, unexpected_status
from ..sources.remote import RemoteModel
from ..workers.ordered import map_ordered
from .base import LoaderBase

__all__ = ["NetworkRate", "local_files", "measure_network"]

#: A file is received by several workers only if there are fewer files than workers, in ranges of at least this size.
_LEAST_RANGE = 8 << 20
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class NetworkRate:
    """Result of a probe of the network.

    Attributes
    ----------
    nbytes : int
    seconds : float
    connections : int
        How many there were at most.
    busy_cores : float
        How many cores this process kept busy, on average.
    """

    nbytes: int
    seconds: float
    connections: int
    busy_cores: float


@dataclass(frozen=True)
class _Piece:
    """A range of a file.

    Attributes
    ----------
    url : str
    start : int
    end : int or None
        None for the whole file.
    nbytes : int
        Of the range.
    whole_nbytes : int
        What to receive if the server ignores ranges: the bytes of the file, but for one range of each file only.
    """

    url: str
    start: int
    end: int | None
    nbytes: int
    whole_nbytes: int

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.end is None else {"Range": f"bytes={self.start}-{self.end - 1}"}


@dataclass
class _Budget:
    """The bytes and the time that are left. Several threads use it at once."""

    max_bytes: int
    deadline: float
    received: int = 0
    pieces: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_spent(self) -> bool:
        return self.received >= self.max_bytes or time.perf_counter() >= self.deadline

    def count(self, nbytes: int) -> None:
        with self._lock:
            self.received += nbytes

    def begin(self) -> None:
        with self._lock:
            self.pieces += 1


def measure_network(
    loader: LoaderBase,
    source: Source,
    names: NameFilter,
    *,
    connections: int | None,
    max_bytes: int,
    max_seconds: float,
) -> NetworkRate | None:
    """Receive the bytes of a model's shards over several connections, and neither check nor keep them.

    Parameters
    ----------
    loader : LoaderBase
        Has loaded the model. Its kept connections are closed first, so that each worker opens one, as in a load.
    source : str or path
    names : NameFilter
        The tensors that were loaded.
    connections : int or None
        How many this process opens, if there is enough to receive; None for those of a load by one process, which may
        be fewer than `max_workers` if file descriptors are scarce.
    max_bytes : int
        Stop after about this many bytes.
    max_seconds : float
        Stop after about this many seconds.

    Returns
    -------
    NetworkRate or None
        None if the source is local.

    Raises
    ------
    NdcacheError
        A request fails.
    """
    resources = loader._resources
    if not resources.locate(source).is_remote:
        return None
    resources.close()
    with resources.open_model(source, threads=connections) as (model, context), closing(model):
        assert isinstance(model, RemoteModel)
        client = Client(context)
        client.commits.update(model.commits)
        workers = context.pool.max_workers
        pieces = list(_cut(model, model.manifest.select(names), workers))
        context.pool.start(len(pieces))
        begun, cpu_begun = time.perf_counter(), time.process_time()
        budget = _Budget(max_bytes, begun + max_seconds)
        results = map_ordered(
            pieces,
            lambda piece: _receive(client, piece, budget),
            pool=context.pool,
            sizes=[0] * len(pieces),
            memory_limit=sys.maxsize,
            stats=context.stats,
        )
        with closing(results):
            for _ in results:
                pass
        seconds = time.perf_counter() - begun
        busy = (time.process_time() - cpu_begun) / seconds
        return NetworkRate(budget.received, seconds, min(workers, budget.pieces), busy)


def local_files(loader: LoaderBase, source: Source, names: NameFilter) -> list[Path] | None:
    """Return the paths of a local model's files that have tensors to load, or None if the source is remote.

    Raises
    ------
    NdcacheError
        There is no such model.
    """
    if loader._resources.locate(source).is_remote:
        return None
    with loader._resources.open_model(source) as (model, _), closing(model):
        shards = model.manifest.select(names)
        return [Path(model.directory, *shard.data_path.split("/")) for shard in shards]


def _cut(model: RemoteModel, shards: Sequence[Shard], workers: int) -> Iterator[_Piece]:
    """Yield what the workers receive: whole files, or ranges of them if there are few files."""
    for shard in shards:
        url, ranges = model.locations[0].url(shard.data_path), plan_ranges(shard)
        size = max(_LEAST_RANGE, -(-shard.nbytes // workers))
        if ranges is None and (len(shards) >= workers or shard.nbytes <= size):
            yield _Piece(url, 0, None, shard.nbytes, shard.nbytes)
            continue
        whole_nbytes = shard.nbytes
        for first, last in ranges or [(0, shard.nbytes)]:
            for start in range(first, last, size):
                end = min(start + size, last)
                yield _Piece(url, start, end, end - start, whole_nbytes)
                whole_nbytes = 0


def _receive(client: Client, piece: _Piece, budget: _Budget) -> None:
    """Receive a piece, or the beginning of it once the budget is spent."""
    if budget.is_spent:
        return
    for attempt in client.attempts():
        with (
            attempt,
            client.get(piece.url, piece.url, piece.headers, cancellation=client.context.cancellation) as response,
        ):
            if response.status not in (200, 206):
                raise unexpected_status(response)
            left = piece.nbytes if response.status == 206 else piece.whole_nbytes
            if left:
                budget.begin()
            while left > 0 and not budget.is_spent and (data := response.read_some(min(left, _READ_BYTES))):
                left -= len(data)
                budget.count(len(data))
