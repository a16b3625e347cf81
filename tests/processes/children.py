"""Functions that child processes run, and checks of what they leave."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import ndcache

from ..helpers import kills
from ..helpers.kills import CountingServer, left_behind, model_directory
from ..helpers.processes import Child, Zygote

Arrays = Mapping[str, Any]
Serve = Callable[..., CountingServer]

SHARD = "/params_shard_0.bin"
MIB = 1 << 20


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def digest_of(tensors: Arrays) -> str:
    """Return one digest of all names, dtypes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def partial_bytes(directory: Path) -> int:
    """Return how many bytes lie in partial files of shards."""
    folder = directory / ".ndcache" / "parts"
    total = 0
    for path in folder.glob("params_shard_*") if folder.is_dir() else []:
        if path.suffix != ".json":
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def ranges(server: CountingServer) -> list[str | None]:
    """Return the range that each request for a shard asked for."""
    return [request.headers.get("range") for request in server.shard_requests()]


def load(url: str, **options: Any) -> str:
    """Load a model, and return the digest of its tensors."""
    with ndcache.load(url, **options) as weights:
        return digest_of(weights)


def load_with(loader: ndcache.Loader, url: str) -> str:
    with loader.load(url) as weights:
        return digest_of(weights)


def hold_at_half(
    server: CountingServer,
    zygote: Zygote,
    cache_dir: Path,
    nbytes: int,
    function: Callable[..., None] = kills.fetch,
    *args: Any,
) -> tuple[Child, Path]:
    """Start a fetch that has written half of its one shard, and waits for the rest while it holds the lock."""
    server.holds[SHARD] = (nbytes // 2,)
    holder = zygote.start(function, server.url, *args, cache_dir=cache_dir)
    directory = model_directory(cache_dir, server.url)
    wait_until(lambda: partial_bytes(directory) == nbytes // 2)
    return holder, directory


def assert_fetched(directory: Path, server: CountingServer) -> None:
    assert kills.digests(directory) == kills.digests(server.directory)
    assert left_behind(directory) == []
