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
from time import perf_counter

from ..errors import UnsafeCacheError
from ..files.descriptors import check_shortage
from ..files.folder import NO_LINKS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["DownloadLock", "Patience", "acquire_or_wait", "find_holder", "is_locked", "share_lock", "try_lock"]

_OPEN = os.O_RDWR | NO_LINKS
_CREATE = _OPEN | os.O_CREAT

#: Seconds without a sign of progress after which a lock's holder counts as dead. Each process draws a number from this
#: range, so that of many that wait one goes first, and the others see its progress.
_PATIENCE = (28.0, 33.0)
#: Seconds between two attempts: at first, and at most.
_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
#: Seconds since the last sign of progress until which the pauses stay short: the file may be there at any moment.
_PROMPT = 2.0
#: The ratio of a short pause to the time of a look. On a local disk a look takes less than a millisecond; on a network
#: file system with slow answers, the pauses are longer.
_LOOK_TO_PAUSE = 50
#: How often to open a lock's file that is removed each time.
_OPENINGS = 5
#: How often to try to share a lock. Those who take it alone do so for a moment.
_SHARINGS = 100
#: By folder, whether locks in it were seen to work.
_are_effective: dict[Path, bool] = {}


class _Result(Enum):
    """The result of an attempt to get a lock."""

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


class Patience:
    """A policy for waiting: how long for the holder of a lock, and how often to look.

    Attributes
    ----------
    pause : float
        Seconds until the next look.
    """

    def __init__(self) -> None:
        self.pause = _PAUSE
        self._limit = random.uniform(*_PATIENCE)
        self._seen: Hashable = None
        self._since = 0.0  # when it was first seen

    def is_exhausted(self, progress: Hashable, look_seconds: float) -> bool:
        """Return whether `progress` has not changed for too long. If not, set `pause`, by how long a look takes."""
        now = time.monotonic()
        if progress != self._seen:
            self._seen, self._since = progress, now
        elif now - self._since > self._limit:
            return True
        longest = _LONGEST_PAUSE if now - self._since > _PROMPT else _LOOK_TO_PAUSE * look_seconds
        self.pause = min(max(_PAUSE, longest), self.pause * 1.5, _LONGEST_PAUSE)
        return False


