"""Make room for a model: remove files of it that are no longer used, check the free space."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import CacheUnavailableError, UnsafeCacheError, UnsafePathError
from ..files.folder import Folder
from ..format.manifest import Manifest, Shard
from ..format.paths import check_path, flatten, unflatten
from ..format.safetensors.headers import kept_as
from .companion_note import CompanionNote
from .directory import ModelDirectory
from .housekeeping.deletion import empty_trash
from .layout import disk_full
from .lock import try_lock
from .publish import remove_idle_copies

__all__ = ["check_free_space", "evict_partials", "free_bytes", "prune"]

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
        empty_trash(layout.model)
        remove_idle_copies(layout.model, _IDLE_SECONDS)
        shards = {flatten(shard.data_path): shard for shard in manifest.shards}
        published = {entry.removesuffix(".json") for entry in layout.metadata.entries()}
        under_way = partials.flat_names() | set(layout.locks.entries())
        others_known = {flatten(manifest.name), flatten(kept_as(manifest.name))}
        if (published | under_way) - shards.keys() - others_known:
            others_known |= set(map(flatten, CompanionNote.read(layout).files))
        if (published | under_way) - shards.keys() - others_known:
            shards.update((flatten(shard.data_path), shard) for other in others() for shard in other.shards)
        in_use = {shard.data_path for shard in shards.values()}
        for flat in published - shards.keys() - others_known:
            if unflatten(flat) not in in_use:
                with contextlib.suppress(UnsafePathError, UnsafeCacheError):  # the name was crafted
                    _remove_if_shard(directory, unflatten(flat))
        for flat in under_way:
            _prune_partials(directory, flat, shards.get(flat))
            _prune_note_copies(directory, flat)


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


def _prune_note_copies(directory: ModelDirectory, name: str) -> None:
    """Remove what killed processes left of a note of this name, if somebody has written the note since.

    A process that is just writing it loses its note at worst, which every writer of one can bear.
    """
    layout = directory.layout
    written = layout.metadata.status(name) or layout.state.status(name)
    if written is None or not name.endswith(".json"):
        return
    for copy in directory.partials.find(name):
        status = layout.partials.status(copy)
        if status is not None and status.st_mtime_ns <= written.st_mtime_ns:
            directory.partials.remove(copy)


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
        raise disk_full(directory.directory, nbytes, free, is_local_dir=directory.layout.is_local_dir)


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
