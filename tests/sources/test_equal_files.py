"""Shards that another model of the cache has are linked, not downloaded."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.store.digest_index import DigestIndex

from ..helpers.models import assert_same, simple_model
from ..helpers.servers import FileServer

Serve = Callable[..., FileServer]
NBYTES = 1 << 16


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, Any]:
    """Write the same model twice, at ``one/`` and ``two/`` of the folder ``www``."""
    found = simple_model(tmp_path / "www/one")
    shutil.copytree(tmp_path / "www/one", tmp_path / "www/two")
    return found


def inodes(directory: Path) -> list[int]:
    return [path.stat().st_ino for path in sorted(directory.glob("*.bin"))]


def test_a_shard_of_another_model_is_linked(tmp_path: Path, arrays: dict[str, Any], serve: Serve) -> None:
    server = serve(tmp_path / "www")
    one = ndcache.fetch(f"{server.url}one/", files=False)
    with ndcache.load(f"{server.url}two/", files=False) as weights:
        assert_same(weights, arrays)
        assert weights.stats.network_bytes == 0
        assert weights.stats.integrity == {"md5": 4}
    two = ndcache.fetch(f"{server.url}two/", files=False)
    assert len(server.shard_requests()) == 4
    assert inodes(one) == inodes(two)
    assert not list((two / ".ndcache/parts").iterdir())


def test_linked_bytes_count_once_and_stay_with_the_other(
    tmp_path: Path, arrays: dict[str, Any], serve: Serve, cache_dir: Path
) -> None:
    server = serve(tmp_path / "www")
    for name in ("one", "two"):
        ndcache.fetch(f"{server.url}{name}/", files=False)
    sizes = sorted(model.size for model in ndcache.cache.models(cache_dir=cache_dir))
    assert sizes[0] < NBYTES < 4 * NBYTES <= sizes[1]
    assert ndcache.delete(f"{server.url}one/") < NBYTES
    with ndcache.load(f"{server.url}two/", offline=True) as weights:
        assert_same(weights, arrays)
    assert ndcache.delete(f"{server.url}two/") >= 4 * NBYTES


def test_an_md5_of_another_server_is_not_believed_but_a_sha256_is(
    tmp_path: Path, arrays: dict[str, Any], serve: Serve
) -> None:
    first, second = serve(tmp_path / "www"), serve(tmp_path / "www")
    shards = sorted((tmp_path / "www/one").glob("*.bin"))
    digests = {
        path.name: "sha256-" + base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for path in shards
    }
    ndcache.fetch(f"{first.url}one/", integrity=digests)
    ndcache.fetch(f"{second.url}one/")
    assert len(second.shard_requests()) >= 4
    requests = len(second.shard_requests())
    with ndcache.load(f"{second.url}two/", integrity=digests, files=False) as weights:
        assert_same(weights, arrays)
    assert len(second.shard_requests()) == requests


def damage(path: Path) -> None:
    """Change a byte in place, without a trace in the file's time."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(99)
        file.write(b"\x00damaged")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    data = bytes(path.stat().st_size)
    path.unlink()
    path.write_bytes(data)


def replace_by_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize("change", [damage, replace, replace_by_link, lambda path: os.truncate(path, 99), Path.unlink])
def test_row_104_a_file_that_is_not_what_it_was_is_never_linked(
    change: Callable[[Path], None], tmp_path: Path, arrays: dict[str, Any], serve: Serve
) -> None:
    server = serve(tmp_path / "www")
    one = ndcache.fetch(f"{server.url}one/", files=False)
    change(one / "params_shard_1.bin")
    before = {path: path.read_bytes() for path in one.glob("*.bin")}
    with ndcache.load(f"{server.url}two/", files=False) as weights:
        assert_same(weights, arrays)
    assert [request.path for request in server.shard_requests()[4:]] == ["/two/params_shard_1.bin"]
    assert {path: path.read_bytes() for path in one.glob("*.bin")} == before


