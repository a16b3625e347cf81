"""Find the cache, the models in it, and the directory of each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import platformdirs

from ..errors import CacheUnavailableError, UnsafeCacheError
from ..files.folder import Folder, is_gone
from ..files.notes import read_note
from ..format.paths import STATE_DIRECTORY
from ..location import Location
from .cleanup import delete_model, disk_bytes
from .directory import ModelDirectory
from .memory import FallbackDirectory

__all__ = ["CacheScope", "CachedModel", "cache_root", "cache_scope", "models"]


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


@dataclass(frozen=True)
class CacheScope:
    """One scope of the cache, in which models have their directories.

    Attributes
    ----------
    top : pathlib.Path or None
        The cache's top directory; None if there is no place for one.
    name : str
        The name of the scope's folder.
    is_private : bool
        Whether to make `top`, if it is missing, for this account only.
    why_no_top : str or None
        Why there is no place for a cache. Local directories can be loaded nevertheless.
    """

    top: Path | None
    name: str
    is_private: bool
    why_no_top: str | None = None

    @property
    def root(self) -> Path:
        """Return the cache's top directory.

        Raises
        ------
        CacheUnavailableError
            There is no place for one.
        """
        if self.top is None:
            raise CacheUnavailableError(self.why_no_top or "")
        return self.top

    @property
    def limits(self) -> Folder | None:
        """Return the folder in which processes share what they know of servers; None if there is no place for one."""
        return None if self.top is None else Folder(self.top, (STATE_DIRECTORY, "limits"), self.is_private)

    def directories(self, location: Location) -> list[Path]:
        """Return the directories where a model may lie: the current one, then those of earlier versions of ndcache."""
        return [self.root / self.name / key for key in location.cache_keys]

    def open(self, location: Location) -> ModelDirectory:
        """Open a model's directory, which is created when the first file is written."""
        return ModelDirectory(self._directory(location), location.label, root=self.top, is_private=self.is_private)

    def open_with_fallback(self, location: Location) -> FallbackDirectory:
        """Open a model's directory that falls back to memory where files cannot be kept."""
        directory = None if self.top is None else self._directory(location)
        return FallbackDirectory(directory, location.label, self.why_no_top, root=self.top, is_private=self.is_private)

    def delete(self, location: Location) -> int:
        """Remove a model from the cache, given its URL or its directory in the cache.

        Returns
        -------
        int
            Bytes freed.

        Raises
        ------
        UnsafeCacheError
            The directory does not lie in the cache.
        """
        root = self.root
        if location.directory is None:
            return sum(delete_model(ModelDirectory(directory, root=root)) for directory in self.directories(location))
        directory = Path(os.path.abspath(location.directory))
        # A model lies two folders below the root. The way to the root may have links, the way below it may not.
        if os.path.realpath(directory.parent.parent) != os.path.realpath(root):
            raise UnsafeCacheError(
                f"{directory} does not lie in the cache {root} as a model does",
                hint="ndcache deletes only what it fetched; remove the directory yourself.",
            )
        return delete_model(ModelDirectory(root.joinpath(*directory.parts[-2:]), root=root))

    def _directory(self, location: Location) -> Path:
        first, *earlier = self.directories(location)
        return first if os.path.isdir(first) else next(filter(os.path.isdir, earlier), first)


def cache_root(cache_dir: str | os.PathLike[str] | None, home: str | None) -> Path:
    """Return the cache's top directory: the option, else NDCACHE_HOME, else the system's place for caches.

    Raises
    ------
    CacheUnavailableError
        There is no such place, because there is no home directory.
    """
    given, cause = cache_dir if cache_dir is not None else home, None
    try:
        if given:
            return Path(given).expanduser().absolute()
        root = Path(platformdirs.user_cache_dir("ndcache"))
        if root.is_absolute():  # an unresolved "~" would lie in the working directory
            return root
    except (OSError, RuntimeError) as error:  # no such user, no home directory, or the working directory was removed
        cause = error
    raise CacheUnavailableError(
        f"the cache has no place: {given} leads nowhere ({cause})"
        if given
        else "the cache has no place: this user has no home directory, and HOME is not set or not a full path",
        hint="Set NDCACHE_HOME to a directory that can be written, or give cache_dir (--cache-dir).",
    ) from cause


def cache_scope(cache_dir: str | os.PathLike[str] | None, name: str, environ: Mapping[str, str]) -> CacheScope:
    """Return a scope of the cache in `cache_dir`, else in NDCACHE_HOME, else in the system's place for caches."""
    home = environ.get("NDCACHE_HOME")
    top, why_no_top = None, None
    try:
        top = cache_root(cache_dir, home)
    except CacheUnavailableError as error:
        why_no_top = str(error)
    return CacheScope(top, quote(name, safe=""), is_private=cache_dir is None and not home, why_no_top=why_no_top)


def models(root: Path) -> Iterator[CachedModel]:
    """Yield the models of all scopes in the cache, sorted by name; skip symbolic links.

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
        with contextlib.suppress(OSError):  # it belongs to another account, or was deleted just now
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
        return None  # it belongs to another account, or is a link
    source = (read_note(state, "source.json") or {}).get("source")
    return CachedModel(
        unquote(scope), source if isinstance(source, str) else name, folder.path, disk_bytes(folder.path)
    )


def _folders(directory: Path) -> list[str]:
    """Return the sorted names of the folders in a directory, without links to folders."""
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
