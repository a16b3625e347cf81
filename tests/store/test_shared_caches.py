"""Caches that several accounts use: the umask and the permissions of folders decide what each may do."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

import ndcache
from ndcache.store.directory import ModelDirectory

from ..helpers import models
from ..helpers.kills import CountingServer
from ..helpers.processes import Zygote, start_zygote
from ..helpers.servers import FileServer

Serve = Callable[..., FileServer]
SHARD = "params_shard_0.bin"
GROUP, FIRST, SECOND, STRANGER = 45000, 45001, 45002, 45003
SHARDS, SHARD_BYTES = 4, 1 << 18

# --- one account: the umask


@pytest.fixture(params=[0o002, 0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(directory: Path) -> tuple[set[int], set[int]]:
    """Return the permissions of a directory and all folders in it, and those of all files."""
    found: tuple[set[int], set[int]] = set(), set()
    for path in [directory, *directory.rglob("*")]:
        found[0 if path.is_dir() else 1].add(stat.S_IMODE(path.stat().st_mode))
    return found


def test_row_59_files_folders_and_locks_follow_the_umask(tmp_path: Path, serve: Serve, umask: int) -> None:
    models.simple_model(tmp_path / "model", shards=2)
    server = serve(tmp_path / "model")
    ndcache.fetch(server.url, names="layer.1")
    lock_modes: list[int] = []

    def look(report: Any) -> None:
        lock_modes.extend(stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "home").rglob("locks/*"))

    ndcache.load(server.url, progress=look).close()
    assert modes(tmp_path / "home") == ({0o777 & ~umask}, {0o666 & ~umask})
    assert set(lock_modes) <= {0o666 & ~umask}


@pytest.mark.parametrize("chosen", ["nothing", "option", "variable"])
def test_row_59_the_default_cache_is_for_one_account(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    models.simple_model(tmp_path / "model", shards=1)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user" / "caches"))
    monkeypatch.delenv("NDCACHE_HOME")
    options: dict[str, Any] = {}
    if chosen == "option":
        options["cache_dir"] = tmp_path / "user" / "mine"
    elif chosen == "variable":
        monkeypatch.setenv("NDCACHE_HOME", str(tmp_path / "user" / "mine"))
    before = os.umask(0o022)
    try:
        root = ndcache.fetch(serve(tmp_path / "model").url, **options).parent.parent
    finally:
        os.umask(before)
    assert stat.S_IMODE(root.stat().st_mode) == (0o700 if chosen == "nothing" else 0o755)
    assert stat.S_IMODE(root.parent.stat().st_mode) == 0o755
    root.chmod(0o755)  # the owner's later choice stays
    ndcache.fetch(serve(tmp_path / "model").url, **options)
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


# --- several accounts

several_accounts = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become other accounts"
)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.lower().endswith("_proxy") or name.startswith(("NDCACHE_O", "NDCACHE_H", "HF_")):
                patch.delenv(name)
        started = start_zygote()
    yield started
    started.close()


@pytest.fixture
def public() -> Iterator[Path]:
    """Make a directory that every account can enter, unlike pytest's own."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[CountingServer]:
    models.simple_model(tmp_path / "model", SHARDS, SHARD_BYTES)
    server = CountingServer(tmp_path / "model")
    yield server
    server.close()


def shared(public: Path, mode: int = 0o2775) -> Path:
    """Make a cache's root that belongs to the group."""
    root = public / "cache"
    root.mkdir()
    os.chown(root, FIRST, GROUP)
    root.chmod(mode)
    return root


def act_as(uid: int, umask: int, url: str, cache_dir: str, what: str, **options: Any) -> Any:
    """Use a verb as another account, in a process of its own; import everything that it takes first."""
    with tempfile.TemporaryDirectory() as scratch:
        ndcache.load(url, cache_dir=scratch).close()
        ndcache.verify(url, cache_dir=scratch)
        ndcache.delete(url, cache_dir=scratch)
    os.chdir("/")
    os.umask(umask)
    os.setgroups([])
    os.setgid(GROUP if uid != STRANGER else STRANGER)
    os.setuid(uid)
    try:
        found = VERBS[what](url, cache_dir=cache_dir, retries=0, **options)
    except ndcache.NdcacheError as error:
        return type(error).__name__, str(error)
    if not isinstance(found, ndcache.Weights):
        return found
    with found:
        return {name: digest(found[name]) for name in found}, found.stats.network_bytes, found.stats.resumed_bytes


def digest(tensor: Any) -> str:
    return hashlib.md5(bytes(tensor)).hexdigest()


