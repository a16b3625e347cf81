"""Download locks: who waits for whom, how long, and what happens where locks do nothing."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest

import ndcache
from ndcache.store import lock as locks
from ndcache.store.lock import DownloadLock, Patience, acquire_or_wait, try_lock


def never() -> bool:
    return False


def is_portable(path: Path) -> bool:
    """Return whether filelock makes the lock."""
    return isinstance(locks._lock(path), locks._PortableLock)


class Sleeper:
    """Stands in for sleeping: each call lets the next thing happen instead."""

    def __init__(self, *happenings: Callable[[], object]) -> None:
        self.happenings = list(happenings)
        self.seconds = 0.0

    def __call__(self, seconds: float) -> None:
        self.seconds += seconds
        if self.happenings:
            self.happenings.pop(0)()


class Clock:
    """A clock on which time passes only while somebody sleeps."""

    def __init__(self, sleeper: Sleeper) -> None:
        self.sleeper = sleeper

    def monotonic(self) -> float:
        return self.sleeper.seconds


@pytest.fixture(params=["flock", "filelock"])
def path(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a lock's file, for each kind of lock."""
    if request.param == "flock":
        pytest.importorskip("fcntl")
    else:
        monkeypatch.setattr(locks, "fcntl", None)
    return tmp_path / "params_shard_0.bin"


def with_kind(kind: str) -> pytest.MarkDecorator:
    """Run a test with one kind of lock only."""
    return pytest.mark.parametrize("path", [kind], indirect=True)


NO_LOCKS = [OSError(errno.ENOLCK, "No locks available"), OSError(errno.ENOTSUP, "Operation not supported")]


def test_a_free_lock_is_acquired_at_once(path: Path) -> None:
    sleep = Sleeper()
    with acquire_or_wait(path, is_there=never, progress=int, sleep=sleep) as mine:
        assert mine == DownloadLock(is_exclusive=True)
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(path).acquire(blocking=False)
    filelock.FileLock(path).acquire(blocking=False).lock.release()
    assert sleep.seconds == 0


def test_the_lock_is_removed_when_the_file_is_there(path: Path) -> None:
    found = [False]
    with acquire_or_wait(path, is_there=lambda: found[0], progress=int, sleep=Sleeper()):
        found[0] = True
    assert not path.exists()
    with acquire_or_wait(path, is_there=never, progress=int, sleep=Sleeper()):
        pass
    assert path.exists()  # others may wait for it


def test_waiting_ends_when_the_file_is_there(path: Path) -> None:
    found = [False]
    with filelock.FileLock(path):
        sleep = Sleeper(lambda: None, lambda: found.__setitem__(0, True))
        with acquire_or_wait(path, is_there=lambda: found[0], progress=int, sleep=sleep) as mine:
            assert mine is None
    assert sleep.happenings == []


def test_row_28_waiting_ends_when_the_holder_releases_the_lock(path: Path) -> None:
    lock = filelock.FileLock(path)
    lock.acquire()
    with acquire_or_wait(path, is_there=never, progress=int, sleep=Sleeper(lambda: None, lock.release)) as mine:
        assert mine == DownloadLock(is_exclusive=True)


@pytest.mark.parametrize("moves", [0, 5])
def test_row_28_waiting_ends_when_the_holder_shows_no_progress(
    path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    sleep = Sleeper()
    monkeypatch.setattr(locks, "time", Clock(sleep))

    def progress() -> int:
        """Change every 25 seconds, `moves` times."""
        return min(int(sleep.seconds / 25), moves)

    with filelock.FileLock(path), acquire_or_wait(path, is_there=never, progress=progress, sleep=sleep) as mine:
        assert mine == DownloadLock(is_exclusive=False)
    assert 28 <= sleep.seconds - 25 * moves <= 35


def test_row_28_a_wait_that_is_continued_later_has_the_same_patience(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep, patience = Sleeper(), Patience()
    monkeypatch.setattr(locks, "time", Clock(sleep))

    def leave(seconds: float) -> None:
        sleep(5.0)
        raise TimeoutError

    with filelock.FileLock(path):
        for _ in range(10):
            try:
                with acquire_or_wait(path, is_there=never, progress=int, sleep=leave, patience=patience) as mine:
                    break
            except TimeoutError:
                continue
    assert mine == DownloadLock(is_exclusive=False)
    assert 28 <= sleep.seconds <= 35


def test_looks_are_frequent_while_there_is_progress_and_looking_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep, patience = Sleeper(), Patience()
    monkeypatch.setattr(locks, "time", Clock(sleep))

    def pauses(count: int, progress: Callable[[], int], look_seconds: float) -> list[float]:
        found = []
        for _ in range(count):
            assert not patience.is_exhausted(progress(), look_seconds)
            found.append(patience.pause)
            sleep(patience.pause)
        return found

    moving = itertools.count().__next__
    assert max(pauses(50, moving, 0.0005)) <= 0.05
    assert pauses(100, lambda: -1, 0.0005)[-1] == 0.5
    assert max(pauses(50, moving, 0.0005)[1:]) <= 0.05
    assert pauses(50, moving, 0.005)[-1] == 0.25  # a network file system


def test_waiting_can_be_cancelled(path: Path) -> None:
    def stop(seconds: float) -> None:
        raise ndcache.CancelledError("enough")

    with (
        filelock.FileLock(path),
        pytest.raises(ndcache.CancelledError),
        acquire_or_wait(path, is_there=never, progress=int, sleep=stop),
    ):
        pytest.fail("the lock was not acquired")


def test_the_lock_is_released_after_an_error(path: Path) -> None:
    def fail() -> bool:
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError) as caught,
        acquire_or_wait(path, is_there=fail, progress=int, sleep=Sleeper()),
    ):
        pass
    with acquire_or_wait(path, is_there=never, progress=int, sleep=Sleeper()) as mine:
        assert mine == DownloadLock(is_exclusive=True)
    assert caught.value.__traceback__ is not None  # its frames still hold the first lock


