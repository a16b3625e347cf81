"""A real Ray cluster with several nodes on this machine, and drivers that connect to it.

The cluster and each driver have processes of their own: Ray leaves threads, sockets and warnings in a process that has
used it, and tests fail for what they leave.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import ndcache

from .processes import Child, Zygote, start_zygote

#: A safety net. Ray takes about 15 s to notice that a node is dead, and a busy machine much longer to start one.
TIMEOUT = 180.0
#: Bytes of each node's object store; Ray accepts no less than 75 MiB.
OBJECT_STORE_BYTES = 96 << 20

_PR_SET_CHILD_SUBREAPER = 36


class RayCluster:
    """A cluster whose nodes have a cache directory each, or share one.

    Attributes
    ----------
    address : str
        What a driver connects to.
    folder : pathlib.Path
        Ray's files: logs, and sockets.
    homes : dict of str to pathlib.Path
        By the ID of each node that lives: the cache directory that its workers use.
    """

    def __init__(self, folder: Path, process: BaseProcess, pipe: Connection, zygote: Zygote) -> None:
        self.folder = folder
        self._process = process
        self._pipe = pipe
        self._zygote = zygote
        self.homes: dict[str, Path] = {}
        self.address = ""

    def add_node(self, home: Path) -> str:
        """Start a node, and return its ID."""
        node_id, self.address = self._order("add", str(home))
        self.homes[node_id] = home
        return str(node_id)

    def workers(self, node_id: str) -> dict[int, str]:
        """Return the IDs and titles of the worker processes of a node, such as ``"ray::IDLE"``."""
        found: dict[int, str] = self._order("workers", node_id)
        return found

    def kill_node(self, node_id: str) -> None:
        """Send SIGKILL to all processes of a node, as if its machine had died."""
        self._order("kill", node_id)
        del self.homes[node_id]

    def kill_actors(self, node_id: str) -> None:
        """Send SIGKILL to the actors of a node."""
        killed = [pid for pid, title in self.workers(node_id).items() if "NdcacheWorker" in title]
        assert killed, self.workers(node_id)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    def start(
        self, function: Callable[..., Any], *args: Any, runtime_env: dict[str, Any] | None = None, **options: Any
    ) -> Child:
        """Call a function in a driver of its own."""
        return self._zygote.start(_drive, self.address, runtime_env, function, args, options)

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return what a function returns in a driver of its own, or raise what it raises; see `start`."""
        return self.start(function, *args, **options).result(TIMEOUT)

    def close(self) -> None:
        """End all nodes. Fails if a process stays behind."""
        self._zygote.close()
        try:
            self._order("close")
        finally:
            self._pipe.close()
            self._process.join(TIMEOUT)
            self._process.close()

    def _order(self, *order: str) -> Any:
        self._pipe.send(order)
        if not self._pipe.poll(TIMEOUT):
            raise TimeoutError(f"the cluster does not answer {order!r}")
        result, error = self._pipe.recv()
        if error is not None:
            raise AssertionError(error)
        return result


@contextlib.contextmanager
def open_ray_cluster(*homes: Path) -> Iterator[RayCluster]:
    """Start a cluster with one node for each of these cache directories; end it after the block."""
    ours, theirs = Pipe()
    # Unix sockets lie there, and their paths must be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    process = get_context("spawn").Process(target=_serve, args=(theirs, folder))
    process.start()
    theirs.close()
    try:
        cluster = RayCluster(Path(folder), process, ours, start_zygote())
        try:
            for home in homes:
                cluster.add_node(home)
            yield cluster
        finally:
            cluster.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_nothing() -> None:
    """Wait, in a driver, until the cluster has no actor, and the driver refers to no object; fail after some time."""
    end = time.monotonic() + TIMEOUT / 3
    while left := _what_is_left():
        assert time.monotonic() < end, left
        time.sleep(0.1)


def _what_is_left() -> list[str]:
    from ray._private.state import actors
    from ray._private.worker import global_worker

    left = [f"actor {each['ActorClassName']}" for each in actors().values() if each["State"] != "DEAD"]
    # Ray frees objects to which their owner, here the driver, has no reference.
    return left + [f"object {each}" for each in global_worker.core_worker.get_all_reference_counts()]


# --- the driver's process ------------------------------------------------------------------------------


def _drive(
    address: str,
    runtime_env: dict[str, Any] | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    import ray

    os.chdir("/")  # nodes would look for modules in the driver's directory first
    ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level="ERROR")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return function(*args, **options)
    except ray.exceptions.RayError as error:
        raise AssertionError(traceback.format_exc()) from error  # some of them cannot be pickled
    finally:
        ray.shutdown()


# --- the cluster's process -----------------------------------------------------------------------------


def _serve(pipe: Connection, folder: str) -> None:
    """Start and end nodes as ordered, until the other end is closed."""
    # Processes whose parent has ended become children of this one, so that it can tell whether any is left.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    warnings.simplefilter("ignore", ResourceWarning)  # Ray does not close the log files of its processes
    os.environ.update(RAY_TMPDIR=folder, RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=_python_path())
    nodes = _Nodes()
    with contextlib.suppress(EOFError):
        while (order := pipe.recv()) is not None:
            what, *arguments = order
            result, error = None, None
            try:
                result = getattr(nodes, what)(*arguments)
            except Exception:
                error = traceback.format_exc()
            pipe.send((result, error))
            if what == "close":
                return
    nodes.close()


def _python_path() -> str:
    """Return a PYTHONPATH with which workers find the same ndcache."""
    folder = str(Path(ndcache.__file__).parents[1])
    return os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])


class _Nodes:
    """The orders that a `RayCluster` gives."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster()

    def add(self, home: str) -> tuple[str, str]:
        node = self._cluster.add_node(
            wait=False,
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            env_vars={"NDCACHE_HOME": home},
        )
        end = time.monotonic() + TIMEOUT / 2
        while node not in (ids := self._ids()):
            assert time.monotonic() < end, "the node does not start"
            time.sleep(0.05)
        return ids[node], self._cluster.address

    def workers(self, node_id: str) -> dict[int, str]:
        return {pid: title for pid in _descendants(self._raylet(node_id)) if (title := _title(pid)).startswith("ray::")}

    def kill(self, node_id: str) -> None:
        node = {node_id: node for node, node_id in self._ids().items()}[node_id]
        raylet = self._raylet(node_id)
        for pid in [*_descendants(raylet), raylet]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()
        left: set[str] = set()
        end = time.monotonic() + TIMEOUT / 2
        while pids := _descendants(os.getpid()):
            left |= {_title(pid) for pid in pids}
            if time.monotonic() > end:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"processes left behind: {left}")
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
            time.sleep(0.01)

    def _ids(self) -> dict[Any, str]:
        """Return the ID of each node that this process has started and not killed."""
        table = self._cluster.global_state.node_table()
        by_socket = {entry["RayletSocketName"]: entry["NodeID"] for entry in table if entry["Alive"]}
        nodes = {node.raylet_socket_name: node for node in self._cluster.list_all_nodes()}
        return {nodes[name]: by_socket[name] for name in nodes.keys() & by_socket.keys()}

    def _raylet(self, node_id: str) -> int:
        (node,) = [node for node, its_id in self._ids().items() if its_id == node_id]
        (raylet,) = node.all_processes["raylet"]
        return int(raylet.process.pid)


def _descendants(pid: int) -> list[int]:
    """Return the IDs of the children of a process, and of theirs."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in map(int, Path(f"/proc/{pid}/task/{task}/children").read_text("ascii").split()):
                found += [child, *_descendants(child)]
    return found


def _title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""
