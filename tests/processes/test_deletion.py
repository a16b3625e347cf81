"""Models that are deleted during a load."""

from __future__ import annotations

from pathlib import Path

import ndcache

from ..helpers import models
from ..helpers.kills import left_behind, model_directory
from ..helpers.processes import Zygote
from .children import MIB, Serve, digest_of, load, partial_bytes, wait_until


def test_row_32_a_load_from_the_cache_outlives_the_cache(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    arrays = models.simple_model(model, shards=12)
    server = counting(model)
    ndcache.fetch(server.url)
    server.close()
    tensors = ndcache.stream(server.url, offline=True, max_workers=1, memory_limit=1)
    loaded = dict([next(tensors)])
    assert zygote.start(ndcache.delete, server.url, cache_dir=cache_dir).result() > 0
    assert not ndcache.is_cached(server.url)
    loaded.update(tensors)
    assert digest_of(loaded) == digest_of(arrays)


def test_row_32_a_load_from_the_server_outlives_the_cache(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    arrays = models.simple_model(model, shards=6, shard_bytes=MIB // 4)
    server = counting(model)
    server.holds = {f"/params_shard_{index}.bin": (MIB // 8,) for index in (1, 2, 4)}
    loading = zygote.start(load, server.url, cache_dir=cache_dir, max_workers=2)
    wait_until(lambda: partial_bytes(model_directory(cache_dir, server.url)) == 2 * MIB // 8)
    zygote.start(ndcache.delete, server.url, cache_dir=cache_dir).result()
    server.go.release(100)
    assert loading.result() == digest_of(arrays)
    assert load(server.url, cache_dir=cache_dir) == digest_of(arrays)
    assert left_behind(model_directory(cache_dir, server.url)) == []
