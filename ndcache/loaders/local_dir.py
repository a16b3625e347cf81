"""Fetch a model into a directory of the user's, from a server and the cache, or from another directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ..companions import Companions
from ..context import LoadContext
from ..format.manifest import Shard
from ..format.strict_json import MAX_KEPT_BYTES
from ..sources.local import LocalModel
from ..sources.model import Model
from ..sources.remote import RemoteModel
from ..store.companion_note import CompanionNote
from ..store.layered import LayeredDirectory, open_layered
from ..store.old_files import OldFiles

__all__ = ["copy_companions", "open_target"]


def open_target(local_dir: Path, model: Model, context: LoadContext) -> Callable[[Shard, BinaryIO], None]:
    """Put the manifest into a directory of the user's; return the function that puts a shard's file there.

    Parameters
    ----------
    local_dir : pathlib.Path
    model : Model
        If it is on a server, it was opened with this directory in place of the cache's.
    context : LoadContext

    Raises
    ------
    UnsafeCacheError
        The directory has files of another model.
    CacheError
    """
    check = context.cancellation.check
    if isinstance(model, RemoteModel):
        target = model.cache
        assert isinstance(target, LayeredDirectory)
        target.check_source()  # again, now that this process has noted its own model there
        for name, digest in model.opened.published.items():
            target.check_manifest(name, digest, MAX_KEPT_BYTES)
            target.adopt(name, check=check)
        return lambda shard, file: target.adopt(shard.data_path, file, check)
    if (copied := _open_copy(local_dir, model, context)) is None:
        return lambda shard, file: None
    with open(model.directory / model.manifest.name, "rb") as file:
        copied.update(model.manifest.name, file, check)
    return lambda shard, file: copied.update(shard.data_path, file, check)


def copy_companions(local_dir: Path, model: Model, context: LoadContext, companions: Companions) -> None:
    """Copy the companion files of a model in another directory; those of a model on a server come with its shards.

    Raises
    ------
    NotFoundError, ManifestSyntaxError, UnsafePathError
        See `Companions.of_directory`.
    UnsafeCacheError, CacheError
        See `open_target`.
    """
    if not isinstance(model, LocalModel) or (copied := _open_copy(local_dir, model, context)) is None:
        return
    names = companions.of_directory(model)
    for name in names:
        with open(model.path(name), "rb") as file:
            copied.update(name, file, context.cancellation.check)
    note = CompanionNote(model.manifest.name, tuple(names))
    if note != CompanionNote.read(copied.layout):
        note.write(copied.layout)


def _open_copy(local_dir: Path, model: Model, context: LoadContext) -> LayeredDirectory | None:
    """Open the directory for the copy of a local model; None if it is the model's own."""
    if local_dir.exists() and os.path.samefile(local_dir, model.directory):
        return None
    copied = open_layered(local_dir, str(model.directory), None)
    if context.force:
        copied.old_files = OldFiles(copied.layout)
    return copied
