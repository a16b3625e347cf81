"""Partial files that one writer hands over to the next, as the tasks of a cluster do."""

from __future__ import annotations

from pathlib import Path

import pytest

from ndcache.errors import CacheUnavailableError, UnsafeCacheError
from ndcache.store.directory import ModelDirectory


@pytest.fixture
def cache(tmp_path: Path) -> ModelDirectory:
    return ModelDirectory(tmp_path / "scope" / "model")


def begin(cache: ModelDirectory, data: bytes) -> str:
    """Leave a partial file, and return its name."""
    with cache.partials.create("x.bin") as partial:
        partial.set_source("peers", '"peers"', "content", None)
        partial.write(data)
        return partial.file_name


def test_the_next_writer_appends(cache: ModelDirectory) -> None:
    name = begin(cache, b"abc")
    with cache.partials.reopen("x.bin", name) as partial:
        assert (partial.nbytes, partial.file_name) == (3, name)
        assert partial.source is not None
        partial.write_at(memoryview(b"def"), 3)
        partial.hasher.add("md5", lambda: None)
        partial.hasher.catch_up(lambda: None, wait=True)
        cache.publish(partial, "x.bin", content_id="content").close()
    assert cache.read("x.bin", 10) == b"abcdef"
    assert cache.partials.find("x.bin") == []
    metadata = cache.metadata("x.bin")
    assert metadata is not None
    assert metadata.digests == {"md5": "e80b5017098950fc58aad83c8c14978e"}


def test_one_that_is_gone(cache: ModelDirectory) -> None:
    name = begin(cache, b"abc")
    cache.partials.remove(name)
    with pytest.raises(CacheUnavailableError), cache.partials.reopen("x.bin", name):
        pass


def test_a_link_in_its_place_is_not_followed(cache: ModelDirectory, tmp_path: Path) -> None:
    name, victim = begin(cache, b"abc"), tmp_path / "victim"
    victim.write_bytes(b"abc")
    (cache.partials.folder.path / name).unlink()
    (cache.partials.folder.path / name).symlink_to(victim)
    with pytest.raises((UnsafeCacheError, CacheUnavailableError)), cache.partials.reopen("x.bin", name):
        pass
    assert victim.read_bytes() == b"abc"


def test_what_has_holes_is_not_appended_to(cache: ModelDirectory) -> None:
    with cache.partials.create("x.bin") as partial:
        partial.set_source("peers", '"peers"', "content", None)
        partial.write_at(b"def", 3)
        name = partial.file_name
    with cache.partials.reopen("x.bin", name) as partial:
        assert partial.nbytes == 0
        assert partial.source is None


def test_the_bytes_before_the_first_hole_are_kept(cache: ModelDirectory) -> None:
    with cache.partials.create("x.bin") as partial:
        partial.set_source("peers", '"peers"', "content", None)
        partial.write_at(b"abc", 0)
        partial.write_at(b"ghi", 6)
        partial.keep_prefix(2)
        name = partial.file_name
    with cache.partials.reopen("x.bin", name) as partial:
        assert partial.nbytes == 2
        partial.write_at(b"cd", 2)
        partial.hasher.add("md5", lambda: None)
        partial.hasher.catch_up(lambda: None, wait=True)
        assert partial.hasher.hexdigest("md5") == "e2fc714c4727ee9395f324cd2e7f331f"
