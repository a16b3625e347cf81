"""`verify` while other processes change the cache, in a read-only cache, and with files that cannot be read."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ndcache
from ndcache.cli import commands as cli
from ndcache.format import integrity
from ndcache.sources import model, verifier

from ..helpers import models
from ..helpers.servers import FileServer

Serve = Callable[..., FileServer]
SHARDS = 4


def name(index: int) -> str:
    return f"params_shard_{index}.bin"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    models.simple_model(tmp_path / "model", SHARDS)
    return tmp_path / "model"


@pytest.fixture
def server(source: Path, serve: Serve) -> FileServer:
    return serve(source)


def update(source: Path, *, longer: int = 0) -> None:
    """Write another version of the model: of the same size, or with longer shards."""
    arrays = [{f"layer.{i}": models.random_array(((1 << 14) + longer,), seed=100 + i)} for i in range(SHARDS)]
    models.write_model(source, arrays)


def at_each_check(monkeypatch: pytest.MonkeyPatch, happens: Callable[[int, Any], None]) -> None:
    """Call `happens` before each cached file is read, with the number of files read before, and the file."""
    find_mismatch, lock, calls = integrity.find_mismatch, threading.Lock(), iter(range(10**6))

    def spy(file: Any, *args: Any) -> Any:
        with lock:
            happens(next(calls), file)
        return find_mismatch(file, *args)

    monkeypatch.setattr(verifier, "find_mismatch", spy)


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the system calls refuse to write, as root may write anywhere."""
    real = os.open

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def open_to_read(path: Any, flags: int, *args: Any, **options: Any) -> int:
        return refuse() if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", open_to_read)
    for call in ("replace", "unlink", "mkdir"):
        monkeypatch.setattr(os, call, refuse)


# --- other processes at work


@pytest.mark.parametrize("in_place", [False, True])
def test_row_60_shards_deleted_during_verify_are_missing(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    directory = ndcache.fetch(server.url)

    def delete(call: int, file: Any) -> None:
        if call == 0 and in_place:
            for path in directory.glob("*.*"):
                path.unlink() if path.is_file() else None
        elif call == 0:
            ndcache.delete(server.url)

    at_each_check(monkeypatch, delete)
    report = ndcache.verify(server.url, max_workers=1)
    assert (report.bad, list(report.checked), len(report.missing)) == ((), [name(0)], SHARDS - 1)


@pytest.mark.parametrize("longer", [0, 100])
@pytest.mark.parametrize("when", [0, 2, SHARDS - 1])
def test_row_60_a_model_updated_during_verify_is_verified_again(
    server: FileServer, source: Path, monkeypatch: pytest.MonkeyPatch, when: int, longer: int
) -> None:
    directory = ndcache.fetch(server.url)

    def change(call: int, file: Any) -> None:
        if call == when:
            update(source, longer=longer)
            with contextlib.closing(ndcache.load(server.url)):
                pass

    at_each_check(monkeypatch, change)
    report = ndcache.verify(server.url, max_workers=1)
    assert report.bad == ()
    assert {*report.checked, *report.missing} == {name(index) for index in range(SHARDS)}
    if when < SHARDS - 1:
        assert len(report.checked) == SHARDS
    assert not (directory / ".ndcache" / "aside").exists()
    assert len(ndcache.verify(server.url).checked) == SHARDS


def test_row_60_a_shard_published_without_metadata_yet_is_not_bad(server: FileServer, source: Path) -> None:
    """Its metadata come a moment later: until then, only the manifest tells that there is another version."""
    directory = ndcache.fetch(server.url)
    before = ndcache.read_manifest(server.url)
    with ndcache.Loader(offline=True) as loader, loader._resources.open_model(server.url, threads=1) as (opened, _):
        update(source)
        ndcache.fetch(server.url)
        for path in (directory / ".ndcache" / "validators").glob("params*"):
            path.unlink()
        found = [opened.check(shard) for shard in before.shards]
    assert found == [model.Flaw.OF_ANOTHER_VERSION] * SHARDS
    assert len(ndcache.verify(server.url).checked) == SHARDS


def test_row_60_a_bad_file_replaced_during_verify_is_read_again(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = ndcache.fetch(server.url)
    (directory / name(0)).write_bytes(b"\0" * (1 << 16))

    def repair(call: int, file: Any) -> None:
        if call == 0:
            (directory / name(0)).unlink()
            ndcache.fetch(server.url)

    at_each_check(monkeypatch, repair)
    report = ndcache.verify(server.url, max_workers=1)
    assert (report.bad, len(report.checked)) == ((), SHARDS)


# --- files that cannot be written or read


def test_row_60_bad_shards_in_a_read_only_cache_are_kept(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = ndcache.fetch(server.url)
    for index, data in ((1, b"\0" * (1 << 16)), (2, b"cut")):
        (directory / name(index)).write_bytes(data)
    read_only(monkeypatch)
    with caplog.at_level(logging.WARNING, "ndcache"):
        report = ndcache.verify(server.url)
    assert (report.bad, report.kept, len(report.checked)) == ((name(1), name(2)), (name(1), name(2)), 2)
    assert {name(1), name(2)} <= {word for record in caplog.records for word in record.getMessage().split()}
    result = CliRunner().invoke(cli.main, ["verify", server.url])
    assert result.exit_code == 1
    assert "2 could not be set aside" in result.output
    with pytest.raises(ndcache.OfflineError) as caught:
        ndcache.load(server.url, verify="always", offline=True, names=["layer.1", "layer.3"])
    assert caught.value.missing == (name(1),)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_row_60_a_shard_that_cannot_be_read_is_bad_and_the_others_are_checked(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    ndcache.fetch(server.url)

    def fail(call: int, file: Any) -> None:
        if file.name.endswith(name(1)):
            raise OSError(number, os.strerror(number))

    at_each_check(monkeypatch, fail)
    report = ndcache.verify(server.url)
    assert (report.bad, len(report.checked)) == ((name(1),), SHARDS - 1)
    with pytest.raises(ndcache.CacheUnavailableError) as caught:
        ndcache.load(server.url, verify="always", offline=True)
    assert caught.value.shard == name(1)


def test_row_60_a_shortage_of_descriptors_is_no_fault_of_a_shard(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ndcache.fetch(server.url)

    def fail(call: int, file: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    at_each_check(monkeypatch, fail)
    with pytest.raises(ndcache.CacheUnavailableError) as caught:
        ndcache.verify(server.url, max_workers=1)
    assert caught.value.shard == name(0)


def test_row_60_shards_in_a_local_directory_are_missing_or_bad(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / name(0)).unlink()
    (source / name(1)).unlink()
    (source / name(1)).mkdir()
    (source / name(2)).unlink()
    os.mkfifo(source / name(2))
    report = ndcache.verify(source)
    assert (report.bad, report.missing, list(report.checked)) == ((name(1), name(2)), (name(0),), [name(3)])


def test_row_60_rm_continues_after_a_source_that_fails(server: FileServer, tmp_path: Path) -> None:
    directory = ndcache.fetch(server.url)
    sources = ["hf://a", str(tmp_path / "elsewhere"), "http://[", server.url]
    result = CliRunner().invoke(cli.main, ["rm", *sources])
    assert result.exit_code == 1
    assert result.output.count("error: ") == 3
    assert "freed" in result.output
    assert not directory.exists()
