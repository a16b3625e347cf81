"""Caches that have no place or cannot be written: loads from a server hold their files in memory, and do not fail."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache import tvm
from ndcache.store.inventory import cache_root

from ..helpers import models
from ..helpers.disks import mounted
from ..helpers.models import assert_same
from ..helpers.processes import run_script
from ..helpers.servers import FileServer

Serve = Callable[..., FileServer]
UNKNOWN_USER = 45_123


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check that nothing is left in the working directory."""
    folder = tmp_path / "working"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert list(folder.iterdir()) == []


def _loop(tmp_path: Path) -> str:
    (tmp_path / "loop").symlink_to("loop")
    return str(tmp_path / "loop")


def _file(tmp_path: Path) -> str:
    (tmp_path / "file").write_text("not a directory")
    return str(tmp_path / "file")


#: Places where no cache can be, for root neither.
PLACES: dict[str, Callable[[Path], str]] = {
    "a file": _file,
    "below a file": lambda tmp_path: _file(tmp_path) + "/cache",
    "below a device": lambda tmp_path: os.devnull + "/cache",
    # Looking it up fails, as in a directory that may not be searched; but that would not stop root.
    "a loop of links": _loop,
    "too long a name": lambda tmp_path: str(tmp_path / ("x" * 300)),
    "a home of nobody": lambda tmp_path: "~nobody-has-this-name/cache",
    **({"where nothing can be made": lambda tmp_path: "/proc/cache"} if sys.platform == "linux" else {}),
}


@pytest.fixture(params=PLACES)
def no_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Set NDCACHE_HOME to a place where no cache can be."""
    place = PLACES[request.param](tmp_path)
    monkeypatch.setenv("NDCACHE_HOME", place)
    return place


@contextlib.contextmanager
def warned(*whys: str) -> Iterator[None]:
    """Expect one warning, on a line of this file, that says what to set and why."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    (warning,) = (item for item in caught if item.category is not ResourceWarning)
    assert warning.category is RuntimeWarning
    assert warning.filename == __file__
    for words in ("stays in memory and is not kept", "NDCACHE_HOME", *whys):
        assert words in str(warning.message)


def block(directory: Path) -> None:
    """Make a model's directory accept no more files, by a file in the place of the folder of partial files."""
    shutil.rmtree(directory / ".ndcache" / "parts", ignore_errors=True)
    (directory / ".ndcache" / "parts").write_text("in the way")


