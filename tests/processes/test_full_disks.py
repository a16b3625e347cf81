"""Disks without room for a model."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ndcache

from ..helpers import kills, models
from ..helpers.disks import mount, mounted
from ..helpers.kills import CountingServer, check_published, left_behind, model_directory
from .children import MIB, Serve, assert_fetched, digest_of, load


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 3 MiB."""
    with mounted(tmp_path / "disk") as folder:
        yield folder


def test_row_29_a_lack_of_room_for_the_model_is_noticed_before_the_download(
    model: Path, counting: Serve, small_disk: Path
) -> None:
    models.simple_model(model, shards=8, shard_bytes=MIB // 2)
    server = counting(model)
    with pytest.raises(ndcache.DiskFullError) as caught:
        ndcache.fetch(server.url, cache_dir=small_disk)
    assert (caught.value.expected, caught.value.received) == (4 * MIB, shutil.disk_usage(small_disk).free)
    assert server.shard_requests() == []


@pytest.mark.parametrize("max_workers", [1, 4])
def test_row_29_files_that_fitted_on_a_disk_that_fills_up_are_kept(
    model: Path, counting: Serve, small_disk: Path, monkeypatch: pytest.MonkeyPatch, max_workers: int
) -> None:
    arrays = models.simple_model(model, shards=8, shard_bytes=MIB // 2)
    server = counting(model)
    with monkeypatch.context() as patch:
        patch.setattr("ndcache.sources.remote.check_free_space", lambda *_: None)  # others fill the disk later
        with pytest.raises(ndcache.DiskFullError) as caught:
            ndcache.fetch(server.url, cache_dir=small_disk, max_workers=max_workers)
    assert caught.value.errno == errno.ENOSPC
    directory = model_directory(small_disk, server.url)
    assert check_published(directory, kills.digests(model)) >= 3  # with the manifest
    missing = {f"/{name}" for name in kills.digests(model).keys() - kills.digests(directory).keys()}
    if max_workers == 1:
        assert not [name for name in left_behind(directory) if name.startswith("parts/")]
    mount("-o", "remount,size=12m", str(small_disk))
    server.requests.clear()
    assert load(server.url, cache_dir=small_disk) == digest_of(arrays)
    assert {request.path for request in server.shard_requests()} <= missing
    assert left_behind(directory) == []


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("call", ["fsync", "close"])
def test_row_29_a_lack_of_room_is_noticed_when_a_file_is_synced_or_closed(
    one_shard: CountingServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: str
) -> None:
    failed: list[str] = []

    def fail_once(handle: int) -> None:
        if not failed and os.fstat(handle).st_size == MIB:
            failed.append(call)
            raise OSError(getattr(errno, number), "no room")

    class LateFile(io.FileIO):
        """A file that reports only when it is closed that there was no room, as on NFS."""

        def close(self) -> None:
            try:
                if not self.closed:
                    fail_once(self.fileno())
            finally:
                super().close()

    really_sync, really_open = os.fsync, os.fdopen

    def fsync(handle: int) -> None:
        fail_once(handle)
        really_sync(handle)

    def fdopen(handle: int, mode: str = "r", *args: Any, **options: Any) -> Any:
        return LateFile(handle, "r+b") if mode == "r+b" else really_open(handle, mode, *args, **options)

    monkeypatch.setattr(os, *(("fsync", fsync) if call == "fsync" else ("fdopen", fdopen)))
    with pytest.raises(ndcache.DiskFullError) as caught:
        ndcache.fetch(one_shard.url)
    assert (caught.value.errno, caught.value.shard, failed) == (errno.ENOSPC, "params_shard_0.bin", [call])
    directory = model_directory(cache_dir, one_shard.url)
    assert check_published(directory, kills.digests(one_shard.directory)) == 1
    assert not [name for name in left_behind(directory) if name.startswith("parts/")]
    ndcache.fetch(one_shard.url)
    assert_fetched(directory, one_shard)
