"""Run work on shards without files in a pool."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import ndcache
from ndcache.stats import LoadStats
from ndcache.workers.cancellation import Cancellation
from ndcache.workers.ordered import map_ordered
from ndcache.workers.pool import WorkerPool


def shards(*sizes: int) -> list[ndcache.Shard]:
    return [ndcache.Shard(f"{index}.bin", size, None, None, "raw-shard", ()) for index, size in enumerate(sizes)]


def run(
    items: Sequence[ndcache.Shard],
    work: Callable[[ndcache.Shard], Any],
    *,
    max_workers: int = 4,
    cancellation: Cancellation | None = None,
    pool: WorkerPool | None = None,
    **options: Any,
) -> Generator[Any, None, None]:
    pool = pool or WorkerPool(max_workers, cancellation)
    pool.start()
    sizes = [item.nbytes for item in items]
    return map_ordered(
        items, work, **{"pool": pool, "sizes": sizes, "memory_limit": 1000, "stats": LoadStats(), **options}
    )
