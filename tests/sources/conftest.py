"""Fixtures for the tests of the sources."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ndcache.context import LoadContext
from ndcache.http.limits.rate_limits import RateLimits
from ndcache.http.retry import RetryPolicy
from ndcache.http.transport import Transport
from ndcache.sources.client import Client
from ndcache.sources.downloads.download import Downloader
from ndcache.store.directory import ModelDirectory
from ndcache.store.inventory import CacheScope
from ndcache.workers.pool import WorkerPool


@pytest.fixture
def downloader(tmp_path: Path) -> Iterator[Downloader]:
    """Return a downloader without threads, which makes four attempts."""
    transport = Transport(timeout=(5.0, 0.5))
    context = LoadContext(
        transport,
        RetryPolicy(retries=3, backoff=0.001),
        RateLimits(),
        WorkerPool(),
        CacheScope(tmp_path, "default", is_private=False),
    )
    yield Downloader(Client(context), ModelDirectory(tmp_path / "model", "http://host/"))
    transport.close()
