"""Folders of the cache, in which no symbolic link is followed.

The cache's root is the user's own choice: it may be a link, or lie below links. Everything below the root belongs to
ndcache. A link there leads to files of somebody else, and is refused. Every call that changes the disk walks down from
the root, opens each folder without following a link, and acts in the folder that it has opened. So a link that takes a
folder's name in the meantime does no harm.
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

#: For `os.open`: do not follow a symbolic link, wait for the writer of a pipe, or acquire a controlling terminal.
NO_LINKS = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINKS
#: Whether system calls take the descriptor of the folder that a name is in, as they do everywhere but on Windows.
_HAS_DIR_FD = {os.open, os.mkdir, os.unlink, os.stat, os.rename, os.rmdir} <= os.supports_dir_fd
#: For `os.open`: pass through a folder, which needs fewer permissions than listing it.
_THROUGH = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_GONE = {errno.ENOENT, errno.ENOTDIR, getattr(errno, "ESTALE", errno.ENOENT)}
_NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV}
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class _Held(threading.local):
    """The folders that a thread holds open, and their descriptors."""

    def __init__(self) -> None:
        self.handles: list[tuple[Folder, int]] = []


_held = _Held()


def is_gone(error: BaseException | None) -> bool:
    """Return whether an error says that a file is gone, or that its handle on a network file system is stale."""
    return isinstance(error, OSError) and error.errno in _GONE


def sync(handle: int) -> None:
    """Sync a file or folder to disk, if the file system can."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def unsafe(path: str | os.PathLike[str]) -> UnsafeCacheError:
    """Return the error for a path that is a symbolic link."""
    return UnsafeCacheError(
        f"{os.fspath(path)} leads elsewhere through a symbolic link",
        hint="It was left alone: see who put it there.",
    )