def leave_partial(url: str, cache_dir: str, *, etag: str, content_id: str, nbytes: int, mode: int, **_: Any) -> str:
    """Leave a partial file of the first shard, as a load that was killed does."""
    directory = Path(ndcache.fetch(url, cache_dir=cache_dir, names="layer.1"))
    data = bytes(nbytes)
    with ModelDirectory(directory, root=Path(cache_dir)).partials.create(SHARD) as partial:
        partial.set_source(f"{url}{SHARD}", etag, content_id, None)
        partial.write(data)
    partial.path.chmod(mode)
    return partial.file_name


VERBS: dict[str, Callable[..., Any]] = {
    "load": ndcache.load,
    "fetch": ndcache.fetch,
    "verify": lambda url, cache_dir, retries: ndcache.verify(url, cache_dir=cache_dir),
    "delete": lambda url, cache_dir, retries: ndcache.delete(url, cache_dir=cache_dir),
    "read_manifest": lambda url, cache_dir, retries: len(ndcache.read_manifest(url, cache_dir=cache_dir)),
    "is_cached": lambda url, cache_dir, retries: ndcache.is_cached(url, cache_dir=cache_dir),
    "leave partial file": leave_partial,
}
TENSORS = {
    f"layer.{index}": digest(models.random_array((SHARD_BYTES // 4,), seed=index).tobytes()) for index in range(SHARDS)
}
TOTAL = SHARDS * SHARD_BYTES


@several_accounts
def test_row_59_two_accounts_of_a_group_share_one_cache(zygote: Zygote, counting: CountingServer, public: Path) -> None:
    root = shared(public)
    counting.requests.clear()

    def act(uid: int, what: str, **options: Any) -> Any:
        return zygote.start(act_as, uid, 0o002, counting.url, str(root), what, **options).result(15)

    assert act(FIRST, "load", names="layer.0") == ({"layer.0": TENSORS["layer.0"]}, SHARD_BYTES, 0)
    assert act(SECOND, "load", offline=True, names="layer.0")[1:] == (0, 0)
    # The second account adds to the folders of the first, and the first uses what it added.
    assert act(SECOND, "load") == (TENSORS, TOTAL - SHARD_BYTES, 0)
    assert act(FIRST, "load", verify="always") == (TENSORS, 0, 0)
    (directory,) = root.glob("[!.]*/*")
    os.utime(directory / SHARD, (1, 1))
    assert act(SECOND, "verify").ok
    (directory / SHARD).write_bytes(bytes(SHARD_BYTES))
    assert act(SECOND, "verify").bad == (SHARD,)
    assert act(FIRST, "load") == (TENSORS, SHARD_BYTES, 0)
    folders, files = modes(root)
    assert (folders, files) == ({0o2775}, {0o664})
    assert {path.stat().st_gid for path in root.rglob("*")} == {GROUP}
    assert act(SECOND, "delete") > TOTAL
    assert list(root.glob("[!.]*/*")) == []


@several_accounts
def test_row_59_two_accounts_at_once_download_once(zygote: Zygote, counting: CountingServer, public: Path) -> None:
    root = shared(public)
    counting.sent.clear()
    children = [
        zygote.start(act_as, uid, 0o002, counting.url, str(root), "load") for uid in (FIRST, SECOND, FIRST, SECOND)
    ]
    results = [child.result(15) for child in children]
    assert [result[0] for result in results] == [TENSORS] * 4
    network = sum(result[1] for result in results)
    assert TOTAL <= network <= 1.05 * TOTAL


@several_accounts
@pytest.mark.parametrize("mode", [0o664, 0o644, 0o600])
@pytest.mark.parametrize("is_sticky", [False, True])
def test_row_59_a_partial_file_of_another_account_is_copied_if_it_may_be_read(
    zygote: Zygote, counting: CountingServer, public: Path, mode: int, is_sticky: bool
) -> None:
    root = shared(public)
    data, other = bytes(SHARD_BYTES), models.random_array((SHARD_BYTES // 4,), seed=1)
    models.write_model(counting.directory, [{"layer.0": np.frombuffer(data, "float32")}, {"layer.1": other}])
    shard = ndcache.read_manifest(counting.directory).shards[0]
    etag = requests.get(counting.url + SHARD, timeout=10).headers["ETag"]
    options = {"etag": etag, "content_id": shard.md5sum, "nbytes": SHARD_BYTES // 2, "mode": mode}
    left = zygote.start(act_as, FIRST, 0o002, counting.url, str(root), "leave partial file", **options).result(15)
    (parts,) = root.glob("*/*/.ndcache/parts")
    if is_sticky:
        parts.chmod(0o3775)
    result = zygote.start(act_as, SECOND, 0o002, counting.url, str(root), "load", names="layer.0").result(15)
    tensors, network, resumed = result
    assert tensors == {"layer.0": digest(data)}
    assert (network, resumed) == ((SHARD_BYTES, 0) if mode == 0o600 else (SHARD_BYTES // 2, SHARD_BYTES // 2))
    assert (parts / left).exists() is is_sticky


@several_accounts
def test_row_59_an_account_that_may_only_read_can_load_and_not_delete(
    zygote: Zygote, counting: CountingServer, public: Path
) -> None:
    root = shared(public, 0o755)

    def act(uid: int, what: str, **options: Any) -> Any:
        return zygote.start(act_as, uid, 0o022, counting.url, str(root), what, **options).result(15)

    assert act(FIRST, "load")[0] == TENSORS
    for uid in (SECOND, STRANGER):
        assert act(uid, "load") == (TENSORS, 0, 0)
        assert act(uid, "load", offline=True, verify="always") == (TENSORS, 0, 0)
        assert act(uid, "is_cached") is True
        assert act(uid, "verify").ok
        assert act(uid, "delete")[0] == "CacheUnavailableError"
    (directory,) = root.glob("[!.]*/*")
    (directory / SHARD).write_bytes(bytes(SHARD_BYTES))
    report = act(SECOND, "verify")
    assert (report.bad, report.kept, len(report.checked)) == ((SHARD,), (SHARD,), SHARDS - 1)
    assert act(FIRST, "verify").kept == ()
    assert act(FIRST, "delete") > 0


@several_accounts
@pytest.mark.parametrize("planted", ["model", "shard", "fifo"])
@pytest.mark.once
def test_row_59_links_and_special_files_of_the_group_are_refused(
    zygote: Zygote, counting: CountingServer, public: Path, tmp_path: Path, planted: str
) -> None:
    root = shared(public)
    zygote.start(act_as, FIRST, 0o002, counting.url, str(root), "fetch").result(15)
    (directory,) = root.glob("[!.]*/*")
    victim = public / "victim"
    shutil.copytree(directory, victim)
    if planted == "model":
        directory.rename(directory.with_name("away"))
        directory.symlink_to(victim)
    else:
        (directory / SHARD).unlink()
        (directory / SHARD).symlink_to(victim / SHARD) if planted == "shard" else os.mkfifo(directory / SHARD)
    result = zygote.start(act_as, SECOND, 0o002, counting.url, str(root), "load").result(15)
    if planted == "model":
        assert result[0] == "UnsafeCacheError"
    else:
        assert result == (TENSORS, SHARD_BYTES, 0)


@several_accounts
@pytest.mark.parametrize("closed", ["", "default", "default/*", "default/*/.ndcache"])
@pytest.mark.parametrize("is_gone", [False, True])
@pytest.mark.once
def test_row_60_no_verb_raises_a_bare_permission_error_for_a_folder_of_another_account(
    zygote: Zygote, counting: CountingServer, public: Path, closed: str, is_gone: bool
) -> None:
    root = shared(public, 0o755)
    zygote.start(act_as, FIRST, 0o022, counting.url, str(root), "fetch").result(15)
    if is_gone:
        (next(root.glob("[!.]*/*")) / SHARD).unlink()
    (folder,) = root.glob(closed) if closed else [root]
    folder.chmod(0o700)
    for what in VERBS.keys() - {"leave partial file"}:
        found = zygote.start(act_as, SECOND, 0o022, counting.url, str(root), what).result(15)
        with contextlib.suppress(TypeError):
            assert found[0] != "UnsafeCacheError"
    folder.chmod(0o755)


@several_accounts
@pytest.mark.parametrize("closed", ["", "default", "default/*", "default/*/.ndcache", "default/*/.ndcache/parts"])
@pytest.mark.parametrize("mode", [0o700, 0o744])
@pytest.mark.once
def test_row_54_a_model_in_a_folder_of_another_account_is_loaded_into_memory(
    zygote: Zygote, counting: CountingServer, public: Path, closed: str, mode: int
) -> None:
    root = shared(public, 0o755)
    partial = {"etag": '"1"', "content_id": "?", "nbytes": 1000, "mode": 0o644}
    zygote.start(act_as, FIRST, 0o022, counting.url, str(root), "leave partial file", **partial).result(15)
    (folder,) = root.glob(closed) if closed else [root]
    folder.chmod(mode)
    for options in ({}, {"verify": "always"}):
        tensors, _, _ = zygote.start(act_as, SECOND, 0o022, counting.url, str(root), "load", **options).result(15)
        assert tensors == TENSORS
