"""List the models in the cache."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import quote, unquote

from ...errors import CacheUnavailableError
from ...files.folder import Folder, is_gone
from ...files.notes import read_note
from ...location.hub import revision_of
from ...report.words import format_size
from ..directory import ModelDirectory
from .contents import read_contents
from .deletion import is_trash
from .sizes import DiskUse, FileId, disk_bytes, disk_use
from .usage import is_used, last_use

__all__ = ["CachedModel", "FoundModel", "find_denied", "find_models", "find_trash"]


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache.

    Attributes
    ----------
    source : str
        Its URL, without secrets.
    scope : str
        The scope that it is in.
    revision : str or None
        The branch, tag or commit of a model on Hugging Face.
    path : pathlib.Path
        Its directory.
    size : int
        Bytes on disk, in all files. Bytes that several models share count for the first of them, in the order of
        `ndcache.cache.models`.
    shared : int
        Bytes that count for another model.
    shards, shards_total : int
        How many shards are there, and how many the manifests of the model describe.
    manifests : tuple of str
        The names of these manifests. Without any, the directory has single files.
    partial_size, aside_size : int
        Bytes of `size` that interrupted downloads left, and bytes of files that were set aside because they are bad.
    created, last_used : datetime.datetime
        When the model was first fetched, and when a load used it last, in UTC.
    in_use : bool
        Whether a load uses the model at this moment, in any process: it is under way, or its arrays are open.
    """

    source: str
    scope: str
    revision: str | None
    path: Path
    size: int
    shared: int
    shards: int
    shards_total: int
    manifests: tuple[str, ...]
    partial_size: int
    aside_size: int
    created: datetime
    last_used: datetime
    in_use: bool

    def __repr__(self) -> str:
        scope = "" if self.scope == "default" else f", scope {self.scope}"
        used = "in use" if self.in_use else f"last used {self.last_used:%Y-%m-%d %H:%M} UTC"
        return f"<CachedModel {self.source}{scope}: {self.state}, {format_size(self.size)}, {used}>"

    @property
    def complete(self) -> bool:
        """Whether all shards of the model are there, with the right sizes."""
        return bool(self.manifests) and self.shards == self.shards_total

    @property
    def is_partial(self) -> bool:
        """Whether shards of the model are missing."""
        return self.shards < self.shards_total

    @property
    def state(self) -> str:
        """``"complete"``, ``"12 of 17 shards"``, or ``"single files"``."""
        if not self.manifests:
            return "single files"
        return "complete" if self.complete else f"{self.shards:,} of {self.shards_total:,} shards"


@dataclass(frozen=True)
class FoundModel:
    """A model in the cache, and what is needed to remove it.

    Attributes
    ----------
    model : CachedModel
    directory : ModelDirectory
    use : DiskUse
    """

    model: CachedModel
    directory: ModelDirectory
    use: DiskUse


def find_models(root: Path, scope: str | None = None) -> Iterator[FoundModel]:
    """Yield the models in the cache, or in one scope of it, sorted by scope and directory; skip symbolic links.

    Raises
    ------
    CacheUnavailableError
        The cache's directory cannot be listed.
    """
    counted: set[FileId] = set()
    for folder in _model_folders(root, scope):
        if not is_trash(folder.names[-1]) and (found := _find(folder, counted)) is not None:
            yield found


def find_trash(root: Path, scope: str | None = None) -> list[Folder]:
    """Return the folders that interrupted deletions left."""
    return [folder for folder in _model_folders(root, scope) if is_trash(folder.names[-1])]


def find_denied(root: Path, scope: str | None = None) -> list[Path]:
    """Return the folders of scopes and models that this account may not read, and that `find_models` skips."""
    with contextlib.suppress(OSError):
        scopes = [root / name for name in _chosen(_folders(root), scope)]
        models = [folder.path for folder in _model_folders(root, scope)]
        return [path for path in (*scopes, *models) if not os.access(path, os.R_OK | os.X_OK)]
    return []


def _find(folder: Folder, counted: set[FileId]) -> FoundModel | None:
    directory = ModelDirectory(folder.path, root=folder.root)
    layout = directory.layout
    try:
        if not layout.state.exists():
            return None
    except OSError:
        return None  # it belongs to another account, or is a link
    source = (read_note(layout.state, "source.json") or {}).get("source")
    use, contents = disk_use(folder.path), read_contents(directory)
    used = min(last_use(layout), time.time())  # the clock may have been set back since
    shared = sum(file.nbytes for key, file in use.linked.items() if key in counted)
    counted.update(use.linked)
    created = None
    with contextlib.suppress(OSError):
        created = layout.state.status("source.json")
    scope, name = folder.names
    source = source if isinstance(source, str) else name
    model = CachedModel(
        source=source,
        scope=unquote(scope),
        revision=revision_of(source),
        path=folder.path,
        size=use.nbytes - shared,
        shared=shared,
        shards=contents.shards,
        shards_total=contents.shards_total,
        manifests=contents.manifests,
        partial_size=disk_bytes(layout.partials.path),
        aside_size=disk_bytes(layout.quarantine.path),
        created=_time(used if created is None else min(created.st_mtime, used)),
        last_used=_time(used),
        in_use=is_used(layout),
    )
    return FoundModel(model, directory, use)


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _model_folders(root: Path, only: str | None) -> Iterator[Folder]:
    try:
        scopes = _folders(root)
    except OSError as error:
        if is_gone(error):
            return
        raise CacheUnavailableError(
            f"the cache directory {root} cannot be listed: {error.strerror}",
            hint="Choose another one: cache_dir, --cache-dir, or NDCACHE_HOME.",
        ) from error
    for scope in _chosen(scopes, only):
        with contextlib.suppress(OSError):  # it belongs to another account, or was deleted just now
            yield from (Folder(root, (scope, name)) for name in _folders(root / scope))


def _chosen(scopes: list[str], only: str | None) -> list[str]:
    return scopes if only is None else sorted({quote(only, safe="")} & set(scopes))


def _folders(directory: Path) -> list[str]:
    """Return the sorted names of the folders in a directory, without links to folders."""
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
