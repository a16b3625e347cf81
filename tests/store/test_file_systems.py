"""Real file systems, which lack some calls and do others in their own ways."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache.format.integrity import find_mismatch
from ndcache.format.paths import flatten, unflatten
from ndcache.sources import verifier
from ndcache.store.directory import ModelDirectory
from ndcache.store.housekeeping.sizes import disk_bytes
from ndcache.store.metadata import FileMetadata

from ..helpers import models
from ..helpers.disks import mounted
from ..helpers.servers import FileServer

Serve = Callable[..., FileServer]
SHARD = "params_shard_0.bin"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    models.simple_model(tmp_path / "model", shards=3)
    return tmp_path / "model"


@pytest.fixture
def server(model: Path, serve: Serve) -> FileServer:
    return serve(model)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each file of the cache is added whose digests are computed."""
    found: list[str] = []

    def spy(file: Any, *args: Any) -> Any:
        found.append(os.path.basename(file.name))
        return find_mismatch(file, *args)

    monkeypatch.setattr(verifier, "find_mismatch", spy)
    return found


def load(url: str, **options: Any) -> dict[str, Any]:
    with contextlib.closing(ndcache.load(url, **options)) as weights:
        return {name: array.copy() for name, array in weights.items()}


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int, when: Callable[..., bool]) -> None:
    """Make a system call fail with this error for some of its arguments."""
    real = getattr(os, name)

    def call(*args: Any, **options: Any) -> Any:
        if when(*args, **options):
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    monkeypatch.setattr(os, name, call)


# --- fsync, rename, statvfs


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_row_58_a_file_system_without_fsync_is_used(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing(monkeypatch, "fsync", number, lambda handle: True)
    assert len(load(server.url)) == 3
    load(server.url, names="layer.1", verify="always", offline=True)


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, "Unavailable"), (errno.ENOSPC, "DiskFull")])
def test_row_58_an_fsync_that_fails_is_an_error(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, number: int, kind: str
) -> None:
    failing(monkeypatch, "fsync", number, lambda handle: stat.S_ISREG(os.fstat(handle).st_mode))
    with pytest.raises(ndcache.CacheError) as caught:
        ndcache.fetch(server.url, retries=0)
    assert kind in type(caught.value).__name__
    assert caught.value.shard is not None


def test_row_58_what_a_failing_disk_cannot_keep_is_loaded_into_memory(
    server: FileServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "fsync", errno.EIO, lambda handle: stat.S_ISREG(os.fstat(handle).st_mode))
    with pytest.warns(RuntimeWarning, match="Input/output error"):
        arrays = load(server.url, retries=0)
    models.assert_same(arrays, load(str(model)))


def no_rename(source: Any, target: Any, *, src_dir_fd: Any, dst_dir_fd: Any) -> bool:
    """Return whether a call renames a folder, or moves a file to another folder."""
    is_folder = stat.S_ISDIR(os.stat(source, dir_fd=src_dir_fd, follow_symlinks=False).st_mode)
    folders = [os.readlink(f"/proc/self/fd/{handle}") for handle in (src_dir_fd, dst_dir_fd)]
    return is_folder or folders[0] != folders[1]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc to see folders by their descriptors")
def test_row_58_a_file_system_without_renames_between_folders_is_used(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
) -> None:
    failing(monkeypatch, "replace", errno.EXDEV, no_rename)
    arrays = load(server.url)
    directory = ndcache.fetch(server.url)
    models.assert_same(load(server.url, offline=True), arrays)
    for name, age in (("0" * 16, 0), ("1" * 16, 7200)):  # one is old enough that its process was killed
        (directory / f".ndcache.{name}").write_bytes(b"half")
        os.utime(directory / f".ndcache.{name}", (time.time() - age, time.time() - age))
    ndcache.fetch(server.url)
    (left,) = directory.glob(".ndcache.*")
    assert left.name.endswith("0")
    left.unlink()
    assert sorted(path.name for path in directory.iterdir()) == sorted([".ndcache", "tensor-cache.json", *shards(3)])
    (directory / SHARD).write_bytes(b"\0" * (1 << 16))
    assert ndcache.verify(server.url).bad == (SHARD,)
    assert not (directory / SHARD).exists()
    models.assert_same(load(server.url), arrays)
    assert ndcache.delete(server.url) > 3 << 16
    assert not directory.exists()


