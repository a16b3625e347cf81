"""Bring a model to every node of a Dask cluster.

>>> import ndcache.dask
>>> directories = ndcache.dask.fetch(client, "https://host/model/")

Each shard leaves the origin once, and then travels between the workers as the results of Dask's tasks do. Needs the
extra ``ndcache[dask]``, on the client and on the workers.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from .caller import public
from .cluster import tasks
from .cluster.coordinator import fetch_to_nodes
from .format.manifest import NameFilter
from .options import OPTION_NAMES, check_keywords, hide_keywords
from .progress import Progress

try:
    import distributed
except ImportError as error:
    raise ImportError("ndcache.dask needs dask and distributed: pip install distributed") from error

__all__ = ["fetch"]


@hide_keywords
@public
def fetch(
    client: distributed.Client,
    source: str,
    *,
    names: NameFilter = None,
    files: bool = True,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    force: bool = False,
    progress: Progress = None,
    **options: Any,
) -> dict[str, Path]:
    """Bring a model to every node of a Dask cluster; block until it is there.

    A node is what shares a cache directory: all workers of one host with the same NDCACHE_HOME. One worker of each node
    works for it. Workers that join meanwhile get the model, too; call again for those that come later.

    Parameters
    ----------
    client : distributed.Client
        Not an asynchronous one.
    source : str
        An http(s) URL or ``hf://owner/name``.
    names, progress
        See `ndcache.load`. Shards come whole. A shard counts as done when all nodes have it.
    files, include, exclude
        See `ndcache.fetch`. Companion files leave the origin once, too, unless they exceed `memory_limit`.
    force : bool, default False
        Ask for the companion files even if the manifest has not changed.
    **options
        Those of `ndcache.fetch`, for each node: `max_workers` connections to the origin, and `memory_limit` bytes on
        their way from and to other nodes. `cache_dir` is a path on the workers. `session` cannot be used. Each worker
        reads NDCACHE_HOME and HF_TOKEN in its own environment.

    Returns
    -------
    dict of str to pathlib.Path
        The model's directory on each node, by the address of the worker that represents it. `ndcache.load` of such a
        directory on its node makes no request.

    Raises
    ------
    NdcacheError
        See `ndcache.load`. Its `node` is the address of a worker. What is complete on a node stays there.
    KeyError
        A name or pattern matches no tensor.
    ValueError, TypeError
        An argument is unknown, has a type or a value that it must not have, or cannot be used with a cluster.

    Examples
    --------
    >>> directories = ndcache.dask.fetch(client, "https://host/model/", max_workers=4)
    """
    check_keywords(fetch, options.keys() - OPTION_NAMES)
    if client.asynchronous:
        raise TypeError("ndcache.dask.fetch blocks: it needs a Client that is not asynchronous")
    wanted = {"files": files, "include": include, "exclude": exclude, "force": force}
    with _outside_of_the_worker():
        return fetch_to_nodes(_DaskEngine(client), source, options, names=names, files=wanted, progress=progress)


@contextlib.contextmanager
def _outside_of_the_worker() -> Iterator[None]:
    """If this runs in a task, leave its worker's thread to other tasks until the end of the block."""
    try:
        distributed.get_worker()
    except ValueError:
        yield
        return
    distributed.secede()
    try:
        yield
    finally:
        distributed.rejoin()