@dataclass(frozen=True)
class Folder:
    """A folder of the cache, which need not exist.

    All methods raise `UnsafeCacheError` if a symbolic link leads to it, and otherwise the system's own errors.

    Attributes
    ----------
    root : pathlib.Path
        The cache's root.
    names : tuple of str
        The folders on the way from there to this one.
    is_private : bool
        Whether to make the root, if it is missing, for this account only.
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

    # --- reading

    def check(self) -> None:
        """Raise `UnsafeCacheError` if a symbolic link leads here.

        Once that was not so, later calls do not look again, which is enough for reading.
        """
        if not self._is_sound:
            self.__dict__["_is_sound"] = self.exists()

    _is_sound = False  # not a field: whether `check` has found no link

    def exists(self) -> bool:
        """Return whether there is such a folder."""
        above = self._nearest_held()
        depth = 0 if above is None else above[0]  # whatever led there when it was opened was not a link
        if depth and depth == len(self.names):
            return True
        mode = 0
        for path in self._way[depth:]:
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
        """Open a regular file for reading; return None if there is none, or something else."""
        handle = self.open_to_read(name)
        return None if handle is None else open(f"{self._text}/{name}", "rb", opener=lambda *_: handle)

    def read(self, name: str, limit: int) -> bytes | None:
        """Return the first `limit` bytes of a regular file; None if there is none, or something else."""
        handle = self.open_to_read(name)
        if handle is None:
            return None
        try:
            return os.read(handle, limit)
        finally:
            os.close(handle)

    def open_to_read(self, name: str) -> int | None:
        """Return a descriptor of a regular file for reading; None if there is none, or something else."""
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
        """Return the names in it, or none if it cannot be listed."""
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
        """Return a block in which this thread keeps the folder open, so that calls need not go down to it each time."""
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
        except NotADirectoryError as error:  # NotADirectoryError would count as removed just now
            raise FileExistsError(errno.EEXIST, "a file lies where a directory should") from error
        for count, _ in enumerate(self.names, 1):
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.root.joinpath(*self.names[:count]))
        self.check()

    def create(self, name: str) -> int:
        """Create a file and return its descriptor, for reading and writing; its mode is given by the umask."""
        with self._opened() as handle:
            return os.open(self._at(handle, name), _NEW, 0o666, dir_fd=handle)

    def open_to_write(self, name: str, *, creates: bool = False, appends: bool = False) -> int:
        """Open a regular file for reading and writing, and return its descriptor; `creates` makes a missing one.

        With `appends`, each write goes to the end, also if other processes write at the same time.
        """
        flags = os.O_RDWR | (os.O_CREAT if creates else 0) | (os.O_APPEND if appends else 0) | NO_LINKS
        with self._opened() as handle:
            opened = os.open(self._at(handle, name), flags, 0o666, dir_fd=handle)
        if stat.S_ISREG(os.fstat(opened).st_mode):
            return opened
        os.close(opened)
        raise unsafe(self.path / name)

    def replace(self, name: str, target: Folder, new_name: str) -> None:
        """Rename an entry, within this folder or into another, and replace a file that has the new name."""
        with self._opened() as source:
            if target is self:
                os.replace(self._at(source, name), self._at(source, new_name), src_dir_fd=source, dst_dir_fd=source)
                return
            with target._opened() as handle:
                os.replace(self._at(source, name), target._at(handle, new_name), src_dir_fd=source, dst_dir_fd=handle)

    def link(self, name: str, target: Folder, new_name: str) -> None:
        """Give a file another name in another folder, as a hard link; a link planted under `name` is not followed."""
        with self._opened() as source, target._opened() as handle:
            os.link(
                self._at(source, name),
                target._at(handle, new_name),
                src_dir_fd=source,
                dst_dir_fd=handle,
                follow_symlinks=False,
            )

    def unlink(self, name: str) -> None:
        """Remove an entry that is not a folder."""
        with self._opened() as handle:
            os.unlink(self._at(handle, name), dir_fd=handle)

    def remove(self) -> None:
        """Remove the folder itself, which must be empty."""
        with self.parent._opened() as handle:
            os.rmdir(self.parent._at(handle, self.names[-1]), dir_fd=handle)

    def sync(self) -> None:
        """Sync the names in the folder to disk."""
        with self._opened() as handle:
            _sync_folder(handle)

    # --- inside

    def _at(self, handle: int | None, name: str) -> str:
        return name if handle is not None else os.path.join(self.path, name)

    def _opened(self, *, makes: bool = False) -> _Handle:
        """Open the folder for calls that take a descriptor; the descriptor is None on systems without such calls."""
        if not _HAS_DIR_FD:
            self.exists()  # raises if a link leads to it
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
        """Return the depth and the descriptor of the deepest folder on the way that this thread holds open."""
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
    """A descriptor that is closed at the end of a block, unless it belongs to somebody else."""

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
        if handle.is_own and handle.number is not None:  # otherwise it is held already, or cannot be
            self._entry = self._folder, handle.number
            _held.handles.append(self._entry)

    def __exit__(self, *_: object) -> None:
        if self._entry is not None:
            _held.handles.remove(self._entry)
            os.close(self._entry[1])


def _make_root(root: Path, mode: int) -> None:
    """Make the root, and the folders above it that are missing."""
    missing = [folder for folder in (root, *root.parents) if not os.path.exists(folder)]
    for folder in reversed(missing):
        try:
            os.mkdir(folder, mode if folder == root else 0o777)
        except FileExistsError:
            pass  # somebody else made it just now
        except FileNotFoundError as error:
            if not os.path.exists(folder.parent):
                raise  # somebody is deleting it
            raise PermissionError(errno.EACCES, "no directory can be made there") from error  # /proc, an automounter
        if _HAS_DIR_FD:
            with contextlib.suppress(PermissionError), _Handle(os.open(folder.parent, _THROUGH)) as handle:
                _sync_folder(handle)


def _sync_folder(handle: int | None) -> None:
    if handle is None:
        return  # on Windows, a directory cannot be synced
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
    # Opening a folder takes permission to read it, which may be missing where files can be created.
    with contextlib.suppress(PermissionError), _Handle(os.open(".", flags, dir_fd=handle)) as readable:
        assert readable is not None
        sync(readable)
