"""What killed processes leave of companion files; row 25 of docs/faults.rst."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ndcache
from ndcache.companions.publish import publish, writing
from ndcache.errors import ConnectError
from ndcache.store.directory import ModelDirectory

from ..helpers.companions import mlc_model
from ..helpers.loads import partial_files
from ..helpers.servers import FileServer

Serve = Callable[..., FileServer]
RANDOM = "0123456789abcdef"


@pytest.fixture
def server(tmp_path: Path, serve: Serve) -> FileServer:
    mlc_model(tmp_path / "model")
    return serve(tmp_path / "model")


def leave(directory: Path, *names: str) -> None:
    """Write what a process leaves that is killed before others write the same."""
    for name in names:
        path = directory / ".ndcache" / "parts" / f"{name}.{RANDOM}"
        path.write_text("half")
        os.utime(path, (time.time() - 2, time.time() - 2))


def test_row_25_a_companion_that_another_process_fetched_leaves_nothing(server: FileServer) -> None:
    directory = ndcache.fetch(server.url)
    leave(directory, "tokenizer.json")
    (directory / "tokenizer.json").unlink()
    ndcache.fetch(server.url)
    assert partial_files(directory) == []


def test_row_25_notes_that_another_process_wrote_leave_nothing(server: FileServer) -> None:
    directory = ndcache.fetch(server.url)
    leave(directory, "tokenizer.json.json", "params_shard_0.bin.json", "companions.json", "source.json")
    leave(directory, "absent.json", "tokenizer_config.json.json")
    fresh = directory / ".ndcache" / "parts" / f"tokenizer_config.json.json.{RANDOM}"
    os.utime(fresh)  # somebody may be writing it
    ndcache.load(server.url).close()
    assert {path.name for path in partial_files(directory)} == {f"absent.json.{RANDOM}", fresh.name}


def test_the_last_writer_of_a_companion_removes_what_others_left(tmp_path: Path) -> None:
    name, cache = "tokenizer.json", ModelDirectory(tmp_path / "scope" / "model", "https://host/model/")

    @contextlib.contextmanager
    def written(data: bytes) -> Iterator[None]:
        with writing(cache, name), cache.partials.create(name) as partial:
            partial.hasher.add("sha256", lambda: None)
            partial.write(data)
            yield
            publish(cache, partial, name, etag=None, last_modified=None)

    with written(b"one"):
        leave(cache.directory, name)
        with written(b"two"):
            pass
        assert cache.read(name, 100) == b"two"
        assert len(partial_files(cache.directory)) == 2, "the first writer and a killed one"
    assert cache.read(name, 100) == b"one"
    assert partial_files(cache.directory) == []
    assert list(cache.layout.locks.entries()) == []


def test_a_writer_that_fails_keeps_what_others_left(tmp_path: Path) -> None:
    name, cache = "tokenizer.json", ModelDirectory(tmp_path / "scope" / "model", "https://host/model/")
    with pytest.raises(ConnectError), writing(cache, name), cache.partials.create(name):
        leave(cache.directory, name)
        raise ConnectError("the cable was pulled")
    assert [path.name for path in partial_files(cache.directory)] == [f"{name}.{RANDOM}"]
    assert list(cache.layout.locks.entries()) == []