class _DaskEngine:
    """A Dask cluster as the coordinator's engine; its handles are tasks' keys.

    All that waits for the scheduler or a worker does so on the client's event loop, in one coroutine for each task.
    So a worker that is slow to answer delays nobody else.

    Parameters
    ----------
    client : distributed.Client
    """

    def __init__(self, client: distributed.Client) -> None:
        self._client = client
        self._futures: dict[_Key, distributed.Future] = {}
        self._ended: queue.SimpleQueue[tuple[_Key, Any]] = queue.SimpleQueue()
        self._workers: list[str] = []
        self._failure: Exception | None = None  # of the last look at the workers
        self._is_looking = False

    def workers(self) -> Collection[str]:
        if self._failure is not None:
            raise self._failure
        if not self._workers:
            self._workers = list(self._client.nthreads())
        elif not self._is_looking:
            self._is_looking = True
            self._client.loop.add_callback(self._look)
        return self._workers

    def submit(self, worker: str, function: Callable[..., Any], *args: Any, stays: bool = False) -> _Key:
        key = _Key(f"ndcache-{function.__name__}-{uuid.uuid4().hex}")
        self._futures[key] = self._client.submit(
            _run,
            function,
            *(self._futures[each] if isinstance(each, _Key) else each for each in args),
            key=str(key),
            workers=[worker],
            allow_other_workers=False,
            pure=False,
        )
        if not stays:
            self._client.loop.add_callback(self._bring, key, self._futures[key])
        return key

    def collect(self, timeout: float) -> list[tuple[_Key, Any]]:
        results: list[tuple[_Key, Any]] = []
        with contextlib.suppress(queue.Empty):
            results.append(self._ended.get(timeout=timeout))
            while True:
                results.append(self._ended.get_nowait())
        results = [(key, result) for key, result in results if key in self._futures]
        for _, result in results:
            if isinstance(result, Exception):
                raise result  # Dask's own: tasks return what fails
        return results

    def release(self, handles: Iterable[_Key]) -> None:
        for key in handles:
            future = self._futures.pop(key, None)
            if future is not None:
                future.release()

    async def _look(self) -> None:
        try:
            self._workers = list(await self._client.nthreads(asynchronous=True))
        except Exception as error:
            self._failure = error
        finally:
            self._is_looking = False

    async def _bring(self, key: _Key, future: distributed.Future) -> None:
        """Wait for a task's end, or its release, and bring its result here."""
        try:
            results = await self._client.gather({key: future}, errors="skip", asynchronous=True)
            if key in results:
                self._ended.put((key, results[key]))
            elif future.status == "error":
                self._ended.put((key, await future.exception(asynchronous=True)))
        except Exception as error:
            self._ended.put((key, error))


class _Key(str):
    """The key of a task, distinct from other texts among the arguments of tasks."""

    __slots__ = ()


class _Released:
    """A flag that is set when nobody wants a task's result any more, or its worker shuts down.

    Parameters
    ----------
    worker : distributed.Worker
    key : str
        The task's key.
    """

    def __init__(self, worker: distributed.Worker, key: str) -> None:
        self._worker = worker
        self._key = key

    def is_set(self) -> bool:
        task = self._worker.state.tasks.get(self._key)
        return task is None or task.state == "cancelled" or self._worker.status in _ENDING


_ENDING = (distributed.Status.closing, distributed.Status.closed, distributed.Status.failed)


def _run(function: Callable[..., Any], *args: Any) -> Any:
    """Run a task on a worker; leave the worker's thread to other tasks if it takes long."""
    worker = distributed.get_worker()
    released = _Released(worker, worker.get_current_task())
    if function not in tasks.LONG:
        return function(*args, cancel=released)
    with _PauseOfProfiler(worker) if _PROFILER_CAN_HANG else contextlib.nullcontext():
        distributed.secede()
        return function(*args, cancel=released)


#: Dask's profiler calls `sys._current_frames`, which can hang a process that starts threads, as downloads do:
#: https://github.com/python/cpython/issues/106883, mended in 3.11.9.
_PROFILER_CAN_HANG = (3, 11) <= sys.version_info < (3, 11, 9)


class _PauseOfProfiler:
    """A block in which a worker is not profiled; blocks of several threads may overlap.

    Parameters
    ----------
    worker : distributed.Worker
    """

    _counts: ClassVar[Counter[str]] = Counter()  # of blocks, by worker; only event loops change it

    def __init__(self, worker: distributed.Worker) -> None:
        self._worker = worker

    def __enter__(self) -> None:
        self._worker.loop.add_callback(self._change, 1)

    def __exit__(self, *_: object) -> None:
        self._worker.loop.add_callback(self._change, -1)

    def _change(self, step: int) -> None:
        self._counts[self._worker.address] += step
        profiler = self._worker.periodic_callbacks.get("profile")
        if profiler is None:
            return
        if self._counts[self._worker.address]:
            profiler.stop()
        elif not profiler.is_running():
            profiler.start()
