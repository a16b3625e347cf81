"""Symbolic and hard links planted in the cache, at every place, for every verb: their targets are left alone."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ndcache
from ndcache import tvm
from ndcache.cli import commands as cli
from ndcache.files import folder as folders
from ndcache.files.folder import Folder, is_gone
from ndcache.location import locate
from ndcache.store.lock import DownloadLock, acquire_or_wait, try_lock

from ..helpers import models
from ..helpers.servers import FileServer

Serve = Callable[..., FileServer]
SHARD = "params_shard_0.bin"


@pytest.fixture
def server(tmp_path: Path, serve: Serve) -> FileServer:
    models.simple_model(tmp_path / "model", shards=2)
    (tmp_path / "model" / "other.json").write_text("{}")
    return serve(tmp_path / "model")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Make files that belong to somebody else, under names that ndcache uses."""
    victim = tmp_path / "victim"
    for name in (SHARD, "tensor-cache.json", "source.json", f"{SHARD}.json", "x.12345678.deleted/file"):
        (victim / name).parent.mkdir(parents=True, exist_ok=True)
        (victim / name).write_bytes(b"precious")
    return victim


def tree(directory: Path) -> dict[str, Any]:
    """Return modes, times and bytes of everything in a directory, or nothing if it is not there."""
    found: dict[str, Any] = {}
    for path in [directory, *directory.rglob("*")] if directory.exists() else []:
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[str(path.relative_to(directory))] = status.st_mode, status.st_mtime_ns, content
    return found


def add(url: str) -> None:
    with tvm.ArtifactCache() as cache:
        cache.add_to_cache(f"{url}other.json")


def remove(url: str) -> None:
    with tvm.ArtifactCache() as cache:
        cache.delete_in_cache(f"{url}{SHARD}")


VERBS: dict[str, Callable[[str], Any]] = {
    "load": lambda url: ndcache.load(url, retries=0),
    "offline": lambda url: ndcache.load(url, offline=True),
    "always": lambda url: ndcache.load(url, retries=0, verify="always"),
    "fetch": lambda url: ndcache.fetch(url, retries=0),
    "is_cached": ndcache.is_cached,
    "verify": ndcache.verify,
    "tvm add": add,
    "tvm remove": remove,
    "delete": ndcache.delete,
}
#: Where a link is planted, below the cache's root; MODEL stands for the model's directory.
STATE = "default/MODEL/.ndcache"
PLACES = ["default", "default/MODEL", STATE, *(f"{STATE}/{name}" for name in ("parts", "locks", "validators"))]


@pytest.mark.once
@pytest.mark.parametrize("leads_to", ["something", "nothing"])
@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_row_57_no_verb_goes_through_a_planted_link(
    server: FileServer, cache_dir: Path, victim: Path, place: str, is_cached: bool, leads_to: str
) -> None:
    link = cache_dir / place.replace("MODEL", locate(server.url).cache_key)
    if is_cached:
        ndcache.fetch(server.url)
        link.rename(link.with_name("away"))
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim if leads_to == "something" else victim / "new")
    before = tree(victim)
    if not is_cached or place in ("default", "default/MODEL"):
        with pytest.raises(ndcache.UnsafeCacheError, match="symbolic link"):
            ndcache.load(server.url, retries=0)
    for name, verb in VERBS.items():
        with contextlib.suppress(ndcache.UnsafeCacheError, ndcache.OfflineError, ndcache.NotFoundError):
            verb(server.url)
        assert tree(victim) == before, name


def test_row_57_links_at_notes_and_names_are_replaced_and_not_followed(
    server: FileServer, victim: Path, cache_dir: Path
) -> None:
    directory = ndcache.fetch(server.url)
    before, arrays = tree(victim), ndcache.load(server.url)
    notes = ("validators/tensor-cache.json.json", f"validators/{SHARD}.json", "source.json", f"aside/{SHARD}")
    planted = ("tensor-cache.json", SHARD, *(f".ndcache/{name}" for name in notes))
    for name in planted:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(victim / SHARD)
    assert list(ndcache.load(server.url)) == list(arrays)
    assert ndcache.verify(server.url).ok
    assert [model.path for model in ndcache.cache.models(cache_dir=cache_dir)] == [directory]
    assert tree(victim) == before
    assert ndcache.delete(server.url) > 0
    assert tree(victim) == before


