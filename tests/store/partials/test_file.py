"""Partial files: when there is a note about one."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.store.directory import ModelDirectory
from ndcache.store.partials import file as partial_module
from ndcache.store.partials.file import PartialFile

NAME = "params_shard_0.bin"
SMALL, LARGE = bytes(16 << 10), bytes((16 << 10) + 1)


@pytest.fixture
def cache(tmp_path: Path) -> ModelDirectory:
    return ModelDirectory(tmp_path / "cache" / "default" / "model", "http://host/")


def note(cache: ModelDirectory) -> dict[str, Any] | None:
    """Return the only note about a partial file, or None."""
    found = [path for path in cache.layout.partials.path.iterdir() if path.suffix == ".json"]
    if not found:
        return None
    (path,) = found
    content = json.loads(path.read_bytes())
    assert isinstance(content, dict)
    return content


def begin(partial: PartialFile, data: bytes) -> None:
    partial.set_source("http://host/params_shard_0.bin", '"1"', "content", None)
    partial.write(data)


def test_a_small_file_gets_no_note_before_it_is_published(cache: ModelDirectory) -> None:
    with cache.partials.create(NAME) as partial:
        begin(partial, SMALL)
        assert note(cache) is None
        cache.publish(partial, NAME, content_id="content").close()
    assert list(cache.layout.partials.path.iterdir()) == []
    assert cache.path(NAME).read_bytes() == SMALL


@pytest.mark.parametrize("error", [ndcache.StallError("too slow"), KeyboardInterrupt()])
def test_a_small_file_that_is_left_behind_gets_a_note(cache: ModelDirectory, error: BaseException) -> None:
    with pytest.raises(type(error)), cache.partials.create(NAME) as partial:
        begin(partial, SMALL)
        raise error
    assert note(cache) == {**(note(cache) or {}), "etag": '"1"', "claim": "content"}


def test_a_larger_file_gets_its_note_at_once(cache: ModelDirectory) -> None:
    with cache.partials.create(NAME) as partial:
        begin(partial, LARGE)
        assert note(cache) is not None
        partial.source = None  # leave nothing


def test_a_growing_file_gets_its_note_before_it_is_large(cache: ModelDirectory) -> None:
    with cache.partials.create(NAME) as partial:
        begin(partial, SMALL)
        assert note(cache) is None
        partial.write(b"x")
        assert note(cache) is not None
        partial.source = None


def test_a_file_without_a_source_is_not_left_behind(cache: ModelDirectory) -> None:
    with pytest.raises(ndcache.StallError), cache.partials.create(NAME) as partial:
        partial.write(SMALL)
        raise ndcache.StallError("too slow")
    assert list(cache.layout.partials.path.iterdir()) == []


def test_a_copy_has_its_note_before_the_original_is_removed(
    cache: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = ndcache.Shard(NAME, len(LARGE), None, None, "raw-shard", ())
    with pytest.raises(ndcache.StallError), cache.partials.create(NAME) as partial:
        begin(partial, SMALL)
        raise ndcache.StallError("too slow")
    removed: list[dict[str, Any] | None] = []
    (original,) = cache.partials.find(NAME)

    with cache.partials.create(NAME) as partial:
        noted = cache.layout.partials.path / f"{partial.file_name}.json"

        def remove(folder: Any, file_name: str) -> None:
            assert file_name == original
            removed.append(json.loads(noted.read_bytes()))

        monkeypatch.setattr("ndcache.store.partials.folder.remove_partial", remove)
        cache.partials.copy_longest(partial, shard, "content", lambda: None, is_checked=True, is_exclusive=True)
        monkeypatch.undo()
        assert partial.nbytes == len(SMALL)
    assert len(removed) == 1


@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="the system has no fdatasync")
def test_much_of_a_file_is_written_to_the_disk_before_it_is_complete(
    cache: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_module, "_WRITE_BACK_BYTES", 100)
    synced: list[tuple[int, int]] = []

    def fail(handle: int) -> None:
        synced.append((handle, os.fstat(handle).st_ino))
        partial.write_back()  # as another thread may do meanwhile
        raise OSError(errno.EIO, "the sync before publishing must report this, too")

    monkeypatch.setattr(os, "fdatasync", fail)
    with cache.partials.create(NAME) as partial:
        begin(partial, bytes(99))
        partial.write_back()
        assert synced == []
        partial.write(bytes(1))
        partial.write_back()
        partial.write_back()
        ((handle, inode),) = synced
        assert inode == os.fstat(partial.file.fileno()).st_ino
        assert handle != partial.file.fileno(), "each file object gets an error of the disk once"
        cache.publish(partial, NAME, content_id="content").close()
    assert cache.path(NAME).read_bytes() == bytes(100)
