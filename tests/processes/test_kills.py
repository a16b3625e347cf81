"""Fetches that are killed, and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

import ndcache

from ..helpers import kills, models
from ..helpers.companions import mlc_model
from ..helpers.kills import CountingServer, check_published, left_behind, model_directory
from ..helpers.processes import Zygote
from .children import MIB, Serve, hold_at_half, ranges, wait_until


@pytest.mark.once
@pytest.mark.parametrize("mode", kills.MODES)
def test_row_25_after_each_kill_every_file_is_right(tmp_path: Path, mode: str) -> None:
    figures = kills.run_kills(25, 0, mode, tmp_path, shards=8, shard_bytes=1 << 19)
    assert sum(figures.kills.values()) == 25


def test_row_25_a_resumed_fetch_asks_only_for_the_rest(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    models.simple_model(model, shards=1, shard_bytes=4 * MIB)
    server = counting(model)
    directory = kill_at_half(server, zygote, cache_dir, 4 * MIB)
    assert check_published(directory, kills.digests(model)) == 1  # the manifest
    zygote.start(kills.fetch, server.url, cache_dir=cache_dir).result()
    assert ranges(server) == [None, f"bytes={2 * MIB}-{4 * MIB - 1}"]
    assert server.shard_requests()[1].headers["if-range"]
    assert server.sent_bytes == 4 * MIB
    assert kills.digests(directory) == kills.digests(model)
    assert left_behind(directory) == []


@pytest.mark.parametrize("md5", [True, False], ids=["with its digest in a new manifest", "without a digest"])
def test_row_25_a_file_that_has_changed_is_not_resumed(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path, md5: bool
) -> None:
    models.write_model(model, [{"t": models.random_array((2 * MIB,), "uint8", 1)}], md5=md5)
    server = counting(model)
    directory = kill_at_half(server, zygote, cache_dir, 2 * MIB)
    models.write_model(model, [{"t": models.random_array((2 * MIB,), "uint8", 2)}], md5=md5)
    zygote.start(kills.fetch, server.url, cache_dir=cache_dir, retries=ndcache.RetryPolicy(backoff=0.01)).result()
    assert kills.digests(directory) == kills.digests(model)
    assert left_behind(directory) == []


def test_row_25_a_resumed_fetch_asks_only_for_the_rest_of_a_companion(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    mlc_model(model, tokenizer_files=["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
    (model / "tokenizer.model").write_bytes(bytes(MIB))
    server = counting(model)
    server.holds["/tokenizer.model"] = (MIB // 2,)
    child = zygote.start(kills.fetch, server.url, cache_dir=cache_dir)
    parts = model_directory(cache_dir, server.url) / ".ndcache" / "parts"
    wait_until(lambda: any(path.stat().st_size == MIB // 2 for path in parts.glob("tokenizer.model.*")))
    assert not child.kill()
    zygote.start(kills.fetch, server.url, cache_dir=cache_dir).result()
    asked = [request.headers.get("range") for request in server.requests if request.path == "/tokenizer.model"]
    assert asked == [None, f"bytes={MIB // 2}-"]
    assert kills.digests(parts.parent.parent) == kills.digests(model)
    assert left_behind(parts.parent.parent) == []


def kill_at_half(server: CountingServer, zygote: Zygote, cache_dir: Path, nbytes: int) -> Path:
    """Kill a fetch when half of its one shard has been written; return the model's directory."""
    holder, directory = hold_at_half(server, zygote, cache_dir, nbytes)
    assert not holder.kill()
    return directory
