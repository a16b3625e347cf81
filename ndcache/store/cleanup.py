"""Deleting a model from the cache, and how much room there is."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from pathlib import Path

from ..errors import CacheUnavailableError
from ..files.folder import Folder, is_gone
from ..format.paths import STATE_DIRECTORY

__all__ = ["delete_model", "disk_bytes", "empty_trash", "free_bytes"]


def delete_model(folder: Folder) -> int:
    """Remove a model's folder; the bytes that it held.

    It is renamed first, so that it is gone at once for whoever looks, however long the rest takes. Where that cannot be
    done (a folder of a lower layer of overlayfs, a mount point, one in a folder of another account's) its files are
    removed in place, the manifest first, so that nobody takes a half of it for the whole.

    Raises
    ------
    CacheUnavailableError
        Some of it could not be removed; `received` says how many of the `expected` bytes were freed.
    """
    nbytes = disk_bytes(folder.path)
    grave = folder.parent / f"{folder.names[-1]}.{secrets.token_hex(4)}.deleted"
    try:
        folder.parent.replace(folder.names[-1], grave.parent, grave.names[-1])
    except FileNotFoundError:
        return 0  # somebody else was faster
    except OSError as error:
        if is_gone(error):
            raise
        grave = folder
    empty_trash(folder)
    failure = _remove_tree(grave)
    if failure is not None:
        left = disk_bytes(grave.path)
        where = "" if grave == folder else f", the rest is now in {grave.path}"
        raise CacheUnavailableError(
            f"{folder.path} could be deleted only in part, {max(0, nbytes - left):,} of {nbytes:,} bytes{where}: "
            f"{failure.strerror or failure}",
            expected=nbytes,
            received=max(0, nbytes - left),
            hint="Look who owns what is left.",
        ) from failure
    return nbytes


def empty_trash(folder: Folder) -> None:
    """Remove what is left of deletions of this model that were interrupted."""
    is_grave = re.compile(re.escape(folder.names[-1]) + r"\.[0-9a-f]{8}\.deleted").fullmatch
    for name in folder.parent.entries():
        if is_grave(name):
            with contextlib.suppress(OSError):  # a link that somebody gave such a name, too
                _remove_tree(folder.parent / name)


def _remove_tree(top: Folder) -> OSError | None:
    """Remove a folder and all that is in it, as far as possible; the first failure to remove a file."""
    files: list[tuple[Folder, str]] = []
    folders = [top]
    failure: OSError | None = None
    for folder in folders:
        try:
            names = os.listdir(folder.path) if folder.exists() else []
        except OSError as error:
            failure, names = failure or error, []
        for name in names:
            status = folder.status(name)
            if status is not None and stat.S_ISDIR(status.st_mode):
                folders.append(folder / name)
            else:
                files.append((folder, name))
    # The manifest first. What says that the folder is ndcache's comes last, and stays with whatever cannot be removed.
    source = (top / STATE_DIRECTORY, "source.json")
    files.sort(key=lambda file: 2 if file == source else not (file[0] == top and file[1].endswith(".json")))
    for file in files:
        if failure is None or file != source:
            try:
                file[0].unlink(file[1])
            except OSError as error:
                failure = failure if is_gone(error) else failure or error
    for folder in reversed(folders):
        with contextlib.suppress(OSError):  # it is not empty, or has no file that matters
            folder.remove()
    return failure


def disk_bytes(directory: Path) -> int:
    """The bytes that the files below a directory take on disk."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(folder, name))
                if stat.S_ISREG(status.st_mode):
                    on_disk = 512 * getattr(status, "st_blocks", 0)  # fewer if it has holes; not every system says
                    total += min(status.st_size, on_disk or status.st_size)
    return total


def free_bytes(directory: Path) -> int | None:
    """The bytes that are free on the disk of a directory, or where it would be made; None if the system does not say.

    Some file systems say that there are none where there are. A disk that is really full says so when it is written to.
    """
    existing = next(folder for folder in (directory, *directory.parents) if os.path.exists(folder))
    try:
        free = shutil.disk_usage(existing).free
    except OSError:
        return None
    return free if free > 0 else None
