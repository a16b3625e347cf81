"""Make room in the cache: remove files that are no longer used, check free space, delete a model."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import CacheUnavailableError, UnsafeCacheError, UnsafePathError
from ..files.folder import Folder, is_gone
from ..format.manifest import Manifest, Shard
from ..format.paths import STATE_DIRECTORY, check_path, flatten, unflatten
from .directory import ModelDirectory
from .layout import disk_full
from .lock import try_lock
from .publish import remove_idle_copies

__all__ = ["check_free_space", "delete_model", "disk_bytes", "evict_partials", "free_bytes", "prune"]

#: Seconds without a write after which a partial file counts as abandoned, if nothing else shows it.
_IDLE_SECONDS = 300


# --- files that are no longer used


def prune(directory: ModelDirectory, manifest: Manifest, others: Callable[[], Iterable[Manifest]]) -> None:
    """Remove shards of earlier versions of a model, and leftovers of interrupted loads.

    Parameters
    ----------
    directory : ModelDirectory
    manifest : Manifest
        The manifest in use.
    others : callable
        Return the other manifests whose shards are kept; called only if something may have to be removed.
    """
    layout, partials = directory.layout, directory.partials
    with layout.translate_errors():
        _empty_trash(layout.model)
        remove_idle_copies(layout.model, _IDLE_SECONDS)
        shards = {flatten(shard.data_path): shard for shard in manifest.shards}
        published = {entry.removesuffix(".json") for entry in layout.metadata.entries()}
        under_way = partials.flat_names() | set(layout.locks.entries())
        if (published | under_way) - shards.keys() - {flatten(manifest.name)}:
            shards.update((flatten(shard.data_path), shard) for other in others() for shard in other.shards)
        in_use = {shard.data_path for shard in shards.values()}
        for flat in published - shards.keys():
            if unflatten(flat) not in in_use:
                with contextlib.suppress(UnsafePathError, UnsafeCacheError):  # the name was crafted
                    _remove_if_shard(directory, unflatten(flat))
        for flat in under_way:
            _prune_partials(directory, flat, shards.get(flat))


def _prune_partials(directory: ModelDirectory, flat: str, shard: Shard | None) -> None:
    """Remove partial files of a published shard, or of a file that is not a shard, unless somebody is writing them."""
    if shard is not None and not directory.has(shard):
        return
    partials, known = directory.partials, None if shard is None else directory.metadata(shard.data_path)
    for file_name in partials.find(flat):
        source = partials.source(file_name)
        is_published = known is not None and source is not None and known.has_content_id(source.content_id)
        if is_published or partials.idle_seconds(file_name) > _IDLE_SECONDS:
            partials.remove(file_name)
    if shard is not None:
        _unlink(directory.layout.locks, flat)


def _remove_if_shard(directory: ModelDirectory, name: str) -> None:
    check_path(name)  # a crafted name may lead out of the directory
    metadata, layout = directory.metadata(name), directory.layout
    if metadata is not None and metadata.content_ids:  # manifests and other files have none
        _unlink(*layout.place(name))
        _unlink(layout.metadata, f"{flatten(name)}.json")
        _unlink(layout.locks, flatten(name))


def _unlink(folder: Folder, name: str) -> None:
    with contextlib.suppress(OSError):
        folder.unlink(name)


# --- room on the disk


def evict_partials(directory: ModelDirectory, shards: Iterable[Shard]) -> None:
    """Remove the partial files of these shards that interrupted loads left, unless somebody is writing them."""
    with directory.layout.translate_errors():
        for shard in shards:
            flat = flatten(shard.data_path)
            if directory.partials.find(flat):
                with try_lock(directory.layout.make(directory.layout.locks).path / flat) as is_free:
                    if is_free:
                        directory.partials.remove_all(flat)


def check_free_space(directory: ModelDirectory, nbytes: int) -> None:
    """Raise `DiskFullError` if the disk reports too little room for `nbytes` more.

    Raises
    ------
    CacheUnavailableError
        The directory cannot be written, and does not fall back to memory.
    """
    if directory.why_not_kept is not None:
        return
    try:
        with directory.layout.translate_errors():
            folder = _existing(directory.directory)
            # Checked first: an image's read-only file system always reports that it is full. (On Windows, `os.access`
            # does not look at folders' permissions.)
            if os.name != "nt" and not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, "it may not be written")
    except CacheUnavailableError as error:
        if not directory.fall_back(error):
            raise
        return
    free = free_bytes(directory.directory)
    if free is not None and nbytes > free:
        raise disk_full(directory.directory, nbytes, free)


def free_bytes(directory: Path) -> int | None:
    """Return how many bytes are free on the disk of a directory, which need not exist; None if that is unknown.

    Some file systems report 0 although they have room, so 0 counts as unknown. If the disk is really full, the first
    write fails.
    """
    try:
        free = shutil.disk_usage(_existing(directory)).free
    except OSError:
        return None
    return free if free > 0 else None


def _existing(directory: Path) -> Path:
    """Return a directory, or the nearest one above it that exists."""
    return next(folder for folder in (directory, *directory.parents) if os.path.exists(folder))


def disk_bytes(directory: Path) -> int:
    """Return how many bytes the files below a directory take on disk."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(folder, name))
                if stat.S_ISREG(status.st_mode):
                    # Fewer bytes if it has holes; not every system reports them.
                    on_disk = 512 * getattr(status, "st_blocks", 0)
                    total += min(status.st_size, on_disk or status.st_size)
    return total


# --- a whole model


def delete_model(directory: ModelDirectory) -> int:
    """Remove a model's directory, and return how many bytes it took. Loads that have its files open are not disturbed.

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
    nbytes = disk_bytes(folder.path)
    trash = folder.parent / f"{folder.names[-1]}.{secrets.token_hex(4)}.deleted"
    try:
        folder.parent.replace(folder.names[-1], trash.parent, trash.names[-1])
    except FileNotFoundError:
        return 0  # somebody else was faster
    except OSError as error:
        if is_gone(error):
            raise
        trash = folder
    _empty_trash(folder)
    failure = _remove_tree(trash)
    if failure is not None:
        left = disk_bytes(trash.path)
        where = "" if trash == folder else f", the rest is now in {trash.path}"
        raise CacheUnavailableError(
            f"{folder.path} could be deleted only in part, {max(0, nbytes - left):,} of {nbytes:,} bytes{where}: "
            f"{failure.strerror or failure}",
            expected=nbytes,
            received=max(0, nbytes - left),
            hint="See who owns what is left.",
        ) from failure
    return nbytes


def _empty_trash(folder: Folder) -> None:
    """Remove what interrupted deletions of this model left."""
    is_trash = re.compile(re.escape(folder.names[-1]) + r"\.[0-9a-f]{8}\.deleted").fullmatch
    for name in folder.parent.entries():
        if is_trash(name):
            with contextlib.suppress(OSError):  # also if somebody gave a link such a name
                _remove_tree(folder.parent / name)


def _remove_tree(top: Folder) -> OSError | None:
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
    # The manifest goes first. The note that marks the folder as ndcache's goes last, and stays if anything else stays.
    source = (top / STATE_DIRECTORY, "source.json")
    files.sort(key=lambda file: 2 if file == source else not (file[0] == top and file[1].endswith(".json")))
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
