"""Helpers of tests of loads: comparing tensors, files of the cache, damage, a scripted model, the data of a page."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import ndcache

from . import models
from .servers import FileServer, ScriptedServer, reply

Serve = Callable[..., FileServer]

QUICK = ndcache.RetryPolicy(retries=1, backoff=0.001)


def assert_same(weights: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    assert list(weights) == list(arrays)
    for name, array in arrays.items():
        loaded = np.asarray(weights[name])
        assert loaded.dtype == array.dtype, name
        assert loaded.shape == array.shape, name
        assert loaded.tobytes() == array.tobytes(), name


def published(cache_dir: Path) -> list[str]:
    """Return the files of models in the cache that have a real name."""
    return sorted(path.name for path in cache_dir.glob("[!.]*/**/*") if path.is_file() and ".ndcache" not in path.parts)


def partial_files(cache_dir: Path) -> list[Path]:
    return list(cache_dir.rglob(".ndcache/parts/*"))


def loading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ndcache")]


def flip(path: Path) -> None:
    """Change a bit, and keep the size and time of the file."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def scripted_model(scripted: ScriptedServer, model: Path, shards: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """Let the server serve every file of a model; tests script some of them anew."""
    arrays = models.simple_model(model, shards=shards)
    scripted.script = {
        f"/{path.name}": [reply(200, path.read_bytes(), {"ETag": f'"{path.name}"'})] for path in model.iterdir()
    }
    return arrays


WHERE = ["/tensor-cache.json", "/params_shard_0.bin"]

HALF = 1 << 15


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until another thread or process has done something."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def page_data(page: str) -> dict[str, Any]:
    """Return the JSON that a page holds."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data