@pytest.mark.parametrize("place", ["default", "default/MODEL"])
def test_row_57_a_directory_linked_into_the_cache_is_neither_listed_nor_deleted_by_path(
    server: FileServer, cache_dir: Path, tmp_path: Path, place: str
) -> None:
    elsewhere = ndcache.fetch(server.url, cache_dir=tmp_path / "elsewhere")
    link = cache_dir / place.replace("MODEL", elsewhere.name)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere if "MODEL" in place else elsewhere.parent)
    before = tree(tmp_path / "elsewhere")
    assert list(ndcache.cache.models(cache_dir=cache_dir)) == []
    for path in (cache_dir / "default" / elsewhere.name, elsewhere):
        with pytest.raises(ndcache.UnsafeCacheError):
            ndcache.delete(path)
    result = CliRunner().invoke(cli.main, ["rm", str(cache_dir / "default" / elsewhere.name), server.url])
    assert result.exit_code == 1
    assert tree(tmp_path / "elsewhere") == before


def test_row_57_a_link_named_like_trash_is_left_alone(server: FileServer, victim: Path) -> None:
    directory = ndcache.fetch(server.url)
    before = tree(victim)
    directory.with_name(f"{directory.name}.12345678.deleted").symlink_to(victim)
    ndcache.load(server.url)
    assert ndcache.delete(server.url) > 0
    assert tree(victim) == before


def test_row_57_links_above_and_at_the_root_are_followed(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "data" / "home").mkdir(parents=True)
    (tmp_path / "home-link").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cache-link").symlink_to(tmp_path / "data" / "home")
    for cache_dir in (tmp_path / "home-link" / "new", tmp_path / "home-link" / "cache-link"):
        directory = ndcache.fetch(server.url, cache_dir=cache_dir)
        assert directory.is_relative_to(cache_dir)
        assert ndcache.verify(server.url, cache_dir=cache_dir).ok
        assert [model.path for model in ndcache.cache.models(cache_dir=cache_dir)] == [directory]
        assert ndcache.delete(directory.resolve(), cache_dir=cache_dir) > 0
        ndcache.fetch(server.url, cache_dir=cache_dir)
        assert ndcache.delete(directory, cache_dir=cache_dir) > 0


@pytest.mark.once
@pytest.mark.skipif(not folders._HAS_DIR_FD, reason="the system has no calls that take a folder's descriptor")
def test_row_57_a_link_that_alternates_with_the_real_folder_is_not_followed(
    server: FileServer, cache_dir: Path, victim: Path
) -> None:
    """Each access may meet the link or the real folder, in any order."""
    directory = ndcache.fetch(server.url)
    (directory / SHARD).unlink()
    real = os.open(directory, os.O_RDONLY)
    away, link = directory.with_name("away"), directory.with_name("link")
    (victim / ".ndcache" / "parts").mkdir(parents=True)
    (victim / ".ndcache" / "validators").mkdir()
    before, done = tree(victim), threading.Event()

    steps: list[Callable[[], None]] = [
        lambda: os.symlink(victim, link),
        lambda: os.rename(directory, away),
        lambda: os.rename(link, directory),
        lambda: os.unlink(directory),
        lambda: os.rename(away, directory),
    ]

    def flip() -> None:
        while not done.is_set():
            for step in steps:
                with contextlib.suppress(OSError):  # a fetch has made the folder again in between
                    step()

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        for _ in range(60):
            with contextlib.suppress(ndcache.NdcacheError):
                ndcache.fetch(server.url, retries=0)
            with contextlib.suppress(OSError):
                os.unlink(SHARD, dir_fd=real)  # a path could lead to the victim just now
    finally:
        os.close(real)
        done.set()
        thread.join()
    assert tree(victim) == before


# --- hard links