def test_try_lock_takes_a_free_lock_only(path: Path) -> None:
    with try_lock(path) as is_free:
        assert is_free
        with try_lock(path) as is_free_too:
            assert not is_free_too
    with acquire_or_wait(path, is_there=never, progress=int, sleep=Sleeper()), try_lock(path) as is_free:
        assert not is_free


def test_row_27_a_lock_that_everybody_gets_is_not_exclusive(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems accept locks and do nothing."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    for _ in range(2):
        with acquire_or_wait(path, is_there=never, progress=int, sleep=Sleeper()) as mine:
            assert mine == DownloadLock(is_exclusive=False)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        *(("flock", error) for error in NO_LOCKS),
        *(("filelock", error) for error in (*NO_LOCKS, NotImplementedError("none"), UserWarning("none"))),
    ],
    indirect=["path"],
)
def test_row_27_without_locks_a_download_is_not_exclusive(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    if is_portable(path):
        monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    else:
        monkeypatch.setattr("fcntl.flock", fail)
    with acquire_or_wait(path, is_there=never, progress=int, sleep=Sleeper()) as mine:
        assert mine == DownloadLock(is_exclusive=False)


@with_kind("flock")
def test_a_file_with_another_name_is_no_lock(path: Path, tmp_path: Path) -> None:
    """Somebody may have linked a file of his own there, or a precious one."""
    (tmp_path / "other").touch()
    os.link(tmp_path / "other", path)
    with acquire_or_wait(path, is_there=never, progress=int, sleep=Sleeper()) as mine:
        assert mine == DownloadLock(is_exclusive=False)


@with_kind("flock")  # not every version of filelock notices it
def test_a_lock_whose_file_was_removed_meanwhile_is_not_held(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last holder removes the file; whoever had opened it before must not take it for the lock."""
    fcntl = pytest.importorskip("fcntl")
    really_flock, removals = fcntl.flock, [1]

    def flock(handle: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and removals:
            removals.pop()
            os.unlink(path)
        really_flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    sleep = Sleeper()
    with acquire_or_wait(path, is_there=never, progress=int, sleep=sleep) as mine:
        assert mine == DownloadLock(is_exclusive=True)
        assert path.exists()
    assert sleep.seconds > 0


@with_kind("flock")
def test_row_26_a_lock_that_is_removed_as_it_is_opened_is_no_lack_of_locks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise two loads would download the same file."""
    really_open, removals = os.open, [1, 2, 3]

    def opened(name: Path, *options: int) -> int:
        handle = really_open(name, *options)
        if removals:
            removals.pop()
            os.unlink(path)
        return handle

    monkeypatch.setattr(os, "open", opened)
    with acquire_or_wait(path, is_there=never, progress=int, sleep=Sleeper()) as mine:
        assert mine == DownloadLock(is_exclusive=True)
    assert not removals


def test_row_30_a_symlink_at_the_locks_name_is_refused(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)
    with (
        pytest.raises(ndcache.UnsafeCacheError, match="symbolic link"),
        acquire_or_wait(path, is_there=never, progress=int, sleep=Sleeper()),
    ):
        pytest.fail("it was used")
    assert victim.read_text() == "precious"


def test_row_30_a_symlink_planted_at_the_last_moment_is_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)
    monkeypatch.setattr(Path, "is_symlink", lambda self: False)
    with (
        pytest.raises(ndcache.UnsafeCacheError, match="symbolic link"),
        acquire_or_wait(path, is_there=never, progress=int, sleep=Sleeper()),
    ):
        pytest.fail("it was used")
    assert victim.read_text() == "precious"


def test_of_many_threads_one_at_a_time_holds_the_lock_and_all_get_it(path: Path) -> None:
    inside, most, counter = [0], [0], itertools.count()
    guard, pause = threading.Lock(), threading.Event()

    def sleep(seconds: float) -> None:
        pause.wait(seconds / 10)

    def work() -> None:
        with acquire_or_wait(path, is_there=never, progress=lambda: next(counter), sleep=sleep) as mine:
            assert mine == DownloadLock(is_exclusive=True)
            with guard:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            os.listdir(path.parent)
            with guard:
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most == [1]