def shards(count: int) -> list[str]:
    return [f"params_shard_{index}.bin" for index in range(count)]


def test_row_58_a_model_that_cannot_be_renamed_loses_its_manifest_first(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, removed = ndcache.fetch(server.url), []
    failing(monkeypatch, "replace", errno.EXDEV, lambda *_, **__: True)
    unlink = os.unlink

    def spy(name: Any, **folder: Any) -> None:
        if directory.exists():  # otherwise it is the note about its use
            removed.append(name)
            assert (directory / ".ndcache").is_dir()
            assert removed[0] == "tensor-cache.json"
        unlink(name, **folder)

    monkeypatch.setattr(os, "unlink", spy)
    assert ndcache.delete(server.url) > 3 << 16
    assert set(shards(3)) <= set(removed)
    assert removed[-1] == "source.json"
    assert not directory.exists()


def test_row_58_delete_says_what_it_freed_when_something_cannot_be_deleted(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = ndcache.fetch(server.url)
    with monkeypatch.context() as patch:
        failing(patch, "replace", errno.EBUSY, lambda *_, **__: True)
        failing(patch, "unlink", errno.EPERM, lambda name, **_: name == SHARD)
        with pytest.raises(ndcache.CacheUnavailableError, match="only in part") as caught:
            ndcache.delete(server.url)
    error = caught.value
    assert isinstance(error.received, int)
    assert isinstance(error.expected, int)
    assert 2 << 16 <= error.received <= error.expected - (1 << 16)
    assert not ndcache.is_cached(server.url)
    assert [path.name for path in directory.glob("*.*")] == [".ndcache", SHARD]
    assert ndcache.delete(server.url) >= 1 << 16  # it still counts as ndcache's
    assert ndcache.delete(server.url) == 0


@pytest.mark.once
def test_row_58_a_model_of_a_lower_layer_of_overlayfs_is_used_updated_and_deleted(
    model: Path, serve: Serve, tmp_path: Path
) -> None:
    """Containers see a model that came with their image like this."""
    arrays = models.simple_model(model, shards=3)
    url = serve(model).url
    with mounted(tmp_path / "disk") as disk:  # its number may be that of the next file system that is mounted
        ndcache.load(url, cache_dir=disk).close()
    ndcache.fetch(url, cache_dir=tmp_path / "lower" / "cache")
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(tmp_path / "merged")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("overlayfs cannot be mounted here")
    try:
        cache_dir = tmp_path / "merged" / "cache"
        models.assert_same(load(url, cache_dir=cache_dir, offline=True), arrays)
        with ndcache.load(url, cache_dir=cache_dir, offline=True):  # a map alone would not hold its lock
            assert ndcache.cache.prune(keep_last=0, cache_dir=cache_dir).removed == ()
        models.write_model(model, [{name: array + 1} for name, array in arrays.items()])
        models.assert_same(load(url, cache_dir=cache_dir), {name: array + 1 for name, array in arrays.items()})
        assert ndcache.delete(url, cache_dir=cache_dir) > 3 << 16
        assert not ndcache.is_cached(url, cache_dir=cache_dir)
        assert list(cache_dir.glob("[!.]*/*")) == []
        load(url, cache_dir=cache_dir)
        assert ndcache.verify(url, cache_dir=cache_dir).ok
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "merged")], check=True)


