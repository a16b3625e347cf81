"""Plan a fetch without doing it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from ..companions import Companions
from ..context import LoadContext
from ..format.manifest import Shard
from ..sources.local import LocalModel
from ..sources.model import Model
from ..sources.preview import preview_shards
from ..sources.remote import RemoteModel
from ..store.cleanup import free_bytes
from ..store.layered import open_layered

__all__ = ["FetchPlan", "PlannedFile", "plan_fetch"]

Action: TypeAlias = Literal["keep", "copy", "fetch"]


@dataclass(frozen=True)
class PlannedFile:
    """One file of a `FetchPlan`.

    Attributes
    ----------
    name : str
        Its path in the model's directory.
    nbytes : int or None
        Its size, or the bytes of the wanted ranges of a shard; None if the server does not tell.
    action : {"keep", "copy", "fetch"}
        It is there; the cache, or another model in it, has it; or it comes from the server.
    to_fetch : int or None
        The bytes that the server would send, less what an interrupted download has left; None if it does not tell.
    """

    name: str
    nbytes: int | None
    action: Action
    to_fetch: int | None


@dataclass(frozen=True)
class FetchPlan:
    """The result of ``fetch(…, dry_run=True)``.

    Attributes
    ----------
    directory : pathlib.Path
        Where the model would be.
    files : tuple of PlannedFile
        The shards, in manifest order, and the companion files.
    free_bytes : int or None
        Free bytes on the disk of `directory`; None if the system does not tell.
    """

    directory: Path
    files: tuple[PlannedFile, ...] = field(repr=False)
    free_bytes: int | None

    @property
    def nbytes(self) -> int:
        """Return the bytes of all files whose size is known."""
        return sum(file.nbytes or 0 for file in self.files)

    @property
    def bytes_to_fetch(self) -> int:
        """Return the bytes that the server would send, as far as it tells."""
        return sum(file.to_fetch or 0 for file in self.files)

    @property
    def bytes_to_write(self) -> int:
        """Return the bytes that the disk needs room for. Copies need less where they can share blocks."""
        return sum(file.nbytes or 0 for file in self.files if file.action != "keep")

    @property
    def has_room(self) -> bool:
        """Return whether the disk has room, as far as the system tells."""
        return self.free_bytes is None or self.bytes_to_write <= self.free_bytes


def plan_fetch(
    model: Model, context: LoadContext, shards: Sequence[Shard], companions: Companions, local_dir: Path | None
) -> FetchPlan:
    """Return what a fetch of these shards and companion files would do.

    Parameters
    ----------
    model : Model
        Opened for a dry run.
    context : LoadContext
    shards : sequence of Shard
    companions : Companions
    local_dir : pathlib.Path or None
        The directory of the user's that the fetch would fill.

    Raises
    ------
    NdcacheError
        The fetch would raise it, too.
    ValueError
        See `Companions.preview`.
    """
    directory = model.directory if local_dir is None else local_dir
    if isinstance(model, RemoteModel):
        model.cache.keeps_ranges = local_dir is None
        files = [*_plan_shards(model, context, shards), *_plan_companions(model, context, companions)]
    else:
        model.prepare(shards)
        files = [PlannedFile(shard.data_path, shard.nbytes, "keep", 0) for shard in shards]
        if local_dir is not None and isinstance(model, LocalModel):
            sizes = {name: os.path.getsize(model.path(name)) for name in companions.of_directory(model)}
            files += [PlannedFile(name, nbytes, "keep", 0) for name, nbytes in sizes.items()]
    if local_dir is not None and local_dir != model.directory:
        source = str(model.locations[0].label if isinstance(model, RemoteModel) else model.directory)
        target = open_layered(local_dir, source, None)
        has = {file.name: not context.force and target.size(file.name) == file.nbytes for file in files}
        files = [_into_directory(file, is_there=has[file.name]) for file in files]
    return FetchPlan(directory, tuple(files), free_bytes(directory))


def _into_directory(file: PlannedFile, *, is_there: bool) -> PlannedFile:
    if is_there:
        return PlannedFile(file.name, file.nbytes, "keep", 0)
    return PlannedFile(file.name, file.nbytes, "fetch" if file.action == "fetch" else "copy", file.to_fetch)


def _plan_shards(model: RemoteModel, context: LoadContext, shards: Sequence[Shard]) -> Iterator[PlannedFile]:
    for shard, found in zip(shards, preview_shards(model, context, shards), strict=True):
        action: Action = "keep" if found.is_cached else "copy" if found.has_equal else "fetch"
        yield PlannedFile(shard.data_path, found.nbytes, action, found.to_fetch)


def _plan_companions(model: RemoteModel, context: LoadContext, companions: Companions) -> Iterator[PlannedFile]:
    for file in companions.preview(model, context):
        yield PlannedFile(file.name, file.nbytes, "keep" if file.to_fetch == 0 else "fetch", file.to_fetch)
