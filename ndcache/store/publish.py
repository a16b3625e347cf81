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
from typing import BinaryIO

from ..files.folder import Folder, is_gone, sync
from ..format.paths import STATE_DIRECTORY
from .partial import PartialFile

__all__ = ["give_name", "quarantine", "remove_idle_copies"]

#: The name of a copy that is being made beside its future name.
_COPY = re.compile(re.escape(STATE_DIRECTORY) + r"\.[0-9a-f]{16}")


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
