"""Record the processes that use a model, and the time of its last use.

Both are told by one small file of the model's state, ``used``. A load holds a shared lock on it until the load ends
and, on the CPU, as long as its `Weights` are open; the system releases the locks of a process that dies. Whoever
removes a model that nobody has named takes the lock exclusively before. The time of the file is that of the last use.

On Linux, the lock is held by a map of the file, which needs no descriptor: a map keeps the file open that it was made
of. On overlayfs it keeps only the file of a layer open, which does not have the lock; there, each use has a descriptor.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path

from ...files.folder import Folder
from ..layout import Layout
from ..lock import is_locked

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["FILE", "Use", "begin_use", "is_used", "last_use", "unused"]

#: The name of the file.
FILE = "used"
_CONTENT = b"\n"  # no empty file can be mapped
#: Attempts to get a shared lock: whoever removes a model holds it for a moment. Attempts to get an exclusive one:
#: listings try it. Seconds between two of them.
_ATTEMPTS, _LOOKS, _PAUSE = 50, 3, 0.01
#: File systems whose files are kept by others: a map is one of the other's file.
_LAYERED = ("overlay", "aufs", "unionfs")


class Use:
    """The use of a model by this process, which ends with `end` or with the object.

    Parameters
    ----------
    handle : int
        The descriptor of the file, with the lock.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._process = os.getpid()
        self._pages: object = None

    def close_descriptor(self) -> None:
        """Hold the lock by a map of the file from now on, if the file can be mapped."""
        from ...files.mapping import map_file  # needs NumPy, which processes that only download do not

        with contextlib.suppress(OSError, ValueError), open(self._handle, "rb", 0, closefd=False) as file:
            self._pages = map_file(file, len(_CONTENT))
            os.close(self._handle)
            self._handle = -1

    def end(self) -> None:
        """Let others remove the model. A second call does nothing."""
        handle, self._handle, self._pages = self._handle, -1, None
        if handle >= 0:
            if fcntl is not None and os.getpid() == self._process:  # a fork must not release the lock of its parent
                with contextlib.suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_UN)  # also for forks that have the file open
            os.close(handle)

    def __del__(self) -> None:
        self.end()


def begin_use(layout: Layout, *, creates: bool = True) -> Use | None:
    """Note that a model is used from now on; return None if that cannot be noted.

    Parameters
    ----------
    layout : Layout
        Of the model's directory, which need not exist.
    creates : bool
        Whether to make the file if it is missing.
    """
    state = layout.state
    with contextlib.suppress(OSError):  # read-only, without descriptors, or gone: no load fails for this
        for attempt in range(_ATTEMPTS):
            handle = state.open_to_read(FILE)
            if handle is None:
                if not creates or not state.exists():
                    return None
                handle = _create(state)
            use = Use(handle)
            is_busy = _lock(handle, exclusive=False) is _Result.BUSY
            # A file that has lost its name since it was opened is that of a model that was removed. One more look is
            # enough, as on some file systems inode numbers change.
            if not is_busy and (attempt > 0 or _has_name(state, handle)):
                with contextlib.suppress(OSError):  # the file is of another account
                    os.utime(handle if os.utime in os.supports_fd else state.path / FILE)
                if _do_maps_hold_locks(handle):
                    use.close_descriptor()
                return use
            use.end()
            time.sleep(_PAUSE if is_busy else 0)
    return None


@contextlib.contextmanager
def unused(layout: Layout) -> Iterator[bool]:
    """Keep loads from beginning to use a model during the block; yield False if one uses it, or downloads a file."""
    state, handle, is_new, is_free = layout.state, -1, False, True
    with contextlib.suppress(OSError):  # a model that this account may not write to cannot be removed, either
        if state.exists():
            is_new = state.status(FILE) is None
            handle = _create(state)
            is_free = _excludes_others(handle)
    try:
        yield is_free and not _is_downloaded(layout)
    finally:
        if is_new and is_free:  # nobody has used the model
            with contextlib.suppress(OSError):
                state.unlink(FILE)
        Use(handle).end()


def is_used(layout: Layout) -> bool:
    """Return whether a load uses a model at this moment, or downloads a file of it."""
    with contextlib.suppress(OSError):
        handle = layout.state.open_to_read(FILE)
        if handle is not None:
            probe = Use(handle)
            is_free = _excludes_others(handle)
            probe.end()
            if not is_free:
                return True
    return _is_downloaded(layout)


def last_use(layout: Layout) -> float:
    """Return when a model was used last, in seconds since 1970; 0 if that is unknown."""
    state, notes = layout.state, layout.metadata
    if (used := _time(state, FILE)) is not None:
        return used
    # Earlier versions of ndcache did not note it: the time when files were added, then.
    places = ((state, "source.json"), (state.parent, state.names[-1]), (notes.parent, notes.names[-1]))
    return max(_time(*place) or 0.0 for place in places)


class _Result(Enum):
    HELD = auto()
    BUSY = auto()
    UNAVAILABLE = auto()


def _lock(handle: int, *, exclusive: bool) -> _Result:
    if fcntl is None:
        return _Result.UNAVAILABLE
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Result.BUSY
    except OSError:  # there are no locks here
        return _Result.UNAVAILABLE
    return _Result.HELD


def _excludes_others(handle: int) -> bool:
    """Lock a file exclusively; return False if others have it locked for more than a moment, as listings do."""
    for _ in range(_LOOKS):
        if _lock(handle, exclusive=True) is not _Result.BUSY:
            return True
        time.sleep(_PAUSE)
    return False


def _create(state: Folder) -> int:
    """Open the file for writing, and make it if it is missing; return a descriptor."""
    handle = state.open_to_write(FILE, creates=True)
    try:
        if not os.fstat(handle).st_size:
            os.write(handle, _CONTENT)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _has_name(state: Folder, handle: int) -> bool:
    """Return whether an open file is still the one of this model."""
    named = state.status(FILE)
    return named is not None and os.path.samestat(named, os.fstat(handle))


def _do_maps_hold_locks(handle: int) -> bool:
    """Return whether a map of an open file keeps its lock, as far as Linux tells."""
    try:
        numbers = re.search(rb"^mnt_id:\s*(\d+)", Path(f"/proc/self/fdinfo/{handle}").read_bytes(), re.MULTILINE)
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    for mount in mounts:
        number, *_ = mount.split(b" ", 1)
        if numbers is not None and number == numbers[1]:
            kind = mount.partition(b" - ")[2].split(b" ", 1)[0].decode()
            return kind.rpartition(".")[2] not in _LAYERED
    return False


def _time(folder: Folder, name: str) -> float | None:
    with contextlib.suppress(OSError):
        status = folder.status(name)
        return None if status is None else status.st_mtime
    return None


def _is_downloaded(layout: Layout) -> bool:
    """Return whether somebody downloads a file of a model, perhaps with an earlier version of ndcache."""
    with contextlib.suppress(OSError):
        return any(is_locked(layout.locks.path / name) for name in layout.locks.entries())
    return False