@pytest.mark.parametrize("verb", ["acquire_or_wait", "try_lock"])
def test_row_57_a_file_with_a_hard_link_at_a_locks_name_keeps_its_bytes_and_mode(tmp_path: Path, verb: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    victim.chmod(0o600)
    (tmp_path / "locks").mkdir()
    path = tmp_path / "locks" / SHARD
    os.link(victim, path)
    if verb == "acquire_or_wait":
        with acquire_or_wait(path, is_there=lambda: False, progress=int, sleep=lambda seconds: None) as mine:
            assert mine == DownloadLock(is_exclusive=False)
    else:
        with try_lock(path) as is_free:
            assert not is_free
    assert (victim.read_bytes(), stat.S_IMODE(victim.stat().st_mode)) == (b"precious", 0o600)


def test_row_57_files_with_hard_links_in_the_cache_are_not_written_to(server: FileServer, tmp_path: Path) -> None:
    directory = ndcache.fetch(server.url)
    arrays = ndcache.load(server.url)
    planted = [path for path in directory.rglob("*") if path.is_file()] + [directory / ".ndcache" / "locks" / SHARD]
    victims = []
    for number, path in enumerate(planted):
        victims.append(tmp_path / f"victim{number}")
        victims[-1].write_bytes(b"precious")
        path.unlink(missing_ok=True)
        os.link(victims[-1], path)
    with contextlib.closing(ndcache.load(server.url)) as weights:
        assert list(weights) == list(arrays)
    assert ndcache.verify(server.url).ok
    ndcache.delete(server.url)
    assert [victim.read_bytes() for victim in victims] == [b"precious"] * len(victims)


# --- folders


@pytest.fixture(params=[True, False], ids=["with", "without"])
def dir_fd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with and without calls that take a folder's descriptor, which Windows lacks."""
    if not request.param:
        monkeypatch.setattr(folders, "_HAS_DIR_FD", False)


@pytest.mark.usefixtures("dir_fd")
def test_a_folder_and_its_entries(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "root", ("a",)) / "b"
    assert (folder.exists(), folder.entries(), folder.status("x"), folder.open("x")) == (False, [], None, None)
    with pytest.raises(FileNotFoundError):
        folder.create("x")
    folder.make()
    folder.make()
    os.close(folder.create("x"))
    with pytest.raises(FileExistsError):
        folder.create("x")
    folder.replace("x", folder.parent, "y")
    assert (folder.entries(), sorted(folder.parent.entries())) == ([], ["b", "y"])
    file = folder.parent.open("y")
    assert file is not None
    file.close()
    assert folder.parent.open("b") is None
    folder.parent.unlink("y")
    folder.sync()
    folder.remove()
    assert folder.parent.entries() == []


@pytest.mark.usefixtures("dir_fd")
@pytest.mark.parametrize("call", ["exists", "entries", "make", "create", "unlink", "replace", "status", "open"])
def test_a_folder_behind_a_link_is_refused(tmp_path: Path, call: str) -> None:
    (tmp_path / "victim" / "b").mkdir(parents=True)
    (tmp_path / "victim" / "b" / "x").write_bytes(b"precious")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    folder, before = Folder(tmp_path, ("a", "b")), tree(tmp_path / "victim")
    arguments = {"replace": ("x", folder, "y")}.get(call, () if call in ("exists", "entries", "make") else ("x",))
    with pytest.raises(ndcache.UnsafeCacheError, match="symbolic link"):
        getattr(folder, call)(*arguments)
    assert tree(tmp_path / "victim") == before


def opened_on_the_way(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each folder is added that is opened below a root from now on."""
    found: list[str] = []
    enter = Folder._enter

    def spy(folder: Folder, handle: int, count: int) -> int:
        found.append(folder.names[count - 1])
        return enter(folder, handle, count)

    monkeypatch.setattr(Folder, "_enter", spy)
    return found


@pytest.mark.skipif(not folders._HAS_DIR_FD, reason="the system has no calls that take a folder's descriptor")
def test_a_folder_that_is_held_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, victim = Folder(tmp_path, ("a", "b")), tmp_path / "victim"
    (folder / "c").make()
    (victim / "b" / "c").mkdir(parents=True)
    opened = opened_on_the_way(monkeypatch)
    with folder.held(), folder.held(), (folder / "c").held():
        (tmp_path / "a").rename(tmp_path / "away")
        (tmp_path / "a").symlink_to(victim)
        os.close(folder.create("x"))
        os.close((folder / "c").create("y"))
        folder.replace("x", folder / "c", "z")
        assert opened == ["a", "b", "c"]
    assert sorted(os.listdir(tmp_path / "away" / "b" / "c")) == ["y", "z"]
    assert os.listdir(victim / "b" / "c") == []
    with pytest.raises(ndcache.UnsafeCacheError):
        folder.create("x")
    assert folders._held.handles == []


@pytest.mark.skipif(not folders._HAS_DIR_FD, reason="the system has no calls that take a folder's descriptor")
def test_publishing_goes_down_to_a_folder_once(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ndcache.fetch(server.url, names="layer.0")
    opened = opened_on_the_way(monkeypatch)
    ndcache.fetch(server.url, names="layer.1")
    assert len(opened) <= 16  # 40 if each call goes all the way


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOENT, True), (errno.ENOTDIR, True), (errno.ESTALE, True), (errno.EIO, False)]
)
def test_which_errors_say_that_a_file_is_gone(number: int, expected: bool) -> None:
    assert is_gone(OSError(number, "?")) is expected
    assert not is_gone(None)
