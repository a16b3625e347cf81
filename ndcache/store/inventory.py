"""Where the cache is, and which models are in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import platformdirs

from ..errors import CacheUnavailableError
from ..files.folder import Folder, is_gone
from ..files.notes import read_note
from ..format.paths import STATE_DIRECTORY
from .cleanup import disk_bytes

__all__ = ["CachedModel", "cache_root", "models"]


@dataclass(frozen=True)
class CachedModel:
    """A model found in the cache by `models`.

    Attributes
    ----------
    scope : str
    source : str
        Its URL, without secrets.
    path : pathlib.Path
        Its directory.
    nbytes : int
        Bytes on disk.
    """

    scope: str
    source: str
    path: Path
    nbytes: int


def cache_root(cache_dir: str | os.PathLike[str] | None, home: str | None) -> Path:
    """Return the cache's top directory: the option, else NDCACHE_HOME, else the system's place for caches.

    Raises
    ------
    CacheUnavailableError
        It cannot be told: there is no home directory.
    """
    given, cause = cache_dir if cache_dir is not None else home, None
    try:
        if given:
            return Path(given).expanduser().absolute()
        root = Path(platformdirs.user_cache_dir("ndcache"))
        if root.is_absolute():  # not a "~" that nobody could resolve: it would lie wherever we happen to be
            return root
    except (OSError, RuntimeError) as error:  # no such user, no home directory; no working directory any more
        cause = error
    raise CacheUnavailableError(
        f"the cache has no place: {given} leads nowhere ({cause})"
        if given
        else "the cache has no place: this user has no home directory, and HOME is not set or no full path",
        hint="Set NDCACHE_HOME to a directory that can be written, or give cache_dir (--cache-dir).",
    ) from cause


def models(root: Path) -> Iterator[CachedModel]:
    """The models in the cache, of all scopes, by name; what somebody linked into it is left out.

    Raises
    ------
    CacheUnavailableError
        The cache's directory cannot be listed.
    """
    try:
        scopes = _folders(root)
    except OSError as error:
        if is_gone(error):
            return
        raise CacheUnavailableError(
            f"the cache directory {root} cannot be listed: {error.strerror}",
            hint="Choose another one: cache_dir, --cache-dir, or NDCACHE_HOME.",
        ) from error
    for scope in scopes:
        with contextlib.suppress(OSError):  # of another account, or just deleted
            for name in _folders(root / scope):
                if not name.endswith(".deleted") and (model := _model(Folder(root, (scope, name)))) is not None:
                    yield model


def _model(folder: Folder) -> CachedModel | None:
    scope, name = folder.names
    state = folder / STATE_DIRECTORY
    try:
        if not state.exists():
            return None
    except OSError:
        return None  # of another account's, or one that somebody linked to it
    source = (read_note(state, "source.json") or {}).get("source")
    return CachedModel(
        unquote(scope), source if isinstance(source, str) else name, folder.path, disk_bytes(folder.path)
    )


def _folders(directory: Path) -> list[str]:
    """The names of the folders in a directory, sorted; no links."""
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
