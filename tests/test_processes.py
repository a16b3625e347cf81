"""Many processes and threads, and what becomes of them: killed, stopped, forked, without room, without permission."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests

import ndcache
import ndcache.store.lock

from .helpers import kills, models
from .helpers.kills import Child, CountingServer, Zygote, check_published, left_behind, model_directory
from .helpers.servers import Request

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

Arrays = Mapping[str, Any]
Serve = Callable[..., CountingServer]

SHARD = "/params_shard_0.bin"
MIB = 1 << 20
#: Patience that does not end while a test runs.
ENDLESS = 1e9
NOBODY = 65534


@pytest.fixture(scope="module", autouse=True)
def _zygote() -> Iterator[Zygote]:
    """One for all tests. It is begun before any of them, so that none is blamed for what it has open."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.lower().endswith("_proxy") or name.startswith(("NDCACHE_O", "NDCACHE_H", "HF_")):
                patch.delenv(name)
        started = Zygote()
    yield started
    started.close()


@pytest.fixture
def zygote(_zygote: Zygote) -> Zygote:
    return _zygote


@pytest.fixture
def counting() -> Iterator[Serve]:
    """Start a `CountingServer`; it is closed after the test."""
    started: list[CountingServer] = []

    def start(directory: Path, **options: Any) -> CountingServer:
        started.append(CountingServer(directory, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def digest_of(tensors: Arrays) -> str:
    """One digest over all names, dtypes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def part_bytes(directory: Path) -> int:
    """Bytes that lie in parts of shards."""
    folder = directory / ".ndcache" / "parts"
    total = 0
    for path in folder.glob("params_shard_*") if folder.is_dir() else []:
        if path.suffix != ".json":
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def ranges(server: CountingServer) -> list[str | None]:
    """What each request for a shard asked for."""
    return [request.headers.get("range") for request in server.shard_requests()]


def peers(some: list[Request]) -> set[str]:
    """The client's ports."""
    return {request.headers["x-test-peer"] for request in some}


# --- what the children do -----------------------------------------------------------------------------


def load(url: str, **options: Any) -> str:
    """The digest of what was loaded."""
    with ndcache.load(url, **options) as weights:
        return digest_of(weights)


def load_with(loader: ndcache.Loader, url: str) -> str:
    with loader.load(url) as weights:
        return digest_of(weights)


def load_without_locks(url: str, how: str, **options: Any) -> str:
    """Load where `fcntl.flock` does nothing, or raises an error of this name."""
    import fcntl

    def flock(handle: int, operation: int) -> None:
        if how != "nothing":
            raise OSError(getattr(errno, how.split()[0]), "no locks here")

    fcntl.flock = flock
    warnings.simplefilter("error" if "strict" in how else "ignore")
    return load(url, **options)


def fetch_with_patience(
    url: str, patience: float, waiting: Path, told_time: Path | None = None, **options: Any
) -> None:
    """Fetch with so much patience.

    `waiting` is made when somebody else is seen to have the lock. `told_time` is a file with what the time is.
    """
    locks = ndcache.store.lock
    locks._PATIENCE = (patience, patience)
    locks._LONGEST_PAUSE = 0.05
    really_try = locks._try

    def noted(lock: Any, **options: Any) -> ndcache.store.lock._Result:
        result = really_try(lock, **options)
        if result is locks._Result.BUSY:
            waiting.touch()
        return result

    def monotonic() -> float:
        assert told_time is not None
        with open(told_time.with_suffix(".looks"), "ab") as file:
            file.write(b".")
        return float(told_time.read_text())

    locks._try = noted
    if told_time is not None:
        locks.time = SimpleNamespace(monotonic=monotonic)  # type: ignore[assignment]
    ndcache.fetch(url, **options)


def fetch_and_fork(url: str, forked: Path, **options: Any) -> None:
    """Fetch; on SIGUSR1, fork a process that does nothing but keep the lock. Its id goes to the file `forked`."""
    import fcntl

    really_lock = fcntl.flock

    def flock(handle: int, operation: int) -> None:
        really_lock(handle, operation)
        # As a fork would get it, were it not for filelock's own precautions.
        os.dup(handle)

    def fork(*_: object) -> None:
        if os.fork() == 0:
            forked.with_suffix(".new").write_text(str(os.getpid()))
            forked.with_suffix(".new").rename(forked)
            time.sleep(600)
            os._exit(0)

    fcntl.flock = flock
    signal.signal(signal.SIGUSR1, fork)
    ndcache.fetch(url, **options)


def load_as_nobody(url: str, names: list[str], cache_dir: Path) -> tuple[str, str, str, BaseException | None]:
    """As root, load tensors of these names. Then as nobody: load them online and offline; load and fetch the model."""
    os.umask(0o022)
    load(url, names=names, cache_dir=cache_dir)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    online = load(url, names=names, cache_dir=cache_dir)
    offline = load(url, names=names, cache_dir=cache_dir, offline=True)
    warnings.simplefilter("ignore")
    all_of_it = load(url, cache_dir=cache_dir)
    try:
        ndcache.fetch(url, cache_dir=cache_dir)
    except ndcache.NdcacheError as error:
        return online, offline, all_of_it, error
    return online, offline, all_of_it, None


def in_fork(function: Callable[..., Any], *args: Any, meanwhile: Callable[[], Any] = lambda: None) -> Any:
    """What the function returns in a fork of this process."""
    pid, results = kills.fork(function, args, {})
    try:
        meanwhile()
        if not results.poll(30):
            os.kill(pid, signal.SIGKILL)
            raise TimeoutError("the fork hangs")
        result, error = results.recv()
    finally:
        os.waitpid(pid, 0)
        results.close()
    if error is not None:
        raise error
    return result


def load_around_a_fork(url: str, cache_dir: Path, *, with_session: bool) -> list[str]:
    """Load before a fork, in the fork, and after it: from the server each time, with one loader and connection."""
    session = requests.Session() if with_session else None
    with ndcache.Loader(session=session, cache_dir=cache_dir, max_workers=1) as loader:

        def load_cold() -> str:
            loader.delete(url)
            return load_with(loader, url)

        loaded = [load_cold(), in_fork(load_cold), load_cold()]
    if session is not None:
        session.close()
    return loaded


def load_in_forks_of_a_load(busy_url: str, urls: list[str], cache_dir: Path, forked: Path) -> list[str]:
    """While a thread waits for a body, fork processes that load from other URLs, and from the same one.

    `forked` is made when the body may go on.
    """
    with ndcache.Loader(cache_dir=cache_dir) as loader, ThreadPoolExecutor(1) as pool:
        busy = pool.submit(load_with, loader, busy_url)
        wait_until(lambda: part_bytes(model_directory(cache_dir, busy_url)))
        loaded = [in_fork(load_with, loader, url) for url in urls]
        loaded.append(in_fork(load_with, loader, busy_url, meanwhile=forked.touch))
        return [busy.result(60), *loaded]


def fork_at_any_moment(busy_url: str, url: str, cache_dir: Path, times: int) -> list[str]:
    """While a thread loads without end, fork processes that load, too."""
    done = threading.Event()
    with ndcache.Loader(cache_dir=cache_dir) as loader, ThreadPoolExecutor(1) as pool:

        def keep_busy() -> None:
            while not done.is_set():
                loader.delete(busy_url)
                load_with(loader, busy_url)

        busy = pool.submit(keep_busy)
        try:
            return [in_fork(load_with, loader, url) for _ in range(times)]
        finally:
            done.set()
            busy.result(60)


# --- row 25: killed -----------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("mode", kills.MODES)
def test_row_25_after_each_kill_every_file_is_right(tmp_path: Path, mode: str) -> None:
    figures = kills.run_kills(25, 0, mode, tmp_path, shards=8, shard_bytes=1 << 19)
    assert sum(figures.kills.values()) == 25


def test_row_25_resume_asks_for_the_rest_only(model: Path, counting: Serve, zygote: Zygote, cache_dir: Path) -> None:
    models.simple_model(model, shards=1, shard_bytes=4 * MIB)
    server = counting(model)
    directory = kill_at_half(server, zygote, cache_dir, 4 * MIB)
    assert check_published(directory, kills.digests(model)) == 1  # the manifest
    zygote.start(kills.fetch, server.url, cache_dir=cache_dir).result()
    assert ranges(server) == [None, f"bytes={2 * MIB}-{4 * MIB - 1}"]
    assert server.shard_requests()[1].headers["if-range"]
    assert server.sent_bytes == 4 * MIB
    assert kills.digests(directory) == kills.digests(model)
    assert left_behind(directory) == []


@pytest.mark.parametrize("md5", [True, False], ids=["with its digest in a new manifest", "without a digest"])
def test_row_25_no_resume_where_the_file_has_changed(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path, md5: bool
) -> None:
    models.write_model(model, [{"t": models.random_array((2 * MIB,), "uint8", 1)}], md5=md5)
    server = counting(model)
    directory = kill_at_half(server, zygote, cache_dir, 2 * MIB)
    models.write_model(model, [{"t": models.random_array((2 * MIB,), "uint8", 2)}], md5=md5)
    zygote.start(kills.fetch, server.url, cache_dir=cache_dir, retries=ndcache.RetryPolicy(backoff=0.01)).result()
    assert kills.digests(directory) == kills.digests(model)
    assert left_behind(directory) == []


def kill_at_half(server: CountingServer, zygote: Zygote, cache_dir: Path, nbytes: int) -> Path:
    """Kill a fetch when half of its one shard has been written; the model's directory."""
    holder, directory = hold_at_half(server, zygote, cache_dir, nbytes)
    assert not holder.kill()
    return directory


def hold_at_half(
    server: CountingServer,
    zygote: Zygote,
    cache_dir: Path,
    nbytes: int,
    function: Callable[..., None] = kills.fetch,
    *args: Any,
) -> tuple[Child, Path]:
    """A fetch that has written half of its shard, and waits for the rest with the lock in hand."""
    server.holds[SHARD] = (nbytes // 2,)
    holder = zygote.start(function, server.url, *args, cache_dir=cache_dir)
    directory = model_directory(cache_dir, server.url)
    wait_until(lambda: part_bytes(directory) == nbytes // 2)
    return holder, directory


# --- rows 26 and 27: at once --------------------------------------------------------------------------


def load_at_once(
    processes: int, server: CountingServer, zygote: Zygote, function: Callable[..., str], *args: Any, cache_dir: Path
) -> set[str]:
    """The digests of what so many processes load; all begin when the last one has asked for the manifest."""
    server.gated_manifest = True
    server.gate.clear()
    children = [zygote.start(function, server.url, *args, cache_dir=cache_dir) for _ in range(processes)]
    wait_until(lambda: len(server.requests) == processes)
    server.gate.set()
    return {child.result() for child in children}


def test_row_26_32_processes_download_a_model_once(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    arrays = models.simple_model(model, shards=8, shard_bytes=MIB)
    server = counting(model, rate=8 * MIB)
    assert load_at_once(32, server, zygote, load, cache_dir=cache_dir) == {digest_of(arrays)}
    assert server.sent_bytes <= 1.05 * 8 * MIB
    assert left_behind(model_directory(cache_dir, server.url)) == []


@pytest.mark.parametrize("how", ["nothing", "ENOSYS", "ENOSYS strict", "ENOTSUP"])
def test_row_27_where_locks_do_not_work_the_result_is_the_same(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path, how: str
) -> None:
    arrays = models.simple_model(model, shards=4, shard_bytes=MIB // 2)
    server = counting(model, rate=8 * MIB)
    assert load_at_once(6, server, zygote, load_without_locks, how, cache_dir=cache_dir) == {digest_of(arrays)}
    directory = model_directory(cache_dir, server.url)
    assert kills.digests(directory) == kills.digests(model)
    assert left_behind(directory) == []


# --- row 28: who has the lock -------------------------------------------------------------------------


def start_waiter(
    server: CountingServer, zygote: Zygote, cache_dir: Path, patience: float, told_time: Path | None = None
) -> Child:
    """A fetch that waits for the lock of somebody else's."""
    waiting = cache_dir.parent / "waiting"
    waiter = zygote.start(fetch_with_patience, server.url, patience, waiting, told_time=told_time, cache_dir=cache_dir)
    wait_until(waiting.exists)
    return waiter


@pytest.fixture
def one_shard(model: Path, counting: Serve) -> CountingServer:
    models.simple_model(model, shards=1, shard_bytes=MIB)
    return counting(model)


def assert_fetched(directory: Path, server: CountingServer) -> None:
    assert kills.digests(directory) == kills.digests(server.directory)
    assert left_behind(directory) == []


def test_row_28_when_the_holder_of_a_lock_is_killed_the_waiter_takes_over(
    one_shard: CountingServer, zygote: Zygote, cache_dir: Path
) -> None:
    holder, directory = hold_at_half(one_shard, zygote, cache_dir, MIB)
    waiter = start_waiter(one_shard, zygote, cache_dir, ENDLESS)
    assert not holder.kill()
    waiter.result()
    assert ranges(one_shard) == [None, f"bytes={MIB // 2}-{MIB - 1}"]
    assert_fetched(directory, one_shard)


def test_row_28_when_the_holder_of_a_lock_is_stopped_the_waiter_goes_on_and_so_can_the_holder_later(
    one_shard: CountingServer, zygote: Zygote, cache_dir: Path
) -> None:
    holder, directory = hold_at_half(one_shard, zygote, cache_dir, MIB)
    holder.signal(signal.SIGSTOP)
    start_waiter(one_shard, zygote, cache_dir, 0.5).result()
    assert holder.is_running
    assert check_published(directory, kills.digests(one_shard.directory)) == 2
    one_shard.go.release()
    holder.signal(signal.SIGCONT)
    holder.result()
    assert_fetched(directory, one_shard)


def test_row_28_when_a_fork_of_a_dead_holder_keeps_the_lock_the_waiter_goes_on(
    one_shard: CountingServer, zygote: Zygote, cache_dir: Path, tmp_path: Path
) -> None:
    forked = tmp_path / "forked"
    holder, directory = hold_at_half(one_shard, zygote, cache_dir, MIB, fetch_and_fork, forked)
    holder.signal(signal.SIGUSR1)
    wait_until(forked.exists)
    try:
        assert not holder.kill()
        waiter = start_waiter(one_shard, zygote, cache_dir, 0.5)  # it is seen to wait, so the lock is held
        waiter.result()
    finally:
        os.kill(int(forked.read_text()), signal.SIGKILL)
    assert_fetched(directory, one_shard)


def test_row_28_a_waiter_that_sees_progress_waits_as_long_as_it_takes(
    one_shard: CountingServer, zygote: Zygote, cache_dir: Path, tmp_path: Path
) -> None:
    """By a clock that the test sets: 20 seconds from one piece to the next, with a patience of 30."""
    steps = tuple(MIB * eighths // 8 for eighths in range(2, 8))
    clock, looks = tmp_path / "time", tmp_path / "time.looks"
    clock.write_text("0")
    one_shard.holds[SHARD] = steps
    holder = zygote.start(kills.fetch, one_shard.url, cache_dir=cache_dir)
    directory = model_directory(cache_dir, one_shard.url)
    wait_until(lambda: part_bytes(directory) == steps[0])
    waiter = start_waiter(one_shard, zygote, cache_dir, 30.0, clock)
    for seconds, step in enumerate(steps[1:], 1):
        one_shard.go.release()
        wait_until(lambda step=step: part_bytes(directory) == step)
        # What is looked at before the second look from now on is the part as it is now.
        enough = looks.stat().st_size + 2
        wait_until(lambda enough=enough: looks.stat().st_size >= enough)
        clock.with_suffix(".new").write_text(str(20.0 * seconds))
        clock.with_suffix(".new").replace(clock)
    assert waiter.is_running
    one_shard.go.release()
    holder.result()
    waiter.result()
    assert ranges(one_shard) == [None]
    assert_fetched(directory, one_shard)


# --- row 29: no room ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a test that failed may have files open


def mount(*args: str) -> None:
    try:
        subprocess.run(["mount", *args], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a tmpfs is not permitted: {error}")


def test_row_29_no_room_for_the_model_is_noticed_before_the_download(
    model: Path, counting: Serve, small_disk: Path
) -> None:
    models.simple_model(model, shards=8, shard_bytes=MIB // 2)
    server = counting(model)
    with pytest.raises(ndcache.DiskFullError) as caught:
        ndcache.fetch(server.url, cache_dir=small_disk)
    assert (caught.value.expected, caught.value.received) == (4 * MIB, shutil.disk_usage(small_disk).free)
    assert server.shard_requests() == []


@pytest.mark.parametrize("max_workers", [1, 4])
def test_row_29_what_fitted_on_a_disk_that_fills_up_is_kept(
    model: Path, counting: Serve, small_disk: Path, monkeypatch: pytest.MonkeyPatch, max_workers: int
) -> None:
    arrays = models.simple_model(model, shards=8, shard_bytes=MIB // 2)
    server = counting(model)
    with monkeypatch.context() as patch:
        patch.setattr("ndcache.sources.remote.check_free_space", lambda *_: None)  # somebody else fills it
        with pytest.raises(ndcache.DiskFullError) as caught:
            ndcache.fetch(server.url, cache_dir=small_disk, max_workers=max_workers)
    assert caught.value.errno == errno.ENOSPC
    directory = model_directory(small_disk, server.url)
    assert check_published(directory, kills.digests(model)) >= 3  # with the manifest
    missing = {f"/{name}" for name in kills.digests(model).keys() - kills.digests(directory).keys()}
    if max_workers == 1:
        assert not [name for name in left_behind(directory) if name.startswith("parts/")]
    mount("-o", "remount,size=12m", str(small_disk))
    server.requests.clear()
    assert load(server.url, cache_dir=small_disk) == digest_of(arrays)
    assert {request.path for request in server.shard_requests()} <= missing
    assert left_behind(directory) == []


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("call", ["fsync", "close"])
def test_row_29_no_room_is_noticed_when_a_file_is_synced_or_closed(
    one_shard: CountingServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: str
) -> None:
    failed: list[str] = []

    def fail_once(handle: int) -> None:
        if not failed and os.fstat(handle).st_size == MIB:
            failed.append(call)
            raise OSError(getattr(errno, number), "no room")

    class LateFile(io.FileIO):
        """Says only when it is closed that there was no room, as on NFS."""

        def close(self) -> None:
            try:
                if not self.closed:
                    fail_once(self.fileno())
            finally:
                super().close()

    really_sync, really_open = os.fsync, os.fdopen

    def fsync(handle: int) -> None:
        fail_once(handle)
        really_sync(handle)

    def fdopen(handle: int, mode: str = "r", *args: Any, **options: Any) -> Any:
        return LateFile(handle, "r+b") if mode == "r+b" else really_open(handle, mode, *args, **options)

    monkeypatch.setattr(os, *(("fsync", fsync) if call == "fsync" else ("fdopen", fdopen)))
    with pytest.raises(ndcache.DiskFullError) as caught:
        ndcache.fetch(one_shard.url)
    assert (caught.value.errno, caught.value.shard, failed) == (errno.ENOSPC, "params_shard_0.bin", [call])
    directory = model_directory(cache_dir, one_shard.url)
    assert check_published(directory, kills.digests(one_shard.directory)) == 1
    assert not [name for name in left_behind(directory) if name.startswith("parts/")]
    ndcache.fetch(one_shard.url)
    assert_fetched(directory, one_shard)


# --- row 30: somebody else's --------------------------------------------------------------------------


def test_row_30_a_cache_of_another_user_serves_what_it_has(model: Path, counting: Serve, zygote: Zygote) -> None:
    arrays = models.simple_model(model)
    server = counting(model)
    names = ["layer.0", "layer.2"]
    with tempfile.TemporaryDirectory() as folder:  # not in pytest's, which nobody else may enter
        os.chmod(folder, 0o755)
        child = zygote.start(load_as_nobody, server.url, names, Path(folder) / "cache")
        try:
            online, offline, all_of_it, error = child.result()
        except PermissionError as refused:
            pytest.skip(f"only root can become somebody else: {refused}")
    assert online == offline == digest_of({name: arrays[name] for name in names})
    assert all_of_it == digest_of(arrays)
    assert isinstance(error, ndcache.CacheUnavailableError), error
    assert "NDCACHE_HOME" in str(error)


@pytest.mark.parametrize(
    "planted",
    [".ndcache", ".ndcache/locks", ".ndcache/parts", ".ndcache/validators", f".ndcache/locks{SHARD}", SHARD[1:]],
)
@pytest.mark.parametrize("leads_to", ["something", "nothing"])
def test_row_30_the_victim_of_a_planted_link_is_untouched(
    one_shard: CountingServer, cache_dir: Path, tmp_path: Path, planted: str, leads_to: str
) -> None:
    victim = tmp_path / "victim"
    is_file = planted.endswith(".bin")
    victim.mkdir()
    (victim / "file").write_bytes(b"precious")
    target = (victim / "file" if is_file else victim) if leads_to == "something" else victim / "new"
    link = model_directory(cache_dir, one_shard.url) / planted
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    if planted == SHARD[1:]:
        assert ndcache.fetch(one_shard.url) == link.parent
        assert not link.is_symlink()
        assert_fetched(link.parent, one_shard)
    else:
        with pytest.raises(ndcache.UnsafeCacheError):
            ndcache.fetch(one_shard.url)
        assert link.is_symlink()
    assert {path.name: path.read_bytes() for path in victim.iterdir()} == {"file": b"precious"}


# --- row 32: deleted meanwhile ------------------------------------------------------------------------


def test_row_32_a_load_from_the_cache_outlives_the_cache(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    arrays = models.simple_model(model, shards=12)
    server = counting(model)
    ndcache.fetch(server.url)
    server.close()
    tensors = ndcache.stream(server.url, offline=True, max_workers=1, memory_limit=1)
    loaded = dict([next(tensors)])
    assert zygote.start(ndcache.delete, server.url, cache_dir=cache_dir).result() > 0
    assert not ndcache.is_cached(server.url)
    loaded.update(tensors)
    assert digest_of(loaded) == digest_of(arrays)


def test_row_32_a_load_from_the_server_outlives_the_cache(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    arrays = models.simple_model(model, shards=6, shard_bytes=MIB // 4)
    server = counting(model)
    server.holds = {f"/params_shard_{index}.bin": (MIB // 8,) for index in (1, 2, 4)}
    loading = zygote.start(load, server.url, cache_dir=cache_dir, max_workers=2)
    wait_until(lambda: part_bytes(model_directory(cache_dir, server.url)) == 2 * MIB // 8)
    zygote.start(ndcache.delete, server.url, cache_dir=cache_dir).result()
    server.go.release(100)
    assert loading.result() == digest_of(arrays)
    assert load(server.url, cache_dir=cache_dir) == digest_of(arrays)
    assert left_behind(model_directory(cache_dir, server.url)) == []


# --- row 37: forks and threads ------------------------------------------------------------------------


@pytest.mark.parametrize("with_session", [False, True], ids=["own session", "the caller's session"])
def test_row_37_a_fork_shares_no_connection(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path, with_session: bool
) -> None:
    arrays = models.simple_model(model)
    server = counting(model)
    loading = zygote.start(load_around_a_fork, server.url, cache_dir, with_session=with_session)
    assert loading.result() == [digest_of(arrays)] * 3
    assert len(server.requests) == 15  # the manifest and four shards, three times
    before, in_child, after = (server.requests[index : index + 5] for index in (0, 5, 10))
    assert peers(before) == peers(after)  # the child did not spoil the parent's
    assert not peers(before) & peers(in_child)


def test_row_37_a_fork_in_the_middle_of_a_load_can_load(
    tmp_path: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    held = models.simple_model(tmp_path / "held", shards=2, shard_bytes=MIB)
    other = models.simple_model(tmp_path / "other", shards=3)
    server, second = counting(tmp_path / "held"), counting(tmp_path / "other")
    server.holds[SHARD] = (MIB // 2,)
    forked = tmp_path / "forked"
    loading = zygote.start(load_in_forks_of_a_load, server.url, [second.url] * 2, cache_dir, forked)
    wait_until(lambda: forked.exists() or not loading.is_running)
    server.go.release()
    assert loading.result() == [digest_of(held), *[digest_of(other)] * 2, digest_of(held)]
    assert left_behind(model_directory(cache_dir, server.url)) == []


def test_row_37_a_fork_at_any_moment_of_a_load_can_load(
    tmp_path: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    models.simple_model(tmp_path / "busy", shards=6, shard_bytes=1 << 14)
    arrays = models.simple_model(tmp_path / "other", shards=2)
    busy, server = counting(tmp_path / "busy"), counting(tmp_path / "other")
    loading = zygote.start(fork_at_any_moment, busy.url, server.url, cache_dir, 20)
    assert loading.result() == [digest_of(arrays)] * 20


def test_row_37_threads_share_one_download(model: Path, counting: Serve, cache_dir: Path) -> None:
    arrays = models.simple_model(model, shards=6, shard_bytes=MIB // 2)
    server = counting(model, rate=8 * MIB)
    barrier = threading.Barrier(8)

    def load_together() -> str:
        barrier.wait(60)
        return load_with(loader, server.url)

    with ndcache.Loader() as loader, ThreadPoolExecutor(8) as pool:
        loading = [pool.submit(load_together) for _ in range(8)]
        assert {future.result(60) for future in loading} == {digest_of(arrays)}
    assert server.sent_bytes <= 1.05 * 3 * MIB
    assert left_behind(model_directory(cache_dir, server.url)) == []


def test_row_37_threads_load_models_with_one_loader(tmp_path: Path, counting: Serve) -> None:
    contents = []
    for index in range(4):
        shards = [{f"t{n}": models.random_array((1 << 16,), seed=10 * index + n)} for n in range(4)]
        models.write_model(tmp_path / str(index), shards)
        contents.append({name: array for shard in shards for name, array in shard.items()})
    servers = [counting(tmp_path / str(index)) for index in range(4)]
    with ndcache.Loader(max_workers=3) as loader, ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda server: load_with(loader, server.url), servers * 2))
    assert loaded == [digest_of(arrays) for arrays in contents] * 2
