"""Manifests on a scripted server, for tests."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import ndcache

from . import models
from .servers import ScriptedServer, reply

NEW, OLD = "/tensor-cache.json", "/ndarray-cache.json"
QUICK = ndcache.RetryPolicy(retries=3, backoff=0.001)
HTML = b"<!doctype html><title>My app</title>"
HTML_TYPE = {"Content-Type": "text/html; charset=utf-8"}
GZIP = {"Content-Encoding": "gzip"}


def scripted_model(scripted: ScriptedServer, model: Path, name: str, seed: int = 0) -> dict[str, Any]:
    """Let the server have a model whose manifest has this name; it answers 404 where it has no script."""
    arrays = {"w": models.random_array((1000,), seed=seed)}
    models.write_model(model, [arrays], manifest_name=name.lstrip("/"))
    scripted.script = {f"/{path.name}": [reply(200, path.read_bytes())] for path in model.iterdir()}
    return arrays


def manifests_asked_for(scripted: ScriptedServer) -> list[str]:
    """Return the manifests of NDArray caches that were requested."""
    return [request.path for request in scripted.requests if request.path.endswith("-cache.json")]


def cached_manifests(cache_dir: Path) -> list[str]:
    """Return the names of all cached manifests."""
    return sorted(path.name for path in cache_dir.rglob("*.json") if ".ndcache" not in path.parts)


def sri(data: bytes) -> str:
    """Return a digest as the ``integrity`` option takes it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(data).digest()).decode()
