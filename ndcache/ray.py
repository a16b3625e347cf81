"""Bring a model to every node of a Ray cluster.

>>> import ndcache.ray
>>> directories = ndcache.ray.fetch("https://host/model/")

Each shard leaves the origin once, and then travels from node to node through Ray's object store. Needs the extra
``ndcache[ray]``, where this is called and on the nodes.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._version import __version__
from .caller import public
from .cluster import tasks
from .cluster.coordinator import fetch_to_nodes
from .errors import NdcacheError
from .format.manifest import NameFilter
from .options import OPTION_NAMES, check_keywords, hide_keywords
from .progress import Progress

try:
    import ray
    from ray.exceptions import ActorUnschedulableError, ObjectLostError, RayActorError, RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise ImportError("ndcache.ray needs Ray: pip install ray") from error

__all__ = ["fetch"]

#: Threads of an actor for tasks that run for long, and for the others.
_LONG_THREADS, _THREADS = 8, 16
#: How often the actors of a node may die, while the node lives, before the call fails.
_MOST_DEATHS = 3
#: Errors of tasks whose actor or node is lost, or the store that had what they need.
_LOST = (RayActorError, ActorUnschedulableError, ObjectLostError)


@hide_keywords
@public
def fetch(
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
    """Bring a model to every node of the Ray cluster that this process is connected to; block until it is there.

    A node is what shares a cache directory: all Ray nodes of one host with the same NDCACHE_HOME. One actor works for
    each; it takes no CPU from others, and is gone at the end. Nodes that join meanwhile get the model, too; call again
    for those that come later. May also be called in a task or an actor.

    Parameters
    ----------
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
        their way from and to other nodes. `cache_dir` is a path on the nodes. `session` and `processes` cannot be
        used. Each node reads NDCACHE_HOME and HF_TOKEN in its own environment.

    Returns
    -------
    dict of str to pathlib.Path
        The model's directory on each node, by the ID of the Ray node. `ndcache.load` of such a directory on its node
        makes no request.

    Raises
    ------
    RuntimeError
        Ray is not initialised in this process, or ndcache cannot run on a node.
    NdcacheError
        See `ndcache.load`. Its `node` is the ID of a Ray node. What is complete on a node stays there.
    KeyError
        A name or pattern matches no tensor.
    ValueError, TypeError
        An argument is unknown, has a type or a value that it must not have, or cannot be used with a cluster.

    Examples
    --------
    >>> ray.init(address="auto")
    >>> directories = ndcache.ray.fetch("https://host/model/", max_workers=4)
    """
    check_keywords(fetch, options.keys() - OPTION_NAMES)
    if not ray.is_initialized():
        raise RuntimeError(
            "Ray is not initialised in this process. To choose the cluster, call ray.init(address=...) before."
        )
    wanted = {"files": files, "include": include, "exclude": exclude, "force": force}
    try:
        with closing(_RayEngine()) as engine:
            found = fetch_to_nodes(engine, source, options, names=names, files=wanted, progress=progress)
    except NdcacheError as error:
        error.node = error.node and _node(error.node)
        raise
    return {_node(worker): directory for worker, directory in found.items()}


class NdcacheWorker:
    """Run tasks on one node, in several threads: the class of the actors.

    It is public in Ray's dashboard and logs only. Its constructor takes no options of the call, because Ray keeps the
    arguments of constructors.
    """

    def __init__(self, version: str) -> None:
        if version != __version__:
            raise RuntimeError(f"ndcache {__version__} is installed there, but {version} where `fetch` was called")
        self._released: dict[int, threading.Event] = {}

    def run(self, number: int, function: Callable[..., Any], *args: Any) -> Any:
        """Run the task of this number."""
        event = self._released.setdefault(number, threading.Event())
        try:
            return function(*args, cancel=event)
        finally:
            del self._released[number]

    def release(self, numbers: Collection[int]) -> None:
        """Let tasks end early, also those that have not begun."""
        for number in numbers:
            self._released.setdefault(number, threading.Event()).set()


@dataclass(frozen=True)
class _Handle:
    """The number of a task. Only the engine has references to objects: Ray keeps an object while there is one."""

    number: int


@dataclass(frozen=True)
class _Task:
    """A task whose result was not released yet; `sources` are the workers that made its inputs."""

    ref: Any
    worker: str
    sources: tuple[str, ...]


def _node(worker: str) -> str:
    """Return the ID of the Ray node of a worker, whose name has a number if it is not the node's first."""
    return worker.partition("/")[0]


