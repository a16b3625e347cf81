"""Locks on downloads. They save bandwidth, and nothing else depends on them.

On some file systems locks do nothing, a lock's holder can be stopped forever, and a fork of a dead holder can keep its
lock. So a process waits only while there are signs of progress, and two processes that download the same file write
separate partial files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import filelock

from ..errors import UnsafeCacheError
from ..files.descriptors import check_shortage
from ..files.folder import NO_LINKS

__all__ = ["DownloadLock", "acquire_or_wait", "try_lock"]

#: Seconds without a sign of progress after which a lock's holder counts as dead. Each process draws a number from this
#: range, so that of many that wait one goes first, and the others see its progress.
_PATIENCE = (28.0, 33.0)
#: Seconds between two attempts, at first and at most.
_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
#: By folder, whether locks in it were seen to work.
_are_effective: dict[Path, bool] = {}


class _Result(Enum):
    """How an attempt to get a lock ended."""

    HELD = auto()
    BUSY = auto()  # somebody else holds it
    UNAVAILABLE = auto()  # there are no locks here
    NOT_NEEDED = auto()  # the file to download is there


@dataclass(frozen=True)
class DownloadLock:
    """Permission to download a file.

    Attributes
    ----------
    is_exclusive : bool
        Whether the lock is held and keeps others out. If not, its holder shows no progress, or locks do not work here.
    """

    is_exclusive: bool


@contextlib.contextmanager
def acquire_or_wait(
    path: Path, *, is_there: Callable[[], bool], progress: Callable[[], Hashable], sleep: Callable[[float], None]
) -> Iterator[DownloadLock | None]:
    """Wait until this thread should download a file, or somebody else has done so.

    Parameters
    ----------
    path : pathlib.Path
        The lock's file, in a folder that exists. It is removed at the end of the block if the downloaded file is there.
    is_there : callable
        Return whether the file to download is there.
    progress : callable
        Return a value that changes while somebody downloads the file.
    sleep : callable
        Wait for a number of seconds; may raise to stop waiting.

    Yields
    ------
    DownloadLock or None
        None if the file is there.
    """
    lock = _lock(path)
    result = _wait(lock, is_there, progress, sleep)
    if result is _Result.NOT_NEEDED:
        yield None
        return
    is_held = result is _Result.HELD
    try:
        yield DownloadLock(is_exclusive=is_held and _excludes_others(path))
        if is_held and is_there():
            with contextlib.suppress(OSError):
                os.unlink(path)  # while it is held: those who wait for it see the file, and need no lock
    finally:
        if lock is not None and is_held:
            lock.release()


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Take a lock for the block unless somebody holds it; yield whether it was taken and keeps others out."""
    lock = _lock(path)
    is_held = _try(lock, is_prepared=True) is _Result.HELD
    try:
        yield is_held and _excludes_others(path)
    finally:
        if lock is not None and is_held:
            lock.release()


def _wait(
    lock: filelock.BaseFileLock | None,
    is_there: Callable[[], bool],
    progress: Callable[[], Hashable],
    sleep: Callable[[float], None],
) -> _Result:
    """Wait for the lock, or the file; return `_Result.BUSY` once its holder has shown no progress for too long."""
    pause, patience = _PAUSE, random.uniform(*_PATIENCE)
    seen: Hashable = None
    since = time.monotonic()
    result = _try(lock, is_prepared=True)
    while result is _Result.BUSY:
        sleep(pause * random.uniform(0.5, 1.0))
        pause = min(pause * 1.5, _LONGEST_PAUSE)
        if is_there():
            return _Result.NOT_NEEDED
        now = progress()
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > patience:
            return _Result.BUSY
        result = _try(lock)
    return result


def _lock(path: Path) -> filelock.BaseFileLock | None:
    """Return a lock whose file has the mode that the umask and the folder give it; None if there can be no lock.

    The mode that filelock gives by default ignores both.
    """
    status = _prepare(path)
    return None if status is None else filelock.FileLock(path, mode=0o600 | stat.S_IMODE(status.st_mode))


def _prepare(path: Path) -> os.stat_result | None:
    """Create the lock's file if it is missing, and return its status; None if it cannot serve as a lock.

    filelock opens the file that it finds, sets its mode, and in many versions empties it. So it must be a regular file
    without another hard link. File systems that do not count links give no locks either: filelock would take the file
    for removed.
    """
    try:
        try:
            handle = os.open(path, os.O_RDWR | NO_LINKS)
        except FileNotFoundError:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINKS, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _unsafe(path) from error
        check_shortage(error)
        return None
    try:
        status = os.fstat(handle)
    finally:
        os.close(handle)
    return status if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else None


def _try(lock: filelock.BaseFileLock | None, *, is_prepared: bool = False) -> _Result:
    """Try to get a lock at once; prepare its file first unless that was done just now."""
    if lock is None or not (is_prepared or _prepare(Path(lock.lock_file))):
        return _Result.UNAVAILABLE
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return _Result.BUSY
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _unsafe(Path(lock.lock_file)) from error
        check_shortage(error)
        return _Result.UNAVAILABLE
    except (NotImplementedError, Warning):  # from some versions of filelock, on file systems without locks
        return _Result.UNAVAILABLE
    return _Result.HELD


def _excludes_others(path: Path) -> bool:
    """Return whether a lock that is held keeps others out; on some file systems everybody gets it."""
    if path.parent not in _are_effective:
        other = _lock(path)
        result = _try(other, is_prepared=True)
        if other is not None and result is _Result.HELD:
            other.release()
        _are_effective[path.parent] = result is _Result.BUSY  # an error on the way proves nothing
    return _are_effective[path.parent]


def _unsafe(path: Path) -> UnsafeCacheError:
    return UnsafeCacheError(f"{path} is a symbolic link", hint="It was left alone: see who put it there.")
