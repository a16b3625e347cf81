"""Processes that load one model at once take different shards of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ndcache

from ..helpers import models
from ..helpers.kills import CountingServer, left_behind, model_directory
from ..helpers.processes import Zygote
from .children import MIB, Serve, digest_of, wait_until


def load_and_count(url: str, **options: Any) -> tuple[str, ndcache.LoadStats]:
    """Load a model; return the digest of its tensors, and the load's statistics."""
    with ndcache.load(url, **options) as weights:
        return digest_of(weights), weights.stats


def requested(server: CountingServer) -> list[str]:
    """Return the paths of the shards that were requested, in order."""
    return [request.path for request in server.shard_requests()]


def test_no_process_waits_while_there_are_shards_that_nobody_has_begun(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    """Four processes of four workers request 16 different shards before any of them is answered."""
    arrays = models.simple_model(model, shards=24, shard_bytes=MIB // 8)
    server = counting(model)
    server.gate.clear()
    children = [
        zygote.start(load_and_count, server.url, cache_dir=cache_dir, max_workers=4, memory_limit=MIB) for _ in range(4)
    ]
    wait_until(lambda: len(server.shard_requests()) >= 16)
    assert len(set(requested(server))) == len(requested(server)) == 16
    server.gate.set()
    loads = [child.result() for child in children]
    assert {digest for digest, _ in loads} == {digest_of(arrays)}
    assert sorted(requested(server)) == sorted(f"/params_shard_{index}.bin" for index in range(24))
    stats = [stats for _, stats in loads]
    assert sum(one.network_bytes for one in stats) == 24 * MIB // 8
    assert sum(one.nbytes - one.cache_bytes for one in stats) == 24 * MIB // 8
    assert all(one.peak_bytes_in_flight <= MIB for one in stats)
    assert left_behind(model_directory(cache_dir, server.url)) == []