@pytest.mark.once
def test_row_58_a_dry_run_knows_that_nothing_can_be_deleted_on_a_read_only_disk(
    server: FileServer, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk") as disk:
        directory = ndcache.fetch(server.url, cache_dir=disk)
        (directory / ".ndcache" / "aside").mkdir()
        (directory / ".ndcache" / "aside" / SHARD).write_bytes(b"bad")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        reports = [
            ndcache.cache.prune(**rule, cache_dir=disk, dry_run=is_dry)
            for rule in ({"keep_last": 0}, {"aside": True})
            for is_dry in (True, False)
        ]
    assert [(report.removed, report.cleaned, report.freed, len(report.failed)) for report in reports] == [
        ((), (), 0, 1)
    ] * 4


def test_row_122_verify_goes_on_after_a_model_that_cannot_be_read(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (ndcache.fetch(server.url, scope=scope) for scope in ("default", "other"))
    failing(monkeypatch, "open", errno.EACCES, lambda path, *_, **__: str(path) == str(first / "tensor-cache.json"))
    found = {model.path: report for model, report in ndcache.cache.verify()}
    assert (found[first].bad, found[first].kept) == (("tensor-cache.json",),) * 2
    assert found[second].complete


@pytest.mark.parametrize("answer", [(0, 0, 0), (1 << 40, 1 << 40, 0), OSError(errno.ENOSYS, "no statvfs")])
def test_row_58_unknown_free_space_is_no_reason_to_refuse(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    def usage(path: Any) -> Any:
        if isinstance(answer, OSError):  # a new one, as an error that was raised keeps its frames alive
            raise OSError(answer.errno, answer.strerror)
        return shutil._ntuple_diskusage(*answer)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert len(load(server.url)) == 3


def test_row_58_without_sizes_on_disk_the_sizes_of_files_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5000)
    lstat = os.lstat
    monkeypatch.setattr(os, "lstat", lambda *args, **options: changed(lstat(*args, **options), st_blocks=0))
    assert disk_bytes(tmp_path) == 5000


# --- inodes and times


#: Fields of `os.stat_result`: the first ones of the tuple, and those that only have a name.
FIRST = ("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_size")
NAMED = [name for name in dir(os.stat_result) if name.startswith("st_") and name not in FIRST]


def changed(status: os.stat_result, **fields: int) -> os.stat_result:
    """Return the same status with other values in some fields."""
    values = [fields.get(name, getattr(status, name)) for name in FIRST]
    named = {name: fields.get(name, getattr(status, name)) for name in NAMED}
    return os.stat_result([*values, *tuple(status)[7:10]], named)


@pytest.fixture
def _unstable_inodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a file another inode number at each call, as some network file systems and FUSE do."""
    for name in ("lstat", "fstat", "stat"):
        real = getattr(os, name)

        def call(*args: Any, real: Any = real, **options: Any) -> os.stat_result:
            return changed(real(*args, **options), st_ino=random.getrandbits(60))

        monkeypatch.setattr(os, name, call)


@pytest.mark.usefixtures("_unstable_inodes")
def test_row_58_unstable_inode_numbers_do_no_harm(server: FileServer, hashed: list[str]) -> None:
    arrays = load(server.url)
    directory = ndcache.fetch(server.url)
    models.assert_same(load(server.url), arrays)
    assert hashed == []  # what was published is remembered
    assert ndcache.verify(server.url).ok
    os.utime(directory / SHARD, (1, 1))
    hashed.clear()
    models.assert_same(load(server.url), arrays)
    models.assert_same(load(server.url), arrays)
    assert hashed == [SHARD]
    (directory / SHARD).write_bytes(b"\0" * (1 << 16))
    assert ndcache.verify(server.url).bad == (SHARD,)
    models.assert_same(load(server.url), arrays)
    assert ndcache.delete(server.url) > 0
    assert not directory.exists()


def test_row_58_unstable_times_do_not_make_a_load_wait_for_ever(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new time looks like a file that somebody else has just published."""
    arrays, clock = load(server.url), iter(range(10**6, 10**9))
    ndcache.delete(server.url)
    for name in ("lstat", "fstat"):
        real = getattr(os, name)

        def call(*args: Any, real: Any = real, **options: Any) -> os.stat_result:
            return changed(real(*args, **options), st_mtime_ns=next(clock), st_ctime_ns=next(clock))

        monkeypatch.setattr(os, name, call)
    for _ in range(2):
        models.assert_same(load(server.url), arrays)


def coarse(directory: Path, unit: int) -> None:
    """Round down the times of all files to a unit."""
    for path in directory.rglob("*"):
        times = path.stat()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns - times.st_mtime_ns % unit))


@pytest.mark.parametrize("unit", [100, 1000, 10**6, 10**9, 2 * 10**9])
def test_row_58_times_in_coarse_units_cost_no_check(server: FileServer, hashed: list[str], unit: int) -> None:
    arrays, directory = load(server.url), ndcache.fetch(server.url)
    coarse(directory, unit)
    models.assert_same(load(server.url, offline=True), arrays)
    assert hashed == []


