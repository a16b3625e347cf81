"""Find the cache, and the directory of each model in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import platformdirs

from ..errors import CacheUnavailableError, UnsafeCacheError
from ..files.folder import Folder
from ..format.paths import STATE_DIRECTORY
from ..location import Location
from .digest_index import DigestIndex
from .directory import ModelDirectory
from .housekeeping.deletion import delete_model
from .housekeeping.pruning import PruneRules, prune_cache
from .housekeeping.quantities import parse_size
from .memory import FallbackDirectory, UnwrittenDirectory

__all__ = ["CacheScope", "cache_root", "cache_scope"]


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
    max_size : int or None
        The most bytes that the whole cache may have.
    """

    top: Path | None
    name: str
    is_private: bool
    why_no_top: str | None = None
    max_size: int | None = None

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
        found = ModelDirectory(self._directory(location), location.label, **self._place)
        found.digests = self._digests(location)
        return found

    def open_with_fallback(self, location: Location) -> FallbackDirectory:
        """Open a model's directory that falls back to memory where files cannot be kept."""
        directory = None if self.top is None else self._directory(location)
        found = FallbackDirectory(directory, location.label, self.why_no_top, **self._place)
        found.digests = self._digests(location)
        return found

    def open_unwritten(self, location: Location) -> UnwrittenDirectory:
        """Open a model's directory to look at what is there; new files go to memory."""
        directory = None if self.top is None else self._directory(location)
        found = UnwrittenDirectory(directory, location.label, "nothing is written", root=self.top)
        found.digests = self._digests(location)
        return found

    def make_room(self, nbytes: int, model: Path) -> int:
        """Remove models that have not been used for the longest time, so that the cache keeps to its limit.

        Models in use stay.

        Parameters
        ----------
        nbytes : int
            Bytes that will be added.
        model : pathlib.Path
            The directory of the model that they are for, which stays, too.

        Returns
        -------
        int
            By how many bytes the cache will exceed its limit nevertheless.
        """
        if self.top is None or self.max_size is None:
            return 0
        report = prune_cache(self.top, PruneRules(max_size=max(0, self.max_size - nbytes)), keeps=model)
        return max(0, report.size + nbytes - self.max_size)

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
            return sum(delete_model(ModelDirectory(each, root=root)) for each in self.directories(location))
        directory = Path(os.path.abspath(location.directory))
        # A model lies two folders below the root. The way to the root may have links, the way below it may not.
        if os.path.realpath(directory.parent.parent) != os.path.realpath(root):
            raise UnsafeCacheError(
                f"{directory} does not lie in the cache {root} as a model does",
                hint="ndcache deletes only what it fetched; remove the directory yourself.",
            )
        return delete_model(ModelDirectory(root.joinpath(*directory.parts[-2:]), root=root))

    @property
    def _place(self) -> dict[str, Any]:
        return {"root": self.top, "is_private": self.is_private, "is_cached": True}

    def _digests(self, location: Location) -> DigestIndex | None:
        if self.top is None:
            return None
        folder = Folder(self.top, (), self.is_private)
        return DigestIndex(folder, Folder(self.top, (self.name,), self.is_private), location.identities[0])

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
    """Return a scope of the cache in `cache_dir`, else in NDCACHE_HOME, else in the system's place for caches.

    Raises
    ------
    ValueError
        NDCACHE_MAX_SIZE is no size.
    """
    home = environ.get("NDCACHE_HOME")
    top, why_no_top = None, None
    try:
        top = cache_root(cache_dir, home)
    except CacheUnavailableError as error:
        why_no_top = str(error)
    is_private, max_size = cache_dir is None and not home, _max_size(environ)
    return CacheScope(top, quote(name, safe=""), is_private, why_no_top, max_size)


def _max_size(environ: Mapping[str, str]) -> int | None:
    text = environ.get("NDCACHE_MAX_SIZE", "").strip()
    try:
        return parse_size(text) if text else None
    except ValueError as error:
        raise ValueError(f"NDCACHE_MAX_SIZE cannot be used: {error}") from error
