"""Folders of the cache, in which nothing is reached through a link that somebody planted there.

The cache's root is the user's own choice: it may be a link, or lie below links. What lies below the root is ndcache's:
there, a link leads to what is somebody else's, and is refused. Whatever changes the disk goes down from the root
folder by folder, each opened without following a link, and is done in the folder that was opened: a link that takes a
folder's name in the meantime changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import UnsafeCacheError
from .descriptors import check_shortage

__all__ = ["NO_LINKS", "Folder", "is_gone", "sync", "unsafe"]

#: For `os.open`: not through a symbolic link, not waiting for whoever writes to a pipe, not as this process's terminal.
NO_LINKS = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINKS
#: Whether calls take the folder in which a name is meant, as they do everywhere but on Windows.
_HAS_DIR_FD = {os.open, os.mkdir, os.unlink, os.stat, os.rename, os.rmdir} <= os.supports_dir_fd
#: Only to go through a folder, which takes less permission than to list it.
_THROUGH = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_GONE = {errno.ENOENT, errno.ENOTDIR, getattr(errno, "ESTALE", errno.ENOENT)}
_NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV}
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class _Held(threading.local):
    """The folders that this thread holds open, and their descriptors."""

    def __init__(self) -> None:
        self.handles: list[tuple[Folder, int]] = []


_held = _Held()


def is_gone(error: BaseException | None) -> bool:
    """Whether there is no such file any more; a network file system calls that a stale handle."""
    return isinstance(error, OSError) and error.errno in _GONE


def sync(handle: int) -> None:
    """Sync what was written to disk, where the file system can: not every one does."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def unsafe(path: str | os.PathLike[str]) -> UnsafeCacheError:
    return UnsafeCacheError(
        f"{os.fspath(path)} leads elsewhere through a symbolic link",
        hint="It was left alone: look who put it there.",
    )


@dataclass(frozen=True)
class Folder:
    """A folder of the cache, which need not exist.

    All methods raise `UnsafeCacheError` if a symbolic link leads to it, and otherwise what the system says.

    Attributes
    ----------
    root : pathlib.Path
        The cache's root.
    names : tuple of str
        The folders on the way from there.
    is_private : bool
        Whether the root, if it has to be made, is for this account only.
    """

    root: Path
    names: tuple[str, ...] = ()
    is_private: bool = False

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.root, (*self.names, name), self.is_private)

    @functools.cached_property
    def path(self) -> Path:
        return self.root.joinpath(*self.names)

    @functools.cached_property
    def _text(self) -> str:
        return os.fspath(self.path)

    @functools.cached_property
    def _way(self) -> tuple[str, ...]:
        return tuple(os.fspath(self.root.joinpath(*self.names[:count])) for count in range(1, len(self.names) + 1))

    @property
    def parent(self) -> Folder:
        return Folder(self.root, self.names[:-1], self.is_private)

    # --- looking

    def check(self) -> None:
        """Raise `UnsafeCacheError` if a symbolic link leads here; where none did once, reading goes on."""
        if not self._is_sound:
            self.__dict__["_is_sound"] = self.exists()

    _is_sound = False  # not a field: it is found out

    def exists(self) -> bool:
        """Whether there is such a folder."""
        if any(folder is self for folder, _ in _held.handles):
            return True
        mode = 0
        for path in self._way:
            try:
                mode = os.lstat(path).st_mode
            except OSError as error:
                if is_gone(error):
                    return False
                raise
            if stat.S_ISLNK(mode):
                raise unsafe(path)
        return stat.S_ISDIR(mode) if self.names else os.path.isdir(self.root)

    def status(self, name: str) -> os.stat_result | None:
        """Return what `os.lstat` says of an entry; None if there is none."""
        self.check()
        try:
            return os.lstat(f"{self._text}/{name}")
        except OSError as error:
            if is_gone(error):
                return None
            raise

    def open(self, name: str) -> BinaryIO | None:
        """A regular file, open for reading; None if there is none, or something else."""
        handle = self._open(name)
        return None if handle is None else open(f"{self._text}/{name}", "rb", opener=lambda *_: handle)

    def read(self, name: str, limit: int) -> bytes | None:
        """The first bytes of a regular file; None if there is none, or something else."""
        handle = self._open(name)
        if handle is None:
            return None
        try:
            return os.read(handle, limit)
        finally:
            os.close(handle)

    def _open(self, name: str) -> int | None:
        self.check()
        try:
            handle = os.open(f"{self._text}/{name}", os.O_RDONLY | NO_LINKS)
        except OSError as error:
            if is_gone(error) or error.errno in _NO_FILE:
                return None
            raise
        try:
            is_file = stat.S_ISREG(os.fstat(handle).st_mode)
        except BaseException:
            os.close(handle)
            raise
        if is_file:
            return handle
        os.close(handle)
        return None

    def entries(self) -> list[str]:
        """The names in it; none if it cannot be listed."""
        try:
            self.check()
            return os.listdir(self.path)
        except UnsafeCacheError:
            raise
        except OSError as error:
            check_shortage(error)
            return []

    # --- changing

    def held(self) -> _Holding:
        """Keep the folder open for this thread, so that what changes in the block need not go down to it each time."""
        return _Holding(self)

    def make(self) -> None:
        """Make the folder, and those above it, so that they survive a loss of power."""
        if self.exists():
            return
        try:
            _make_root(self.root, 0o700 if self.is_private else 0o777)
            if _HAS_DIR_FD:
                with self._opened(makes=True):
                    return
        except NotADirectoryError as error:  # which is no sign that somebody has just removed it
            raise FileExistsError(errno.EEXIST, "a file lies where a directory should") from error
        for count, _ in enumerate(self.names, 1):
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.root.joinpath(*self.names[:count]))
        self.check()

    def create(self, name: str) -> int:
        """A descriptor of a new file, for reading and writing; the umask says who else may use it."""
        with self._opened() as handle:
            return os.open(self._at(handle, name), _NEW, 0o666, dir_fd=handle)

    def replace(self, name: str, target: Folder, new_name: str) -> None:
        """Give an entry another name, in this folder or another, whatever had that before."""
        with self._opened() as source:
            if target is self:
                os.replace(self._at(source, name), self._at(source, new_name), src_dir_fd=source, dst_dir_fd=source)
                return
            with target._opened() as handle:
                os.replace(self._at(source, name), target._at(handle, new_name), src_dir_fd=source, dst_dir_fd=handle)

    def unlink(self, name: str) -> None:
        """Remove an entry that is no folder."""
        with self._opened() as handle:
            os.unlink(self._at(handle, name), dir_fd=handle)

    def remove(self) -> None:
        """Remove the folder itself, which is empty."""
        with self.parent._opened() as handle:
            os.rmdir(self.parent._at(handle, self.names[-1]), dir_fd=handle)

    def sync(self) -> None:
        """Sync the names in it to disk."""
        with self._opened() as handle:
            _sync_folder(handle)

    # --- inside

    def _at(self, handle: int | None, name: str) -> str:
        return name if handle is not None else os.path.join(self.path, name)

    def _opened(self, *, makes: bool = False) -> _Handle:
        """A descriptor of the folder, for calls that take one; None where there are none."""
        if not _HAS_DIR_FD:
            self.exists()  # or a link leads to it
            return _Handle(None)
        above = self._nearest_held()
        if above is not None and above[0] == len(self.names):
            return _Handle(above[1], is_own=False)
        start, handle = (0, os.open(self.root, _THROUGH)) if above is None else (above[0], os.dup(above[1]))
        try:
            for count, name in enumerate(self.names[start:], start + 1):
                try:
                    inner = self._enter(handle, count)
                except FileNotFoundError:
                    if not makes:
                        raise
                    with contextlib.suppress(FileExistsError):  # somebody else made it just now
                        os.mkdir(name, dir_fd=handle)
                    _sync_folder(handle)
                    inner = self._enter(handle, count)
                os.close(handle)
                handle = inner
        except BaseException:
            os.close(handle)
            raise
        return _Handle(handle)

    def _nearest_held(self) -> tuple[int, int] | None:
        """Return how far down the deepest folder lies that this thread holds open on the way, and its descriptor."""
        found = None
        for folder, handle in _held.handles:
            count = len(folder.names)
            if (found is None or count > found[0]) and folder.names == self.names[:count] and folder.root == self.root:
                found = count, handle
        return found

    def _enter(self, handle: int, count: int) -> int:
        name = self.names[count - 1]
        try:
            return os.open(name, _THROUGH | os.O_NOFOLLOW, dir_fd=handle)
        except OSError as error:
            if is_gone(error) or error.errno in (errno.ELOOP, getattr(errno, "EMLINK", errno.ELOOP)):
                with contextlib.suppress(FileNotFoundError):
                    if stat.S_ISLNK(os.lstat(name, dir_fd=handle).st_mode):
                        raise unsafe(self.root.joinpath(*self.names[:count])) from error
            raise


