"""Names for files that are complete, and other names for files that are bad."""

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

#: Of a copy that is being made beside its future name.
_COPY = re.compile(re.escape(STATE_DIRECTORY) + r"\.[0-9a-f]{16}")


def give_name(part: PartialFile, folder: Folder, name: str, quarantine: Callable[[], None]) -> BinaryIO:
    """Give a part, which is closed, the name of what it is a part of; it comes back open for reading.

    Parameters
    ----------
    part : Part
    folder : Folder
    name : str
    quarantine : callable
        Takes a folder away that has this name.

    Raises
    ------
    FileNotFoundError
        The part, or the folder, was removed.
    OSError
    """
    file = None if os.name == "nt" else part.folder.open(part.file_name)  # on Windows it could not be renamed then
    try:
        if os.name != "nt" and file is None:
            raise FileNotFoundError(errno.ENOENT, "a file that is being written is gone", str(part.path))
        try:
            _rename(part, folder, name)
        except IsADirectoryError:
            quarantine()
            _rename(part, folder, name)
        file = file or folder.open(name)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "a file that was published just now is gone", name)
    except BaseException:
        if file is not None:
            file.close()
        raise
    return file


def _rename(part: PartialFile, folder: Folder, name: str) -> None:
    try:
        part.folder.replace(part.file_name, folder, name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_over(part, folder, name)


def _copy_over(part: PartialFile, folder: Folder, name: str) -> None:
    """Publish a part in a folder that nothing can be renamed into, by way of a copy that lies there."""
    fresh = f"{STATE_DIRECTORY}.{secrets.token_hex(8)}"
    source = part.folder.open(part.file_name)
    if source is None:
        raise FileNotFoundError(errno.ENOENT, "a file that is being written is gone", str(part.path))
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
        part.folder.unlink(part.file_name)


def remove_idle_copies(folder: Folder, seconds: float) -> None:
    """Remove the copies in a folder whose makers were killed."""
    for name in folder.entries():
        if _COPY.fullmatch(name):
            with contextlib.suppress(OSError):
                status = folder.status(name)
                if status is not None and time.time() - status.st_mtime > seconds:
                    folder.unlink(name)


def quarantine(folder: Folder, name: str, aside: Folder, new_name: str) -> None:
    """Move what is bad into the folder `aside`; a file that cannot be moved there is removed."""
    status = folder.status(name)
    if status is None:
        return
    if stat.S_ISDIR(status.st_mode):
        folder.replace(name, aside, f"{new_name}.{secrets.token_hex(8)}")  # it could not replace a file
        return
    try:
        folder.replace(name, aside, new_name)
    except OSError as error:
        if is_gone(error) or error.errno not in (errno.EXDEV, errno.EISDIR, errno.EPERM, errno.EACCES):
            raise
        folder.unlink(name)