@contextlib.contextmanager
def acquire_or_wait(
    path: Path,
    *,
    is_there: Callable[[], bool],
    progress: Callable[[], Hashable],
    sleep: Callable[[float], None],
    patience: Patience | None = None,
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
    patience : Patience, optional
        That of an earlier call, whose wait this one continues.

    Yields
    ------
    DownloadLock or None
        None if the file is there.
    """
    lock = _lock(path)
    result = _wait(lock, is_there, progress, sleep, patience or Patience())
    if result is _Result.NOT_NEEDED:
        yield None
        return
    is_held = result is _Result.HELD
    try:
        yield DownloadLock(is_exclusive=is_held and _excludes_others(path))
        if is_held:
            _remove_if(path, is_there)
    finally:
        if is_held:
            lock.release()


@contextlib.contextmanager
def try_lock(path: Path, is_there: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Take a lock for the block unless somebody holds it; yield whether it was taken and keeps others out.

    The lock's file is removed at the end of the block if `is_there` says that the downloaded file is there.
    """
    lock = _lock(path)
    is_held = _try(lock) is _Result.HELD
    try:
        yield is_held and _excludes_others(path)
        if is_held:
            _remove_if(path, is_there)
    finally:
        if is_held:
            lock.release()


@contextlib.contextmanager
def share_lock(path: Path) -> Iterator[None]:
    """Hold a lock for the block together with others that share it: nobody gets it alone meanwhile.

    The block runs without it where locks cannot be shared (Windows), or there are none.
    """
    lock = None if fcntl is None else _FileLock(path, is_shared=True)
    result = _Result.UNAVAILABLE if lock is None else _try(lock)
    for _ in range(_SHARINGS):
        if lock is None or result is not _Result.BUSY:
            break
        time.sleep(_PAUSE)
        result = _try(lock)
    try:
        yield
    finally:
        if lock is not None and result is _Result.HELD:
            lock.release()


def is_locked(path: Path) -> bool:
    """Return whether somebody holds a lock, whose file exists."""
    lock = _lock(path)
    result = _try(lock)
    if result is _Result.HELD:
        lock.release()
    return result is _Result.BUSY


def find_holder(path: Path) -> int | None:
    """Return the id of the process that holds a lock; None if nobody does, or it cannot be known.

    Linux lists the locks of the processes that this one can see: none on other machines, and none of other containers.
    Other systems do not tell.
    """
    try:
        inode = os.stat(path).st_ino
        with open("/proc/locks", encoding="ascii", errors="replace") as file:
            # "1: FLOCK  ADVISORY  WRITE 1234 08:01:131073 0 EOF". The device is not compared: some file systems have
            # another one here than in their files' status.
            fields = [line.split() for line in file]
    except OSError:
        return None
    found = {int(each[4]) for each in fields if each[1:2] == ["FLOCK"] and each[5].rpartition(":")[2] == str(inode)}
    return found.pop() if len(found) == 1 and min(found) > 0 else None


def _remove_if(path: Path, is_there: Callable[[], bool]) -> None:
    """Remove the file of a lock that is held: those who wait for it see the downloaded file, and need no lock."""
    if is_there():
        with contextlib.suppress(OSError):
            os.unlink(path)


def _wait(
    lock: _FileLock | _PortableLock,
    is_there: Callable[[], bool],
    progress: Callable[[], Hashable],
    sleep: Callable[[float], None],
    patience: Patience,
) -> _Result:
    """Wait for the lock, or the file; return `_Result.BUSY` once its holder has shown no progress for too long."""
    result = _try(lock)
    while result is _Result.BUSY:
        begun = perf_counter()
        if patience.is_exhausted(progress(), perf_counter() - begun):
            return result
        sleep(patience.pause * random.uniform(0.5, 1.0))
        if is_there():
            return _Result.NOT_NEEDED
        result = _try(lock)
    return result


class _FileLock:
    """A lock on a file, which keeps out other threads and processes, unless all share it, until it is released.

    filelock does this too, and serves where there is no ``flock`` (Windows), but it takes four times as many system
    calls. Those were a sixth of the cost of a small shard.
    """

    def __init__(self, path: Path, *, is_shared: bool = False) -> None:
        self.path = path
        self._is_shared = is_shared
        self._handle = -1  # of the file, while it is locked

    def try_acquire(self) -> _Result:
        """Take the lock unless somebody holds it; create the file if it is missing, with the mode of the umask.

        Only a regular file without another hard link serves as a lock. File systems that do not count links give no
        locks, either.
        """
        handle, status = self._open_named()
        result = _Result.UNAVAILABLE
        try:
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                fcntl.flock(handle, (fcntl.LOCK_SH if self._is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                # The last holder may have removed the file, so that others lock a new one.
                result = _Result.HELD if os.fstat(handle).st_nlink == 1 else _Result.BUSY
        except BlockingIOError:
            result = _Result.BUSY
        finally:
            if result is _Result.HELD:
                self._handle = handle
            else:
                os.close(handle)
        return result

    def release(self) -> None:
        """Release the lock, which must be held; so does this for the copies of it that forked processes have."""
        handle, self._handle = self._handle, -1
        try:
            fcntl.flock(handle, fcntl.LOCK_UN)
        finally:
            os.close(handle)

    def _open_named(self) -> tuple[int, os.stat_result]:
        """Open the file again if the last holder has removed it just after it was opened."""
        for _ in range(_OPENINGS):
            handle = self._open()
            status = os.fstat(handle)
            if status.st_nlink:
                return handle, status
            os.close(handle)
        handle = self._open()
        return handle, os.fstat(handle)  # this file system does not count links

    def _open(self) -> int:
        try:
            return os.open(self.path, _CREATE | os.O_EXCL, 0o666)
        except FileExistsError:
            pass
        try:
            return os.open(self.path, _OPEN)  # without O_CREAT, which folders like /tmp refuse for others' files
        except FileNotFoundError:
            return os.open(self.path, _CREATE, 0o666)  # it was removed just now


class _PortableLock:
    """The same, by way of filelock."""

    def __init__(self, path: Path) -> None:
        import filelock

        self.path = path
        self._lock = filelock.FileLock(path)
        self._busy = filelock.Timeout

    def try_acquire(self) -> _Result:
        """Take the lock unless somebody holds it."""
        try:
            self._lock.acquire(blocking=False)
        except self._busy:
            return _Result.BUSY
        except (NotImplementedError, Warning):  # from some versions of filelock, on file systems without locks
            return _Result.UNAVAILABLE
        return _Result.HELD

    def release(self) -> None:
        """Release the lock, which must be held."""
        self._lock.release()


def _lock(path: Path) -> _FileLock | _PortableLock:
    return _PortableLock(path) if fcntl is None else _FileLock(path)


def _try(lock: _FileLock | _PortableLock) -> _Result:
    """Try to get a lock at once."""
    try:
        return lock.try_acquire()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _unsafe(lock.path) from error
        check_shortage(error)
        return _Result.UNAVAILABLE


def _excludes_others(path: Path) -> bool:
    """Return whether a lock that is held keeps others out; on some file systems everybody gets it."""
    if path.parent not in _are_effective:
        other = _lock(path)
        result = _try(other)
        if result is _Result.HELD:
            other.release()
        _are_effective[path.parent] = result is _Result.BUSY  # an error on the way proves nothing
    return _are_effective[path.parent]


def _unsafe(path: Path) -> UnsafeCacheError:
    return UnsafeCacheError(f"{path} is a symbolic link", hint="It was left alone: see who put it there.")
