"""The cache is pruned, emptied and limited while other processes load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import ndcache

from ..helpers import models
from ..helpers.kills import CountingServer, model_directory
from ..helpers.processes import Child, Zygote
from .children import MIB, Serve, digest_of, load, partial_bytes, wait_until

NBYTES = MIB // 4


def fetch(url: str, **options: Any) -> list[str]:
    return sorted(path.name for path in ndcache.fetch(url, **options).glob("*.*"))


def keep_open(url: str, flag: str, go: str, **options: Any) -> str:
    """Load a model, say so, and return the digest of its tensors once the other file is there."""
    weights = ndcache.load(url, **options)
    Path(flag).touch()
    wait_until(Path(go).exists)
    return digest_of(weights)


def load_with_limit(url: str, limit: str, **options: Any) -> str:
    os.environ["NDCACHE_MAX_SIZE"] = limit
    return load(url, **options)


@pytest.fixture
def loading(model: Path, counting: Serve, zygote: Zygote, cache_dir: Path) -> tuple[CountingServer, Child]:
    """Start a process whose fetch has half of three shards, while one more is complete."""
    models.simple_model(model, shards=4, shard_bytes=NBYTES)
    server = counting(model)
    server.holds = {f"/params_shard_{index}.bin": (NBYTES // 2,) for index in (1, 2, 3)}
    child = zygote.start(fetch, server.url, cache_dir=cache_dir, max_workers=3)
    directory = model_directory(cache_dir, server.url)
    wait_until(lambda: partial_bytes(directory) == 3 * NBYTES // 2 and (directory / "params_shard_0.bin").exists())
    return server, child


@pytest.mark.parametrize(
    "remove",
    [
        lambda **options: ndcache.cache.prune(max_size=0, **options),
        lambda **options: ndcache.cache.prune(partial=True, aside=True, **options),
        lambda **options: ndcache.cache.prune(older_than=0, **options),
        lambda **options: ndcache.cache.delete("*", **options),
    ],
    ids=["max_size", "partial", "older_than", "delete"],
)
def test_row_118_a_download_under_way_is_not_removed(
    loading: tuple[CountingServer, Child], cache_dir: Path, remove: Any
) -> None:
    server, child = loading
    (found,) = ndcache.cache.models(cache_dir=cache_dir)
    assert (found.state, found.in_use, found.complete) == ("1 of 4 shards", True, False)
    for dry_run in (True, False):
        report = remove(cache_dir=cache_dir, dry_run=dry_run)
        assert (report.removed, [model.source for model in report.in_use]) == ((), [server.url])
        assert report.freed == 0
    before = len(server.shard_requests())
    server.go.release(100)
    assert child.result() == [".ndcache", *(f"params_shard_{index}.bin" for index in range(4)), "tensor-cache.json"]
    assert len(server.shard_requests()) == before == 4
    (found,) = ndcache.cache.models(cache_dir=cache_dir)
    assert (found.state, found.in_use, found.complete) == ("complete", False, True)
    assert ndcache.cache.prune(keep_last=0, cache_dir=cache_dir).removed == (found,)


def test_row_119_a_killed_load_uses_the_model_no_more(loading: tuple[CountingServer, Child], cache_dir: Path) -> None:
    _, child = loading
    child.kill()
    wait_until(lambda: not ndcache.cache.models(cache_dir=cache_dir)[0].in_use)
    (found,) = ndcache.cache.prune(partial=True, cache_dir=cache_dir).removed
    assert (found.state, found.partial_size >= NBYTES) == ("1 of 4 shards", True)
    assert ndcache.cache.models(cache_dir=cache_dir) == []


def test_row_120_the_limit_takes_what_was_used_least_recently_and_never_what_is_in_use(
    tmp_path: Path, model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    arrays = {}
    for number, name in enumerate("abcd"):
        arrays[name] = models.simple_model(model / name, shards=2, shard_bytes=NBYTES, seed=10 * number)
    server = counting(model)
    urls = {name: f"{server.url}{name}/" for name in "abcd"}
    flag, go = tmp_path / "flag", tmp_path / "go"
    keeping = zygote.start(keep_open, urls["a"], str(flag), str(go), cache_dir=cache_dir)
    wait_until(flag.exists)
    for name in "bcb":  # c is the one that was not used for the longest time, apart from a, which is in use
        ndcache.fetch(urls[name], cache_dir=cache_dir)
    loaded = zygote.start(load_with_limit, urls["d"], f"{7 * NBYTES}", cache_dir=cache_dir).result()
    assert loaded == digest_of(arrays["d"])
    left = {model.source for model in ndcache.cache.models(cache_dir=cache_dir)}
    assert left == {urls[name] for name in "abd"}
    go.touch()
    assert keeping.result() == digest_of(arrays["a"])


def test_row_121_a_limit_that_is_too_small_warns_and_does_not_fail_the_load(
    model: Path, counting: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate("ab"):
        models.simple_model(model / name, shards=2, shard_bytes=NBYTES, seed=10 * number)
    server = counting(model)
    ndcache.fetch(f"{server.url}a/")
    monkeypatch.setenv("NDCACHE_MAX_SIZE", "100 KB")
    with pytest.warns(RuntimeWarning, match="more than NDCACHE_MAX_SIZE allows"):
        ndcache.fetch(f"{server.url}b/")
    assert [(model.source, model.complete) for model in ndcache.cache.models()] == [(f"{server.url}b/", True)]
    monkeypatch.setenv("NDCACHE_MAX_SIZE", "a lot")
    with pytest.raises(ValueError, match="NDCACHE_MAX_SIZE cannot be used: 'a lot' is no size"):
        ndcache.load(f"{server.url}b/")
