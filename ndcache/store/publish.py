"""Give complete files their names, and bad files other names."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

from ..files.folder import Folder, is_gone, sync
from ..format.paths import STATE_DIRECTORY
from .layout import Layout
from .metadata import FileMetadata
from .partials.file import PartialFile

__all__ = ["give_name", "quarantine", "remove_idle_copies", "tell_apart", "withdraw_note"]

#: The name of a copy that is being made beside its future name.
_COPY = re.compile(re.escape(STATE_DIRECTORY) + r"\.[0-9a-f]{16}")
#: Nanoseconds to add to a file's time until it is another one: file systems round it to up to two seconds.
_TIME_STEPS = (1, 10**6, 10**9, 2 * 10**9)


def give_name(partial: PartialFile, folder: Folder, name: str, quarantine: Callable[[], None]) -> BinaryIO:
    """Rename a closed partial file to the name of the complete file, and open it for reading.

    Parameters
    ----------
    partial : PartialFile
    folder : Folder
    name : str
    quarantine : callable
        Move away a folder that has this name.

    Raises
    ------
    FileNotFoundError
        The partial file, or the folder, was removed.
    OSError
    """
    # Opened before the rename, so that nobody can take the name away in between; Windows cannot rename open files.
    file = None if os.name == "nt" else partial.folder.open(partial.file_name)
    try:
        if os.name != "nt" and file is None:
            raise FileNotFoundError(errno.ENOENT, "a file that is being written is gone", str(partial.path))
        try:
            _rename(partial, folder, name)
        except IsADirectoryError:
            quarantine()
            _rename(partial, folder, name)
        file = file or folder.open(name)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "a file that was published just now is gone", name)
    except BaseException:
        if file is not None:
            file.close()
        raise
    return file


def tell_apart(partial: PartialFile, folder: Folder, name: str) -> None:
    """Give a partial file another time than the file that it will replace: notes know a file by its size and time."""
    old, handle = folder.status(name), partial.file.fileno()
    for step in _TIME_STEPS:
        new = os.fstat(handle)
        # Not that of a hard link: it is the time of another model's file.
        if old is None or new.st_nlink > 1 or (new.st_size, new.st_mtime_ns) != (old.st_size, old.st_mtime_ns):
            return
        os.utime(handle, ns=(new.st_atime_ns, old.st_mtime_ns + step))


def withdraw_note(layout: Layout, note: str, known: FileMetadata) -> None:
    """Take back what a note says of the file that will be replaced, so that nobody believes it of the new one."""
    if layout.metadata.status(note) is not None:
        try:
            layout.write_note(layout.metadata, note, replace(known, content_ids={}).to_note())
        except OSError:  # the cache is full
            with contextlib.suppress(OSError):
                layout.metadata.unlink(note)


def _rename(partial: PartialFile, folder: Folder, name: str) -> None:
    try:
        partial.folder.replace(partial.file_name, folder, name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_over(partial, folder, name)


def _copy_over(partial: PartialFile, folder: Folder, name: str) -> None:
    """Publish by way of a copy made in the target folder, for folders into which nothing can be renamed."""
    fresh = f"{STATE_DIRECTORY}.{secrets.token_hex(8)}"
    source = partial.folder.open(partial.file_name)
    if source is None:
        raise FileNotFoundError(errno.ENOENT, "a file that is being written is gone", str(partial.path))
    try:
        with source, open(folder.create(fresh), "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
            copy.flush()
            sync(copy.fileno())
        folder.replace(fresh, folder, name)
    except BaseException:
        with contextlib.suppress(OSError):
            folder.unlink(fresh)
        raise
    with contextlib.suppress(OSError):
        partial.folder.unlink(partial.file_name)


def remove_idle_copies(folder: Folder, seconds: float) -> None:
    """Remove copies that nobody has written to for some `seconds`, because the process was killed."""
    for name in folder.entries():
        if _COPY.fullmatch(name):
            with contextlib.suppress(OSError):
                status = folder.status(name)
                if status is not None and time.time() - status.st_mtime > seconds:
                    folder.unlink(name)


def quarantine(folder: Folder, name: str, target: Folder, new_name: str) -> None:
    """Move a bad file or folder into the folder `target`; remove a file that cannot be moved there."""
    status = folder.status(name)
    if status is None:
        return
    if stat.S_ISDIR(status.st_mode):
        folder.replace(name, target, f"{new_name}.{secrets.token_hex(8)}")  # a folder cannot replace a file
        return
    try:
        folder.replace(name, target, new_name)
    except OSError as error:
        if is_gone(error) or error.errno not in (errno.EXDEV, errno.EISDIR, errno.EPERM, errno.EACCES):
            raise
        folder.unlink(name)