def files(directory: Path) -> list[Path]:
    """Return the files of a model, without locks."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.parent.name != "locks")


# --- no place for a cache -----------------------------------------------------------------------------


def test_row_54_a_server_is_loaded_into_memory(
    model: Path, serve: Serve, no_cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    for _ in range(2):
        with warned(no_cache), ndcache.load(server.url) as weights:
            assert_same(weights, arrays)
            assert weights.stats.integrity == {"md5": 4}
            assert not weights["layer.0"].flags.writeable
    assert len(server.shard_requests()) == 8  # nothing was kept
    with warned(no_cache):
        assert_same(dict(ndcache.stream(server.url)), arrays)
    with warned(no_cache):
        assert len(ndcache.read_manifest(server.url)) == 4
    with warned(no_cache), ndcache.load(server.url, cache_dir=no_cache) as weights:
        assert_same(weights, arrays)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.once
def test_row_54_files_in_memory_are_uploaded_to_the_gpu(model: Path, serve: Serve, no_cache: str, gpu: Any) -> None:
    arrays = models.simple_model(model)
    with warned(), ndcache.load(serve(model).url, gpu) as weights:
        assert_same({name: tensor.numpy().view(arrays[name].dtype) for name, tensor in weights.items()}, arrays)


def test_row_54_a_local_directory_needs_no_cache(model: Path, no_cache: str) -> None:
    arrays = models.simple_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(ndcache.load(model), arrays)
        assert_same(dict(ndcache.stream(model)), arrays)
        assert ndcache.fetch(model) == model
        assert ndcache.verify(model).ok
        assert ndcache.is_cached(model)


def test_row_54_verbs_that_must_keep_files_say_what_to_set(
    model: Path, serve: Serve, no_cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    models.simple_model(model)
    server = serve(model)
    with pytest.raises(ndcache.CacheUnavailableError, match="NDCACHE_HOME") as caught:
        ndcache.fetch(server.url)
    assert no_cache in str(caught.value)
    assert server.shard_requests() == []
    assert not ndcache.is_cached(server.url)
    with tvm.ArtifactCache() as cache:
        assert not cache.has_all_keys([f"{server.url}tensor-cache.json"])
    with pytest.raises((ndcache.CacheUnavailableError, ndcache.OfflineError)):
        ndcache.load(server.url, offline=True)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.once
@pytest.mark.parametrize("no_cache", ["below a file", "a loop of links", "a home of nobody"], indirect=True)
@pytest.mark.parametrize("command", [["load", "-q"], ["ls"], ["doctor"], ["verify"], ["rm"], ["fetch", "-q"]])
def test_row_54_the_command_line_reports_it_in_one_line(
    model: Path, serve: Serve, no_cache: str, command: list[str]
) -> None:
    models.simple_model(model)
    url = [] if command[0] in ("ls", "doctor") else [serve(model).url]
    environ = {**os.environ, "PYTHONPATH": str(Path(ndcache.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "ndcache", *command, *url],
        capture_output=True,
        check=False,
        text=True,
        env=environ,
        timeout=120,
    )
    assert len(done.stderr.splitlines()) <= 1, done.stderr
    assert "Traceback" not in done.stderr
    if done.returncode == 0:
        assert "warning" in done.stderr or command[0] in ("ls", "doctor", "rm")
    else:
        assert done.stderr.startswith("error: ")
        assert "NDCACHE_HOME" in done.stderr or "not in the cache" in done.stderr
    assert (done.returncode == 0) or command[0] not in ("load", "doctor")


@pytest.mark.parametrize(
    "environ",
    [
        {"HOME": "relative"},
        {"HOME": "relative", "XDG_CACHE_HOME": "relative"},
        {"HOME": "/home/somebody", "XDG_CACHE_HOME": "/somewhere"},
        {"HOME": "relative", "NDCACHE_HOME": "/somewhere"},
        {"HOME": "/", "XDG_CACHE_HOME": ""},
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other variables name the home directory")
def test_the_cache_never_has_a_relative_path(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NDCACHE_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    # Some versions of platformdirs use an empty XDG_CACHE_HOME, or a relative HOME, as it stands.
    with contextlib.suppress(ndcache.CacheUnavailableError):
        assert cache_root(None, os.environ.get("NDCACHE_HOME")).is_absolute()


def test_a_working_directory_that_was_deleted_does_no_harm(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = models.simple_model(model)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        assert_same(ndcache.load(model, cache_dir="relative"), arrays)
    finally:
        os.chdir(tmp_path)


# --- a cache that has files, and accepts none ----------------------------------------------------


def test_row_54_a_cache_that_accepts_no_files_gives_those_it_has(
    model: Path, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    directory = ndcache.fetch(server.url, names=["layer.0", "layer.2"])
    block(directory)
    before = files(directory)
    server.requests.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is fetched that could not be kept
        assert len(ndcache.load(server.url, names=["layer.0", "layer.2"])) == 2
    with warned(str(directory)), ndcache.load(server.url) as weights:
        assert_same(weights, arrays)
        assert (weights.stats.cache_bytes, weights.stats.network_bytes) == (2 << 16, 2 << 16)
    assert sorted(request.path for request in server.shard_requests()) == ["/params_shard_1.bin", "/params_shard_3.bin"]
    assert files(directory) == before
    assert caplog.records == []


def test_row_54_a_bad_shard_in_a_cache_that_accepts_no_files_is_replaced_in_memory(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    damaged = bytearray((directory / "params_shard_1.bin").read_bytes())
    damaged[5] ^= 1
    (directory / "params_shard_1.bin").write_bytes(damaged)
    block(directory)
    shutil.rmtree(directory / ".ndcache" / "aside", ignore_errors=True)
    (directory / ".ndcache" / "aside").write_text("in the way")
    with warned(), ndcache.load(server.url, verify="always") as weights:
        assert_same(weights, arrays)
    assert (directory / "params_shard_1.bin").read_bytes() == damaged


def test_row_54_a_new_manifest_is_held_in_memory(model: Path, serve: Serve) -> None:
    models.simple_model(model, shards=2)
    server = serve(model)
    directory = ndcache.fetch(server.url)
    block(directory)
    arrays = models.simple_model(model, shards=3)
    for _ in range(2):
        with warned():
            assert_same(ndcache.load(server.url), arrays)
    with pytest.raises(ndcache.CacheUnavailableError, match="NDCACHE_HOME"):
        ndcache.fetch(server.url)


def test_row_54_a_cache_that_fails_in_the_middle_of_a_load_is_left_for_memory(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model, shards=12)
    server = serve(model)
    with warned():
        stream = ndcache.stream(server.url, max_workers=1, memory_limit=1)
        tensors = dict([next(stream)])
        (manifest,) = Path(os.environ["NDCACHE_HOME"]).glob("*/*/tensor-cache.json")
        block(manifest.parent)
        tensors.update(stream)
    assert_same(tensors, arrays)
    assert (manifest.parent / "params_shard_0.bin").exists()
    assert not (manifest.parent / "params_shard_11.bin").exists()


# --- real accounts and mounts -------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("home", [None, "/", "/nonexistent"])
def test_row_54_a_user_without_a_home_directory_can_load(
    model: Path, serve: Serve, tmp_path: Path, home: str | None
) -> None:
    """Containers are run with arbitrary user numbers."""
    arrays = models.simple_model(model)
    script = """
        import os, sys, warnings
        import ndcache, numpy as np
        ndcache.load(sys.argv[1], cache_dir=sys.argv[3])  # imports everything: that user may not read it
        os.setgroups([])
        os.setgid(0)
        os.setuid(int(sys.argv[2]))
        for name in ("HOME", "XDG_CACHE_HOME", "NDCACHE_HOME"):
            os.environ.pop(name, None)
        if len(sys.argv) > 4:
            os.environ["HOME"] = sys.argv[4]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            weights = ndcache.load(sys.argv[1])
        print(len(weights), sum(float(np.abs(array).sum()) for array in weights.values()))
        print(*(f"{item.filename}: {item.message}" for item in caught), sep="\\n")
    """
    first, *others = run_script(
        script, serve(model).url, str(UNKNOWN_USER), str(tmp_path / "cache"), *filter(None, [home])
    ).splitlines()
    assert first == f"4 {sum(float(np.abs(array).sum()) for array in arrays.values())}"
    (warning,) = others
    assert warning.startswith("<string>: ")
    assert "NDCACHE_HOME" in warning


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a small file system."""
    with mounted(tmp_path / "disk") as folder:
        yield folder


def test_row_54_a_read_only_disk_is_used_even_if_it_is_full(model: Path, serve: Serve, full_disk: Path) -> None:
    """Images of containers are full. Nothing is written there, so there need be no room."""
    arrays = models.simple_model(model, shards=3, shard_bytes=1 << 20)
    server = serve(model)
    ndcache.fetch(server.url, cache_dir=full_disk, names=["layer.1"])
    with contextlib.suppress(OSError), open(full_disk / "rest", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    with pytest.raises(ndcache.DiskFullError):
        ndcache.load(server.url, cache_dir=full_disk)
    subprocess.run(["mount", "-o", "remount,ro", full_disk], check=True)
    with warned("may not be written"), ndcache.load(server.url, cache_dir=full_disk) as weights:
        assert_same(weights, arrays)
        assert weights.stats.cache_bytes == 1 << 20
    with pytest.raises(ndcache.CacheUnavailableError, match=r"may not be written.*NDCACHE_HOME"):
        ndcache.fetch(server.url, cache_dir=full_disk)
