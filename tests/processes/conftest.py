"""Fixtures of tests with several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..helpers import models
from ..helpers.kills import CountingServer
from ..helpers.processes import Zygote, start_zygote
from .children import MIB, Serve


@pytest.fixture(scope="package", autouse=True)
def _zygote() -> Iterator[Zygote]:
    """Start one zygote for all tests, before any of them, so that its open files do not count as a test's leak."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.lower().endswith("_proxy") or name.startswith(("NDCACHE_O", "NDCACHE_H", "HF_")):
                patch.delenv(name)
        started = start_zygote()
    yield started
    started.close()


@pytest.fixture
def zygote(_zygote: Zygote) -> Zygote:
    return _zygote


@pytest.fixture
def counting() -> Iterator[Serve]:
    """Return a function that starts a `CountingServer`, which is closed after the test."""
    started: list[CountingServer] = []

    def start(directory: Path, **options: Any) -> CountingServer:
        started.append(CountingServer(directory, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture
def one_shard(model: Path, counting: Serve) -> CountingServer:
    models.simple_model(model, shards=1, shard_bytes=MIB)
    return counting(model)
