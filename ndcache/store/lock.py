"""Whose turn it is to download a file: locks that save bandwidth, and on which nothing else rests.

On some file systems locks do nothing, a lock's holder can be stopped for ever, and a fork of it can keep the lock when
it is dead. So nobody waits longer than there are signs of progress, and two who download the same file do so into
parts of their own.
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
from pathlib import Path

import filelock

from ..errors import UnsafeCacheError
from ..files.descriptors import check_shortage
from ..files.folder import NO_LINKS

__all__ = ["DownloadLock", "acquire_or_wait", "try_lock"]

#: Seconds without a sign of progress after which a lock's holder is taken for dead: drawn from this range, so that of
#: many who wait one goes first and the others see its progress.
_PATIENCE = (28.0, 33.0)
#: Seconds between looks, from the first to the last.
_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
#: Whether locks were seen to work in a folder.
_work_in: dict[Path, bool] = {}


@dataclass(frozen=True)
class DownloadLock:
    """One's turn to download a file.

    Attributes
    ----------
    is_exclusive : bool
        Whether the lock is held and nobody else can hold it. If not, the one who holds it is too slow, or locks do not
        work here.
    """

    is_exclusive: bool


@contextlib.contextmanager
def acquire_or_wait(
    path: Path, *, is_there: Callable[[], bool], progress: Callable[[], Hashable], sleep: Callable[[float], None]
) -> Iterator[DownloadLock | None]:
    """Wait for one's turn to download a file, or until somebody else has done it.

    Parameters
    ----------
    path : pathlib.Path
        The lock's file, in a folder that exists. It is removed at the end of the block if the file is there then.
    is_there : callable
        Whether the file that is to be downloaded is there.
    progress : callable
        Gives something that changes while somebody downloads it.
    sleep : callable
        Waits for so many seconds; may raise to end it.

    Yields
    ------
    Turn or None
        None if the file is there.
    """
    lock = _lock(path)
    is_held = _wait(lock, is_there, progress, sleep)
    if is_held is None:
        yield None
        return
    try:
        yield DownloadLock(is_exclusive=is_held and _excludes_others(path))
        if is_held and is_there():
            with contextlib.suppress(OSError):
                os.unlink(path)  # while it is held: whoever waits for it will see the file, and not need it
    finally:
        if lock is not None and is_held:
            lock.release()


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Whether nobody holds the lock; nobody else gets it in the block then."""
    lock = _lock(path)
    is_held = _try(lock, is_prepared=True)
    try:
        yield bool(is_held) and _excludes_others(path)
    finally:
        if lock is not None and is_held:
            lock.release()


def _wait(
    lock: filelock.BaseFileLock | None,
    is_there: Callable[[], bool],
    progress: Callable[[], Hashable],
    sleep: Callable[[float], None],
) -> bool | None:
    """Whether the lock was got; None if the file is there, so that nobody needs it."""
    pause, patience = _PAUSE, random.uniform(*_PATIENCE)
    seen: Hashable = None
    since = time.monotonic()
    is_held = _try(lock, is_prepared=True)
    while True:
        if is_held is not False:
            return bool(is_held)
        sleep(pause * random.uniform(0.5, 1.0))
        pause = min(pause * 1.5, _LONGEST_PAUSE)
        if is_there():
            return None
        now = progress()
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > patience:
            return False
        is_held = _try(lock)


def _lock(path: Path) -> filelock.BaseFileLock | None:
    """Return a lock whose file has the mode that the umask and the folder give it, which filelock's own does not.

    It is None if there can be no lock.
    """
    status = _prepare(path)
    return None if status is None else filelock.FileLock(path, mode=0o600 | stat.S_IMODE(status.st_mode))


def _prepare(path: Path) -> os.stat_result | None:
    """Make the lock's file unless it is there; None if there is something else, or it cannot be used.

    filelock opens what it finds, gives it its mode, and in many versions empties it: no other name may stand for that,
    and it must be a file. A file system that counts no names gives no locks either, as filelock takes the file for
    removed.
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


def _try(lock: filelock.BaseFileLock | None, *, is_prepared: bool = False) -> bool | None:
    """Whether the lock was got, whose file was prepared just now or will be; None if there are no locks here."""
    if lock is None or not (is_prepared or _prepare(Path(lock.lock_file))):
        return None
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return False
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _unsafe(Path(lock.lock_file)) from error
        check_shortage(error)
        return None
    except (NotImplementedError, Warning):  # filelock's words, by version, for a file system without locks
        return None
    return True


def _excludes_others(path: Path) -> bool:
    """Whether the lock that is held keeps others out; on some file systems everybody gets it."""
    if path.parent not in _work_in:
        other = _lock(path)
        got_it = _try(other, is_prepared=True)
        if other is not None and got_it:
            other.release()
        _work_in[path.parent] = got_it is False  # an error on the way tells nothing
    return _work_in[path.parent]


def _unsafe(path: Path) -> UnsafeCacheError:
    return UnsafeCacheError(f"{path} is a symbolic link", hint="It was left alone: look who put it there.")
