"""One model brought to every node of a cluster, whose nodes are processes of this machine with caches of their own."""

from __future__ import annotations

from .machine import need
from .timing import figures, logged_bytes, timed, written

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .timing import Given, Measured


def dask_fetch(given: Given) -> Measured:
    """Call `ndcache.dask.fetch` in a cluster of workers that have a directory each. Their start is not timed."""
    distributed, ndcache_dask = need("distributed"), need("ndcache.dask")
    workers = {
        number: {"cls": distributed.Nanny, "options": {"nthreads": 1, "env": _home(given, number)}}
        for number in range(given["nodes"])
    }
    scheduler = {"cls": distributed.Scheduler, "options": {"dashboard": False, "port": 0, "host": "127.0.0.1"}}
    with distributed.SpecCluster(workers, scheduler) as cluster, distributed.Client(cluster) as client:
        client.wait_for_workers(given["nodes"])
        client.run(need, "ndcache.dask")  # its import is not timed

        def work() -> int:
            ndcache_dask.fetch(client, given["url"], max_workers=given["workers"])
            return written(given)

        return _counted(given, work)


def ray_fetch(given: Given) -> Measured:
    """Call `ndcache.ray.fetch` in a cluster of nodes that have a directory each. Their start is not timed."""
    import os

    ray, ndcache_ray, clusters = need("ray"), need("ndcache.ray"), need("ray.cluster_utils")
    cluster = clusters.Cluster()
    try:
        for number in range(given["nodes"]):
            os.environ.update(_home(given, number))  # a node has the environment that it is started with
            cluster.add_node(num_cpus=1, object_store_memory=256 << 20, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

        def work() -> int:
            ndcache_ray.fetch(given["url"], max_workers=given["workers"])
            return written(given)

        return _counted(given, work)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _home(given: Given, number: int) -> dict[str, str]:
    """Return the environment of a node, which gives it a cache of its own."""
    return {"NDCACHE_HOME": f"{given['out']}/node{number}"}


def _counted(given: Given, work: Callable[[], int]) -> Measured:
    """Time the work, and count what the origin sends meanwhile."""
    sent = logged_bytes(given["log"])
    measured = timed(work)
    figures["origin_bytes"] = logged_bytes(given["log"]) - sent
    return measured
