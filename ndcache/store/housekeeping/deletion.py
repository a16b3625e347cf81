"""Delete a whole model, so that it is gone at once, and so that nobody takes half of it for a whole one."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat

from ...errors import CacheUnavailableError, UnsafeCacheError
from ...files.folder import Folder, is_gone
from ...format.paths import STATE_DIRECTORY
from ..directory import ModelDirectory
from . import usage
from .sizes import Balance, disk_use

__all__ = ["check_deletion", "delete_leftovers", "delete_model", "empty_trash", "is_trash", "remove_tree"]

#: The name of a model's folder that is being deleted.
_TRASH = re.compile(r"(?P<model>.+)\.[0-9a-f]{8}\.deleted", re.DOTALL)


def is_trash(name: str) -> bool:
    """Return whether a folder has the name of a model that is being deleted, or whose deletion was interrupted."""
    return _TRASH.fullmatch(name) is not None


def delete_model(directory: ModelDirectory) -> int:
    """Remove a model's directory, and return how many bytes that freed.

    Loads that have its files open are not disturbed. Files that other models share stay, and do not count.

    Raises
    ------
    UnsafeCacheError
        ndcache did not make this directory.
    CacheUnavailableError
        Some of it could not be removed; `received` says how many of the `expected` bytes were freed.
    """
    with directory.layout.translate_errors():
        if not directory.layout.model.exists():
            return 0
        if not directory.layout.state.exists():
            if not os.listdir(directory.directory):
                return 0  # an earlier deletion could not remove the folder itself
            raise UnsafeCacheError(
                f"{directory.directory} is not a directory that ndcache made", hint="It was left alone."
            )
        return _delete_folder(directory.layout.model)


def _delete_folder(folder: Folder) -> int:
    """Move a model's folder to the trash and empty that, so that the model is gone at once.

    If the folder cannot be renamed (a lower layer of overlayfs, a mount point, a parent folder of another account),
    remove its files in place, the manifest first, so that nobody takes half a model for a whole one.
    """
    nbytes = _bytes_to_free(folder)
    trash = folder.parent / f"{folder.names[-1]}.{secrets.token_hex(4)}.deleted"
    try:
        folder.parent.replace(folder.names[-1], trash.parent, trash.names[-1])
    except FileNotFoundError:
        return 0  # somebody else was faster
    except OSError as error:
        if is_gone(error):
            raise
        trash = folder
    empty_trash(folder)
    failure = remove_tree(trash)
    if failure is not None:
        freed = max(0, nbytes - _bytes_to_free(trash))
        where = "" if trash == folder else f", the rest is now in {trash.path}"
        raise _not_deleted(folder, failure.strerror or str(failure), nbytes, freed, where) from failure
    return nbytes


def delete_leftovers(folder: Folder) -> None:
    """Remove a folder with files that nobody needs.

    Raises
    ------
    CacheUnavailableError
        Some of it could not be removed.
    """
    nbytes, failure = _bytes_to_free(folder), remove_tree(folder)
    if failure is not None:
        freed = max(0, nbytes - _bytes_to_free(folder))
        raise _not_deleted(folder, failure.strerror or str(failure), nbytes, freed) from failure


def check_deletion(folder: Folder) -> None:
    """Raise the error that removing a folder will raise if this account may not write there; change nothing."""
    if not any(os.access(path, os.W_OK) for path in (folder.path, folder.parent.path)):
        raise _not_deleted(folder, "this account may not write there", _bytes_to_free(folder))


def _not_deleted(folder: Folder, why: str, nbytes: int, freed: int = 0, where: str = "") -> CacheUnavailableError:
    part = f"deleted only in part, {freed:,} of {nbytes:,} bytes{where}" if freed else "not be deleted"
    return CacheUnavailableError(
        f"{folder.path} could {'be ' if freed else ''}{part}: {why}",
        expected=nbytes,
        received=freed,
        hint="See who owns what is left, and whether the disk is read-only.",
    )


def empty_trash(folder: Folder) -> None:
    """Remove what interrupted deletions of this model left."""
    for name in folder.parent.entries():
        if (match := _TRASH.fullmatch(name)) and match["model"] == folder.names[-1]:
            with contextlib.suppress(OSError):  # also if somebody gave a link such a name
                remove_tree(folder.parent / name)


def remove_tree(top: Folder) -> OSError | None:
    """Remove a folder and all that is in it, as far as possible; return the first failure to remove a file."""
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
    # The manifest goes first. The file that `unused` has locked goes almost last. The note that marks the folder as
    # ndcache's goes last, and stays if anything else stays.
    source, lock = ((top / STATE_DIRECTORY, name) for name in ("source.json", usage.FILE))
    last = {lock: 2, source: 3}
    files.sort(key=lambda file: last.get(file, not (file[0] == top and file[1].endswith(".json"))))
    for file in files:
        if failure is None or file != source:
            try:
                file[0].unlink(file[1])
            except OSError as error:
                failure = failure if is_gone(error) else failure or error
    for folder in reversed(folders):
        with contextlib.suppress(OSError):  # if it is not empty, `failure` says why; an empty folder does no harm
            folder.remove()
    return failure


def _bytes_to_free(folder: Folder) -> int:
    """Return how many bytes deleting a folder frees: files that other models share stay."""
    use = disk_use(folder.path)
    return Balance([use]).remove(use)
