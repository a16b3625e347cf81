"""The memory of Dask's workers while a file passes that is larger than all of it."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ndcache

from ..helpers import dask_cluster
from ..helpers.dask_cluster import TIMEOUT, DaskCluster
from ..helpers.requirements import need_module

distributed = need_module("distributed")
ndcache_dask = need_module("ndcache.dask")

MIB = 1 << 20


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[str]:
    """Serve a folder without reading whole files into memory."""
    (tmp_path / "model").mkdir()
    handler = functools.partial(_Handler, directory=str(tmp_path / "model"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


@pytest.mark.once
def test_a_file_passes_that_is_larger_than_the_memory_of_all_workers(tmp_path: Path, origin: str) -> None:
    """The nannies end workers that take more."""
    write_large_model(tmp_path / "model", 1024 * MIB)
    cluster = DaskCluster(tmp_path / "dask")
    homes = [tmp_path / "home0", tmp_path / "home1"]
    try:
        for home in homes:
            cluster.add(home, kind="nanny", memory=str(448 * MIB))
        with distributed.Client(cluster.scheduler.address, timeout=TIMEOUT) as client:
            client.wait_for_workers(2, timeout=TIMEOUT)
            before = client.run(dask_cluster.peak_memory)
            directories = ndcache_dask.fetch(client, origin)
            peaks = client.run(dask_cluster.peak_memory)
    finally:
        cluster.close()
    assert set(directories) == set(before) == set(peaks)  # none of them was restarted
    assert max(peak - before[address] for address, peak in peaks.items()) < 256 * MIB
    for home in homes:
        assert ndcache.is_cached(origin, cache_dir=home)


def write_large_model(directory: Path, nbytes: int) -> None:
    """Write a model of one shard of zeros, without room on the disk."""
    with open(directory / "params_shard_0.bin", "wb") as file:
        file.truncate(nbytes)
    digest, zeros = hashlib.md5(), bytes(1 << 24)
    for _ in range(nbytes // len(zeros)):
        digest.update(zeros)
    record = {
        "name": "x",
        "shape": [nbytes // 4],
        "dtype": "float32",
        "format": "raw",
        "nbytes": nbytes,
        "byteOffset": 0,
    }
    shard = {
        "dataPath": "params_shard_0.bin",
        "format": "raw-shard",
        "nbytes": nbytes,
        "md5sum": digest.hexdigest(),
        "records": [record],
    }
    (directory / "tensor-cache.json").write_text(json.dumps({"metadata": {}, "records": [shard]}))
