"""``python -m benchmarks.cluster_cost``: what a call of `ndcache.dask.fetch` costs with more and more nodes.

Each node is a worker in a process of its own, with a cache of its own, on this machine. Printed are numbers of tasks
and CPU seconds of the scheduler, the client and the workers, less what they take when idle. Other programs on the
machine disturb these less than times. docs/cluster.rst has what follows from them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed

import ndcache.dask
from tests.helpers.dask_cluster import DaskCluster
from tests.helpers.models import simple_model
from tests.helpers.servers import FileServer

KIB = 1 << 10
#: The shapes of models: shards, and the bytes of each.
SHAPES = ((16, 16 << 20), (64, 16 * KIB))
#: How long to measure what idle processes take.
_IDLE_SECONDS = 5.0


def cpu_seconds() -> float:
    """Return the CPU time of this process."""
    return time.process_time()


def import_ndcache() -> None:
    """Import everything that tasks need."""
    importlib.import_module("ndcache.dask")


def measure(nodes: int, shards: int, shard_bytes: int, *, piece_bytes: int) -> dict[str, Any]:
    """Fetch a model to some nodes, and return what that cost."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        simple_model(folder / "model", shards=shards, shard_bytes=shard_bytes)
        server, cluster = FileServer(folder / "model"), DaskCluster(folder / "dask")
        try:
            for number in range(nodes):
                cluster.add(folder / f"home{number}")
            with distributed.Client(cluster.scheduler.address, timeout=120) as client:
                client.wait_for_workers(nodes, timeout=300)
                client.run(import_ndcache)
                counts = _count_tasks(client)
                client.run(time.sleep, 1)  # let the imports settle
                idle = _cpu(client)
                time.sleep(_IDLE_SECONDS)
                before = _cpu(client)
                begun = time.perf_counter()
                ndcache.dask.fetch(client, server.url, max_workers=1, memory_limit=4 * piece_bytes)
                seconds = time.perf_counter() - begun
                after = _cpu(client)
        finally:
            cluster.close()
            server.close()
        return {
            "nodes": nodes,
            "shards": shards,
            "bytes": shards * shard_bytes,
            "requests": len(server.requests),
            "tasks": dict(counts),
            "seconds": round(seconds, 2),
            **{
                f"{part} CPU": round(
                    after[part] - before[part] - (before[part] - idle[part]) * seconds / _IDLE_SECONDS, 3
                )
                for part in after
            },
        }


def _count_tasks(client: distributed.Client) -> Counter[str]:
    counts: Counter[str] = Counter()
    submit: Callable[..., Any] = client.submit

    def counting(run: Any, function: Any, *args: Any, **options: Any) -> Any:
        counts[function.__name__] += 1
        return submit(run, function, *args, **options)

    client.submit = counting
    return counts


def _cpu(client: distributed.Client) -> dict[str, float]:
    """Return the CPU seconds of the scheduler, of this process, which also has the server, and of all workers."""
    return {
        "scheduler": client.run_on_scheduler(cpu_seconds),
        "client and server": time.process_time(),
        "workers": sum(client.run(cpu_seconds).values()),
    }


def predict(nodes: int, link: float) -> str:
    """Return a row of the table in docs/cluster.rst: the seconds that limit a call, one by one, and all together.

    Parameters
    ----------
    nodes : int
    link : float
        Bytes per second of each node.
    """
    nbytes, pieces, origin, node, task = 16 * 2**30, 256, 1.25e9, 0.4e9, 1.4e-3
    rounds = math.ceil(math.log(nodes, 3))
    received = nbytes * (1 - 1 / nodes)
    parts = {
        "origin": nbytes / min(origin, nodes * link),
        "links": received / link,
        "nodes": received / node,
        "scheduler": 2 * pieces * (nodes - 1) * task,
    }
    total = max(parts.values()) + rounds * nbytes / pieces / min(link, node)
    shown = ", ".join(f"{name} {seconds:.0f}" for name, seconds in parts.items())
    alone = nodes * nbytes / origin
    return f"{nodes} nodes, {link / 1.25e8:.0f} Gbit/s: {shown}, rounds {rounds}; {total:.0f} s; alone {alone:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--predict", action="store_true", help="measure nothing: print what docs/cluster.rst predicts")
    options = parser.parse_args()
    if options.predict:
        for nodes in (8, 64, 1000):
            for link in (1.25e9, 12.5e9):
                print(predict(nodes, link))
        return
    print(f"{os.cpu_count()} cores", flush=True)
    for shards, shard_bytes in SHAPES:
        for nodes in options.nodes:
            # So that each shard travels alone, and costs two tasks for each node.
            print(json.dumps(measure(nodes, shards, shard_bytes, piece_bytes=shard_bytes)), flush=True)


if __name__ == "__main__":
    main()
