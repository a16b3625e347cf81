"""Lock files, and required digests of companion files."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ndcache
from ndcache.cli.commands import main

from ..helpers.models import assert_same, random_array, simple_model
from ..helpers.servers import FileServer

Change = Callable[[dict[str, Any]], object]
NAMES = [
    *("tensor-cache.json", "params_shard_0.bin", "params_shard_1.bin"),
    *("mlc-chat-config.json", "tokenizer.json"),
]


@pytest.fixture
def www(tmp_path: Path) -> Path:
    """Return the directory of a model with a configuration and a tokenizer."""
    simple_model(tmp_path / "www", shards=2)
    (tmp_path / "www" / "mlc-chat-config.json").write_text('{"tokenizer_files": ["tokenizer.json"]}')
    (tmp_path / "www" / "tokenizer.json").write_text("{}")
    return tmp_path / "www"


@pytest.fixture(params=["server", "directory"])
def source(request: pytest.FixtureRequest, www: Path, serve: Callable[[Path], FileServer]) -> str:
    return serve(www).url if request.param == "server" else str(www)


@pytest.fixture
def lock(source: str, tmp_path: Path) -> Path:
    path = tmp_path / "model.lock"
    with ndcache.Loader() as loader:
        loader.lock(source, path)
    return path


def sri(data: bytes) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(data).digest()).decode()


def test_a_lock_names_every_file(www: Path, source: str, lock: Path) -> None:
    value = json.loads(lock.read_text())
    assert value["version"] == 1
    assert list(value["files"]) == NAMES
    for name, entry in value["files"].items():
        data = (www / name).read_bytes()
        assert entry == {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    printed = CliRunner().invoke(main, ["lock", source, "-q"])
    assert printed.stdout == lock.read_text()


def test_a_lock_goes_into_a_pipe(www: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with ndcache.Loader() as loader:
            value = loader.lock(www, tmp_path / "pipe")
        assert json.loads(os.read(reader, 1 << 16)) == value
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("verb", [ndcache.load, ndcache.fetch])
def test_a_model_loads_with_its_lock(source: str, lock: Path, verb: Callable[..., Any]) -> None:
    for _ in range(2):
        result = verb(source, integrity=lock)
    if verb is ndcache.load:
        assert result.stats.integrity == {"sha256": 2}
        assert_same(result, dict(ndcache.load(source)))
    assert CliRunner().invoke(main, ["load", source, "-q", "--lock", str(lock)]).exit_code == 0


@pytest.mark.parametrize("name", NAMES)
def test_row_116_a_file_with_another_digest_is_refused(source: str, lock: Path, name: str) -> None:
    value = json.loads(lock.read_text())
    value["files"][name]["sha256"] = "0" * 64
    lock.write_text(json.dumps(value))
    for cached in (True, False):
        if not cached:
            ndcache.delete(source) if "://" in source else None
        with pytest.raises(ndcache.ChecksumError) as caught:
            ndcache.load(source, integrity=str(lock), retries=0)
        assert caught.value.shard == name
        assert "integrity option" not in str(caught.value)
    result = CliRunner().invoke(main, ["load", source, "-q", "--lock", str(lock), "--retries", "0"])
    assert result.exit_code == 1
    assert "error: " in result.output


@pytest.mark.parametrize("name", NAMES[1:])
def test_row_116_a_file_that_the_lock_does_not_name_is_refused(source: str, lock: Path, name: str) -> None:
    value = json.loads(lock.read_text())
    del value["files"][name]
    lock.write_text(json.dumps(value))
    with pytest.raises(ndcache.IntegrityError, match="the lock does not name it") as caught:
        ndcache.load(source, integrity=lock)
    assert caught.value.shard == name


def test_row_116_a_companion_that_changes_on_disk_is_noticed(source: str, lock: Path) -> None:
    directory = ndcache.fetch(source)
    (directory / "tokenizer.json").write_text('{"changed": true}')
    with pytest.raises(ndcache.ChecksumError):
        ndcache.load(source, integrity=lock)
    assert len(ndcache.load(source, integrity=lock, files=False)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON of the form"),
        ("[]", "not JSON of the form"),
        ('{"version": 2, "files": {}}', "it has version 2, and this ndcache reads 1"),
        ('{"version": 1, "files": {"a": {"sha256": "00"}}}', "'a' is not 64 hex digits"),
        ('{"version": 1, "files": {"a": 1}}', "not JSON of the form"),
    ],
)
def test_row_117_a_damaged_lock_is_an_error(www: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.lock").write_text(text)
    with pytest.raises(ndcache.IntegrityError, match=message):
        ndcache.load(www, integrity=tmp_path / "model.lock")


def test_row_117_a_missing_lock_is_an_error(www: Path, tmp_path: Path) -> None:
    with pytest.raises(ndcache.NotFoundError, match=r"no\.lock cannot be read: No such file"):
        ndcache.load(www, integrity=str(tmp_path / "no.lock"))
    with pytest.raises(ValueError, match="the lock is of another model"):
        (tmp_path / "model.lock").write_text('{"version": 1, "files": {}}')
        ndcache.load(www, integrity=tmp_path / "model.lock")


def test_damaged_bytes_are_never_locked(www: Path, tmp_path: Path) -> None:
    (www / "params_shard_1.bin").write_bytes(bytes(1 << 16))
    with ndcache.Loader() as loader, pytest.raises(ndcache.ChecksumError, match=r"params_shard_1\.bin"):
        loader.lock(www, tmp_path / "model.lock")
    assert not (tmp_path / "model.lock").exists()


def test_digests_of_companions_may_be_required(www: Path, source: str) -> None:
    right, wrong = sri((www / "tokenizer.json").read_bytes()), sri(b"other")
    for _ in range(2):
        assert len(ndcache.load(source, integrity={"tokenizer.json": right})) == 2
        with pytest.raises(ndcache.ChecksumError):
            ndcache.load(source, integrity={"tokenizer.json": wrong})
    with pytest.raises(ndcache.NotFoundError, match=r"'tokenizr\.json', which is not a file of the model"):
        ndcache.load(source, integrity={"tokenizr.json": right})


def test_helper_processes_read_the_lock(www: Path, serve: Callable[[Path], FileServer], tmp_path: Path) -> None:
    url = serve(www).url
    with ndcache.Loader() as loader:
        loader.lock(url, tmp_path / "model.lock")
        loader.delete(url)
    assert len(ndcache.load(url, integrity=tmp_path / "model.lock", processes=2, max_workers=1)) == 2


@pytest.mark.parametrize("form", ["tensor-cache", "safetensors"])
def test_verify_with_the_lock_of_another_model_sets_nothing_aside(
    form: Any, tmp_path: Path, serve: Callable[[Path], FileServer]
) -> None:
    locks = [tmp_path / "mine.lock", tmp_path / "other.lock"]
    for lock in locks:
        arrays = {f"{lock.stem}.{index}": random_array((64, 64)) for index in range(4)}
        ndcache.dump(arrays, tmp_path / "plain", encode="raw", shard_bytes=1 << 14)
        ndcache.convert(tmp_path / "plain", tmp_path / lock.stem, format=form, shard_bytes=1 << 15)
        with ndcache.Loader() as loader:
            loader.lock(tmp_path / lock.stem, lock)
    url = serve(tmp_path / "mine").url
    ndcache.fetch(url)
    with pytest.raises(ndcache.ChecksumError, match="not the version that the lock file names"):
        ndcache.verify(url, integrity=locks[1])
    assert ndcache.verify(url).complete
    assert ndcache.verify(url, integrity=locks[0]).complete


@pytest.fixture
def safetensors(www: Path, tmp_path: Path, serve: Callable[[Path], FileServer]) -> FileServer:
    """Return the server of a safetensors file, whose digest it does not tell."""
    (tmp_path / "one").mkdir()
    ndcache.convert(www, tmp_path / "one" / "model.safetensors")
    return serve(tmp_path / "one")


def test_a_model_that_came_without_its_lock_is_not_downloaded_again(safetensors: FileServer, tmp_path: Path) -> None:
    url, lock = safetensors.url, tmp_path / "model.lock"
    with ndcache.Loader() as loader:
        loader.lock(url, lock)
    assert ndcache.verify(url, integrity=lock).checked == {"model.safetensors": "sha256"}
    for integrity, offline in ((lock, True), (lock, False), (None, False)):
        with ndcache.load(url, integrity=integrity, offline=offline) as weights:
            assert (weights.stats.network_bytes, weights.stats.cache_bytes > 0) == (0, True)


def test_a_file_that_only_the_lock_of_another_version_refuses_is_kept(safetensors: FileServer, tmp_path: Path) -> None:
    url, lock = safetensors.url, tmp_path / "model.lock"
    with ndcache.Loader() as loader:
        value = loader.lock(url)
    value["files"]["model.safetensors"]["sha256"] = hashlib.sha256(b"another version").hexdigest()
    lock.write_text(json.dumps(value))
    report = ndcache.verify(url, integrity=lock)
    assert (report.bad, report.missing) == ((), ("model.safetensors",))
    assert ndcache.verify(url).complete
    with pytest.raises(ndcache.ChecksumError):
        ndcache.load(url, integrity=lock)
    assert ndcache.verify(url).complete


def test_damage_is_set_aside_where_only_the_server_has_told_the_digest(safetensors: FileServer) -> None:
    file = ndcache.fetch(safetensors.url) / "model.safetensors"
    (note,) = file.parent.glob(".ndcache/validators/model.safetensors.json")
    data, status = bytearray(file.read_bytes()), file.stat()
    note.write_text(
        json.dumps(json.loads(note.read_text()) | {"digests": {"sha256": hashlib.sha256(data).hexdigest()}})
    )
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert ndcache.verify(safetensors.url).bad == ("model.safetensors",)