def test_row_104_without_digests_only_an_unchanged_file_is_linked(
    tmp_path: Path, arrays: dict[str, Any], serve: Serve
) -> None:
    server = serve(tmp_path / "www")
    one = ndcache.fetch(f"{server.url}one/", files=False)
    os.utime(one / "params_shard_1.bin")
    with ndcache.load(f"{server.url}two/", files=False, verify="never") as weights:
        assert_same(weights, arrays)
    assert [request.path for request in server.shard_requests()[4:]] == ["/two/params_shard_1.bin"]


def test_row_105_setting_one_aside_leaves_the_other(tmp_path: Path, arrays: dict[str, Any], serve: Serve) -> None:
    server = serve(tmp_path / "www")
    one, two = (ndcache.fetch(f"{server.url}{name}/", files=False) for name in ("one", "two"))
    replace(two / "params_shard_1.bin")
    assert ndcache.verify(f"{server.url}two/").bad == ("params_shard_1.bin",)
    assert ndcache.verify(f"{server.url}one/").ok
    with ndcache.load(f"{server.url}two/", files=False) as weights:
        assert_same(weights, arrays)
    assert len(server.shard_requests()) == 4, "it is linked again"
    assert inodes(one) == inodes(two)


def test_row_105_a_file_damaged_under_both_names_is_downloaded_for_both(
    tmp_path: Path, arrays: dict[str, Any], serve: Serve
) -> None:
    server = serve(tmp_path / "www")
    one, _ = (ndcache.fetch(f"{server.url}{name}/", files=False) for name in ("one", "two"))
    damage(one / "params_shard_1.bin")
    for name in ("one", "two"):
        assert ndcache.verify(f"{server.url}{name}/").bad == ("params_shard_1.bin",)
        with ndcache.load(f"{server.url}{name}/", files=False) as weights:
            assert_same(weights, arrays)
    assert len(server.shard_requests()) == 5, "the second is linked to the first again"


def test_without_hard_links_the_file_is_copied(
    tmp_path: Path, arrays: dict[str, Any], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "link", link)
    server = serve(tmp_path / "www")
    one, two = (ndcache.fetch(f"{server.url}{name}/", files=False) for name in ("one", "two"))
    assert len(server.shard_requests()) == 4
    assert not set(inodes(one)) & set(inodes(two))
    damage(one / "params_shard_1.bin")
    assert ndcache.verify(f"{server.url}two/").ok


def test_helper_processes_link_too(tmp_path: Path, arrays: dict[str, Any], serve: Serve) -> None:
    server = serve(tmp_path / "www")
    ndcache.fetch(f"{server.url}one/", files=False)
    with ndcache.load(f"{server.url}two/", files=False, processes=2) as weights:
        assert_same(weights, arrays)
    assert len(server.shard_requests()) == 4


def test_a_warm_load_does_not_read_the_index(
    tmp_path: Path, arrays: dict[str, Any], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(tmp_path / "www")
    ndcache.fetch(f"{server.url}one/", files=False)
    monkeypatch.setattr(DigestIndex, "_read", lambda index: pytest.fail("the index was read"))
    with ndcache.load(f"{server.url}one/", files=False) as weights:
        assert_same(weights, arrays)


def test_a_directory_of_the_users_gets_no_links(tmp_path: Path, arrays: dict[str, Any], serve: Serve) -> None:
    server = serve(tmp_path / "www")
    one = ndcache.fetch(f"{server.url}one/", files=False)
    mine = ndcache.fetch(f"{server.url}two/", files=False, local_dir=tmp_path / "mine")
    assert not set(inodes(one)) & set(inodes(mine))


def test_a_full_disk_is_no_obstacle_to_links(
    tmp_path: Path, arrays: dict[str, Any], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(tmp_path / "www")
    ndcache.fetch(f"{server.url}one/", files=False)
    monkeypatch.setattr("ndcache.store.cleanup.free_bytes", lambda directory: 1)
    with ndcache.load(f"{server.url}two/", files=False) as weights:
        assert_same(weights, arrays)