class _RayEngine:
    """One cluster, as the coordinator sees it; see `cluster.engine.Engine`.

    An actor that dies is replaced by one with another name. Ray is not told to restart it, and to run its tasks again:
    the coordinator knows better which of them are still needed, and where.
    """

    def __init__(self) -> None:
        self._actor_class = ray.remote(
            num_cpus=0,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=_THREADS,
            concurrency_groups={"long": _LONG_THREADS, "release": 1},
        )(NdcacheWorker)
        self._actors: dict[str, Any] = {}
        self._deaths: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._tasks: dict[_Handle, _Task] = {}
        self._awaited: dict[Any, _Handle] = {}  # by the reference to a result that `collect` is to return

    def workers(self) -> Collection[str]:
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for worker in [worker for worker in self._actors if _node(worker) not in nodes]:
            self._forget(worker)
        for node in nodes - set(map(_node, self._actors)):
            self._start_actor(node)
        return list(self._actors)

    def submit(self, worker: str, function: Callable[..., Any], *args: Any, stays: bool = False) -> _Handle:
        handle = _Handle(next(self._numbers))
        inputs = [each for each in args if isinstance(each, _Handle)]
        if worker not in self._actors or not self._tasks.keys() >= set(inputs):
            return handle  # the worker, or what the task needs, was lost just now
        run = self._actors[worker].run
        if function in tasks.LONG:
            run = run.options(concurrency_group="long")
        values = (self._tasks[each].ref if isinstance(each, _Handle) else each for each in args)
        ref = run.remote(handle.number, function, *values)
        self._tasks[handle] = _Task(ref, worker, tuple(self._tasks[each].worker for each in inputs))
        if not stays:
            self._awaited[ref] = handle
        return handle

    def collect(self, timeout: float) -> list[tuple[_Handle, Any]]:
        ended = [(handle, self._get(handle)) for handle in self._wait(timeout)]
        for handle, result in ended:
            if isinstance(result, RayError):
                self._failed(handle, result)
        return [(handle, result) for handle, result in ended if not isinstance(result, RayError)]

    def release(self, handles: Iterable[_Handle]) -> None:
        by_worker: dict[str, list[int]] = {}
        for handle in handles:
            task = self._tasks.pop(handle, None)
            if task is not None and self._awaited.pop(task.ref, None) is not None:
                by_worker.setdefault(task.worker, []).append(handle.number)
        for worker, numbers in by_worker.items():
            if worker in self._actors:
                self._actors[worker].release.options(concurrency_group="release").remote(numbers)

    def close(self) -> None:
        """End all actors, and drop all references to what they made."""
        for worker in list(self._actors):
            self._forget(worker)
        self._tasks.clear()
        self._awaited.clear()

    def _wait(self, timeout: float) -> list[_Handle]:
        """Return the tasks that have ended; wait for the first."""
        if not self._awaited:
            time.sleep(timeout)
            return []
        refs = list(self._awaited)
        # Nothing is brought here to wait for it; `get` only brings what `collect` returns.
        ended, _ = ray.wait(refs, timeout=timeout, fetch_local=False)
        if ended:
            ended, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        return [self._awaited.pop(ref) for ref in ended]

    def _get(self, handle: _Handle) -> Any:
        try:
            return ray.get(self._tasks[handle].ref)
        except RayError as error:
            # Its traceback leads to references, and to itself.
            return error.with_traceback(None)

    def _start_actor(self, node: str) -> None:
        deaths = self._deaths[node]
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        actor = self._actor_class.options(scheduling_strategy=strategy).remote(__version__)
        self._actors[f"{node}/{deaths + 1}" if deaths else node] = actor

    def _forget(self, worker: str) -> None:
        """End the actor if it is not dead, and wait for its tasks no more."""
        ray.kill(self._actors.pop(worker))
        self._awaited = {ref: each for ref, each in self._awaited.items() if self._tasks[each].worker != worker}

    def _failed(self, handle: _Handle, error: Exception) -> None:
        """Forget the workers that are lost, by what a task failed with; raise everything else."""
        cause = error
        workers: tuple[str, ...] = (self._tasks[handle].worker,)
        if isinstance(error, RayTaskError):
            cause = error.cause
            workers = self._tasks[handle].sources  # if what one of them has made is lost
        if not isinstance(cause, _LOST):
            raise error
        for worker in workers:
            self._lose(worker, cause)

    def _lose(self, worker: str, error: Exception) -> None:
        node = _node(worker)
        if getattr(error, "actor_init_failed", False):
            raise RuntimeError(
                f"ndcache cannot run on the Ray node {node}. It must be installed there, in the version that is here, "
                f'or come with the job: ray.init(runtime_env={{"pip": ["ndcache=={__version__}"]}}).'
            ) from error
        if worker in self._actors:
            self._forget(worker)
            self._deaths[node] += 1
        if self._deaths[node] > _MOST_DEATHS:
            raise RuntimeError(f"the actor on the Ray node {node} died {self._deaths[node]} times") from error