class _Handle:
    """A descriptor that is closed at the end of a block, if it is its own."""

    __slots__ = ("is_own", "number")

    def __init__(self, number: int | None, *, is_own: bool = True) -> None:
        self.number = number
        self.is_own = is_own

    def __enter__(self) -> int | None:
        return self.number

    def __exit__(self, *_: object) -> None:
        if self.number is not None and self.is_own:
            os.close(self.number)


class _Holding:
    """A block in which a thread holds a folder open."""

    __slots__ = ("_entry", "_folder")

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._entry: tuple[Folder, int] | None = None

    def __enter__(self) -> None:
        handle = self._folder._opened()
        if handle.is_own and handle.number is not None:  # else there are no descriptors, or it is held already
            self._entry = self._folder, handle.number
            _held.handles.append(self._entry)

    def __exit__(self, *_: object) -> None:
        if self._entry is not None:
            _held.handles.remove(self._entry)
            os.close(self._entry[1])


def _make_root(root: Path, mode: int) -> None:
    """Make the root and what is missing above it."""
    missing = [folder for folder in (root, *root.parents) if not os.path.exists(folder)]
    for folder in reversed(missing):
        try:
            os.mkdir(folder, mode if folder == root else 0o777)
        except FileExistsError:
            pass  # somebody else made it just now
        except FileNotFoundError as error:
            if not os.path.exists(folder.parent):
                raise  # somebody deletes it just now
            raise PermissionError(errno.EACCES, "no directory can be made there") from error  # /proc, an automounter
        if _HAS_DIR_FD:
            with contextlib.suppress(PermissionError), _Handle(os.open(folder.parent, _THROUGH)) as handle:
                _sync_folder(handle)


def _sync_folder(handle: int | None) -> None:
    if handle is None:
        return  # Windows has no handle on a directory to sync
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
    # It may be gone through and written to, and not be listed.
    with contextlib.suppress(PermissionError), _Handle(os.open(".", flags, dir_fd=handle)) as readable:
        assert readable is not None
        sync(readable)
