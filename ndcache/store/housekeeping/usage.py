"""Record the processes that use a model, and the time of its last use.

Both are told by one small file for each model, ``<root>/.ndcache/used/<scope>%2F<model>``. A load holds a shared lock
on it until the load ends and, on the CPU, as long as its `Weights` are open; the system releases the locks of a process
that dies. Whoever removes a model that nobody has named takes the lock exclusively before. The time of the file is that
of the last use.

The lock is held by a map of the file, which needs no descriptor: on Linux, a map keeps the file open that it was made
of. On overlayfs it keeps only the file of a layer open, which does not have the lock; there, each use has a descriptor.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path

from ...files.folder import Folder
from ...format.paths import STATE_DIRECTORY, flatten, unflatten
from ..layout import Layout
from ..lock import is_locked

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Use", "begin_use", "forget_use", "forget_uses", "is_used", "last_use", "unused"]

_FOLDER = (STATE_DIRECTORY, "used")
_CONTENT = b"\n"  # no empty file can be mapped
#: Attempts to get a shared lock: whoever removes a model holds it for a moment. Attempts to get an exclusive one:
#: listings try it. Seconds between two of them.
_ATTEMPTS, _LOOKS, _PAUSE = 50, 3, 0.01
#: By the number of a file system, whether a map of a file was seen to hold its lock.
_do_maps_hold_locks: dict[int, bool] = {}


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
        """Hold the lock by a map of the file from now on, if a map can."""
        from ...files.mapping import map_file  # needs NumPy, which processes that only download do not

        if self._handle >= 0:
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
    file = _UseFile(layout)
    with contextlib.suppress(OSError):  # read-only, without descriptors, or gone: no load fails for this
        for attempt in range(_ATTEMPTS):
            handle = file.open()
            if handle is None:
                if not creates or not layout.state.exists():
                    return None
                try:
                    handle = file.create()
                except FileNotFoundError:
                    continue  # its folder was empty, and was removed just now
            use = Use(handle)
            is_busy = _lock(handle, exclusive=False) is _Result.BUSY
            # A file that has lost its name since it was opened is that of a model that was removed. One more look is
            # enough, as on some file systems inode numbers change.
            if not is_busy and (attempt > 0 or file.has_name(handle)):
                with contextlib.suppress(OSError):  # the file is of another account
                    os.utime(handle if os.utime in os.supports_fd else file.folder.path / file.name)
                return _close_if_possible(file, use, os.fstat(handle).st_dev)
            use.end()
            time.sleep(_PAUSE if is_busy else 0)
    return None


@contextlib.contextmanager
def unused(layout: Layout) -> Iterator[bool]:
    """Keep loads from beginning to use a model during the block; yield False if one uses it, or downloads a file."""
    file, handle, is_new, is_free = _UseFile(layout), -1, False, True
    with contextlib.suppress(OSError):  # a model that this account may not write to cannot be removed, either
        is_new = file.time() is None
        handle = file.create()
        is_free = _excludes_others(handle)
    try:
        yield is_free and not _is_downloaded(layout)
    finally:
        if handle >= 0:
            use = Use(handle)
            try:
                if is_free and (is_new or not layout.model.exists()):
                    file.remove()
            finally:
                use.end()


def forget_use(layout: Layout) -> None:
    """Remove the file about the use of a model that is gone, unless a load still uses it."""
    with contextlib.suppress(OSError):
        if _UseFile(layout).time() is not None:
            with unused(layout):
                pass


def forget_uses(root: Path) -> None:
    """Remove the files about models that are gone: their deletion was interrupted, or a load still used them then."""
    with contextlib.suppress(OSError):  # links, or another account's
        for entry in Folder(root, _FOLDER).entries():
            names = tuple(unflatten(entry).split("/"))  # not those of the model if the entry's name was cut
            layout = Layout(Folder(root, names))
            if len(names) == 2 and _UseFile(layout).name == entry and not layout.model.exists():
                forget_use(layout)


def is_used(layout: Layout) -> bool:
    """Return whether a load uses a model at this moment, or downloads a file of it."""
    with contextlib.suppress(OSError):
        handle = _UseFile(layout).open()
        if handle is not None:
            probe = Use(handle)
            is_free = _excludes_others(handle)
            probe.end()
            if not is_free:
                return True
    return _is_downloaded(layout)


def last_use(layout: Layout) -> float:
    """Return when a model was used last, in seconds since 1970; 0 if that is unknown."""
    if (used := _UseFile(layout).time()) is not None:
        return used
    # Earlier versions of ndcache did not note it: the time when files were added, then.
    state, notes = layout.state, layout.metadata
    places = ((state, "source.json"), (state.parent, state.names[-1]), (notes.parent, notes.names[-1]))
    return max(_time(*place) or 0.0 for place in places)


class _UseFile:
    """The file about the use of a model."""

    def __init__(self, layout: Layout) -> None:
        self.folder = Folder(layout.model.root, _FOLDER, layout.model.is_private)
        self.name = flatten("/".join(layout.model.names))

    def open(self) -> int | None:
        """Return a descriptor; None if there is no file."""
        return self.folder.open_to_read(self.name)

    def create(self) -> int:
        """Return a descriptor for writing; make the file if it is missing."""
        self.folder.make()
        handle = self.folder.open_to_write(self.name, creates=True)
        try:
            if not os.fstat(handle).st_size:
                os.write(handle, _CONTENT)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def remove(self) -> None:
        """Remove the file, and the folders that are empty then."""
        with contextlib.suppress(OSError):
            self.folder.unlink(self.name)
            self.folder.remove()
            self.folder.parent.remove()

    def has_name(self, handle: int) -> bool:
        """Return whether an open file still has this name."""
        named = self.folder.status(self.name)
        return named is not None and os.path.samestat(named, os.fstat(handle))

    def time(self) -> float | None:
        """Return the time of the file; None if there is none."""
        return _time(self.folder, self.name)


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


def _close_if_possible(file: _UseFile, use: Use, device: int) -> Use:
    """Close the descriptor of a use if a map holds the lock on this file system."""
    if _do_maps_hold_locks.get(device, True):
        use.close_descriptor()
    if device in _do_maps_hold_locks:
        return use
    handle = file.open()
    if handle is None:
        return use
    second = Use(handle)
    _do_maps_hold_locks[device] = _lock(handle, exclusive=True) is _Result.BUSY
    if not _do_maps_hold_locks[device]:
        _lock(handle, exclusive=False)
        return second
    second.end()
    return use


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
