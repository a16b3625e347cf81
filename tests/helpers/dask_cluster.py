"""A Dask cluster of processes that can be added and killed; also the program that these processes run."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ndcache

#: A safety net: nothing here takes so long.
TIMEOUT = 60.0


class DaskProcess:
    """A scheduler, worker or nanny in a process of its own, which ends when this process does.

    Parameters
    ----------
    folder : pathlib.Path
        For its scratch files and its log.
    *arguments : str
        See `_main`.
    **environ : str
        Its own variables.

    Attributes
    ----------
    log : pathlib.Path
        Its standard error.
    address : str
    """

    def __init__(self, folder: Path, *arguments: str, **environ: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"log{len(list(folder.glob('log*')))}"
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            "PYTHONPATH": os.pathsep.join(paths),
            "DASK_TEMPORARY_DIRECTORY": str(folder / "scratch"),
            "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "0.95",
        }
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.dask_cluster", *arguments],
                env={**os.environ, **variables, **environ},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._address = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def address(self) -> str:
        """Return its address, once it has started."""
        if not self._address:
            assert self._process.stdout is not None
            self._address = self._process.stdout.readline().strip()
            assert self._address, self.log.read_text()
        return self._address

    def kill(self) -> None:
        """Send it SIGKILL, and wait for its end."""
        self._process.kill()
        self.close()

    def stop(self) -> None:
        """Tell it to end."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close(self) -> None:
        """Wait for its end."""
        self.stop()
        try:
            self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class DaskCluster:
    """A scheduler, and workers that have a cache each.

    Parameters
    ----------
    folder : pathlib.Path

    Attributes
    ----------
    scheduler : DaskProcess
    workers : list of DaskProcess
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.scheduler = DaskProcess(folder / "scheduler", "scheduler")
        self.workers: list[DaskProcess] = []

    def add(self, home: Path, *, threads: int = 1, kind: str = "worker", memory: str = "0") -> DaskProcess:
        """Start a worker, or a nanny with a worker that may use `memory` bytes; do not wait for it."""
        folder = self._folder / f"worker{len(self.workers)}"
        arguments = (kind, self.scheduler.address, str(threads), memory)
        self.workers.append(DaskProcess(folder, *arguments, NDCACHE_HOME=str(home)))
        return self.workers[-1]

    def logs(self) -> str:
        """Return what all processes have written."""
        return "".join(each.log.read_text() for each in (self.scheduler, *self.workers))

    def close(self) -> None:
        """End all processes."""
        for process in (*self.workers, self.scheduler):
            process.stop()
        for process in (*self.workers, self.scheduler):
            process.close()


# --- functions for schedulers and workers


def set_home(home: str) -> None:
    """Give a worker another cache."""
    os.environ["NDCACHE_HOME"] = home


def left_in_scheduler(dask_scheduler: Any) -> list[str]:
    """Return the tasks of ndcache that a scheduler knows."""
    return [str(key) for key in dask_scheduler.tasks if "ndcache" in str(key)]


def left_in_worker(dask_worker: Any) -> list[str]:
    """Return the tasks of ndcache that a worker knows, and their states."""
    tasks = dask_worker.state.tasks.items()
    return [f"{key} {task.state}" for key, task in tasks if "ndcache" in str(key)]


def names_in(directory: Path) -> list[str]:
    """Load a model on a worker."""
    with ndcache.load(directory) as weights:
        return sorted(weights)


def describe_tasks(dask_scheduler: Any) -> list[str]:
    """Return all that a scheduler's dashboard could show of its tasks."""
    return [f"{key} {task!r} {task.run_spec!r}" for key, task in dask_scheduler.tasks.items()]


def fetch_in_task(url: str) -> int:
    """Fetch from within a task, and return the number of nodes."""
    import distributed

    import ndcache.dask

    return len(ndcache.dask.fetch(distributed.get_client(), url))


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory at once."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


# --- the program


async def _main(kind: str, *arguments: str) -> None:
    """Run ``scheduler``, or ``worker`` or ``nanny`` with an address, threads and bytes, until standard input ends."""
    import distributed

    server: Any
    if kind == "scheduler":
        server = distributed.Scheduler(host="127.0.0.1", port=0, dashboard=False)
    else:
        address, threads, memory = arguments
        make = distributed.Nanny if kind == "nanny" else distributed.Worker
        server = make(address, host="127.0.0.1", nthreads=int(threads), memory_limit=memory, dashboard=False)
    async with server:
        print(server.worker_address if kind == "nanny" else server.address, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