@pytest.mark.parametrize(
    ("noted", "now", "is_same"),
    [
        (1_500_000_000, 1_500_000_000, True),
        (1_500_000_001, 1_000_000_000, True),
        (3_500_000_001, 2_000_000_000, True),
        (1_500_000_001, 2_000_000_000, False),  # another second
        (1_567_890_123, 1_567_000_000, True),
        (1_567_890_123, 1_566_000_000, False),
        (1_567_890_123, 1_567_890_100, True),
        (1_567_890_123, 1_567_890_124, False),
        (1_000_000_000, 1_500_000_000, False),  # finer than the noted one
        (1_500_000_001, 1, False),
    ],
)
def test_row_58_a_truncated_time_counts_as_the_same(tmp_path: Path, noted: int, now: int, is_same: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    os.utime(path, ns=(now, now))
    assert FileMetadata(3, noted).is_unchanged(path.stat()) is is_same
    assert not FileMetadata(4, noted).is_unchanged(path.stat())


def test_row_58_files_whose_times_were_changed_cost_one_check(server: FileServer, hashed: list[str]) -> None:
    """In some images all files have the same time."""
    arrays, directory = load(server.url), ndcache.fetch(server.url)
    for path in directory.rglob("*"):
        os.utime(path, (1, 1))
    for _ in range(3):
        models.assert_same(load(server.url, offline=True), arrays)
    assert sorted(hashed) == shards(3)


def test_row_58_checks_that_cannot_be_noted_are_logged_once(
    server: FileServer, hashed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arrays, directory = load(server.url), ndcache.fetch(server.url)
    for path in directory.rglob("*"):
        os.utime(path, (1, 1))
    failing(monkeypatch, "open", errno.EROFS, lambda path, flags, *_, **__: bool(flags & os.O_CREAT))
    with caplog.at_level(logging.WARNING, "ndcache"):
        models.assert_same(load(server.url, offline=True), arrays)
    assert [record.getMessage() for record in caplog.records if "each load computes" in record.getMessage()]
    assert len(caplog.records) == 1
    assert sorted(hashed) == shards(3)


# --- names, and files that go


def test_row_58_a_file_system_that_takes_only_short_names_is_used(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
) -> None:
    """The limit of eCryptfs is 143 bytes."""
    names = [f"{letter * 120}.bin" for letter in "ab"]
    (tmp_path / "model").mkdir()
    records = []
    for name in names:
        data = np.arange(4, dtype="float32").tobytes()
        (tmp_path / "model" / name).write_bytes(data)
        record = models.record(name[0], np.arange(4, dtype="float32"), 0)
        records.append({"dataPath": name, "format": "raw-shard", "nbytes": 16, "records": [record]})
        records[-1]["md5sum"] = hashlib.md5(data).hexdigest()
    (tmp_path / "model" / "tensor-cache.json").write_text(json.dumps({"metadata": {}, "records": records}))
    for call in ("open", "replace"):
        failing(
            monkeypatch,
            call,
            errno.ENAMETOOLONG,
            lambda *args, **_: any(len(str(a).split("/")[-1]) > 143 for a in args[:2]),
        )
    url = serve(tmp_path / "model").url
    for _ in range(2):
        assert list(load(url)) == ["a", "b"]
    assert hashed == []
    assert ndcache.verify(url).ok


def test_flat_names_are_unique_and_short() -> None:
    for name in ("a/b.bin", "a%2Fb.bin", "x" * 100):
        assert unflatten(flatten(name)) == name
    long = [f"{'ä' * 60}/{number}" for number in range(3)]
    assert len({flatten(name) for name in long}) == 3
    assert all(len(flatten(name).encode()) <= 100 for name in long)


def test_row_58_a_stale_handle_means_that_a_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ModelDirectory(tmp_path / "scope" / "model")
    failing(monkeypatch, "lstat", errno.ESTALE, lambda path, **_: str(path).endswith("a.bin"))
    cache.directory.mkdir(parents=True)
    assert cache.size("a.bin") is None
    assert cache.read("a.bin", 10) is None


def test_row_58_a_folder_in_the_place_of_a_shard_is_quarantined(server: FileServer) -> None:
    directory = ndcache.fetch(server.url)
    (directory / SHARD).unlink()
    (directory / SHARD / "inner").mkdir(parents=True)
    assert len(load(server.url)) == 3
    assert (directory / SHARD).is_file()
    (aside,) = (directory / ".ndcache" / "aside").iterdir()
    assert (aside / "inner").is_dir()
