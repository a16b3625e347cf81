"""One scope of the cache: find and open the directories of its models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ..errors import CacheUnavailableError
from ..location.locate import Location
from .directory import ModelDirectory
from .inventory import cache_root
from .memory import CacheOrMemory

__all__ = ["CacheScope", "cache_scope"]


@dataclass(frozen=True)
class CacheScope:
    """Find and open the cache directories of models.

    Attributes
    ----------
    top : pathlib.Path or None
        The cache's top directory; None if there is no place for one.
    name : str
        The scope, as its folder is called.
    is_private : bool
        Whether `top`, if it has to be made, is for this account only.
    why_no_top : str or None
        Why there is no place for a cache. Local directories can be loaded all the same.
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

    def directories(self, location: Location) -> list[Path]:
        """Return the directories that a model may have: today's, then those of earlier versions of ndcache."""
        return [self.root / self.name / key for key in location.cache_keys]

    def open(self, location: Location) -> ModelDirectory:
        """Open a model's directory. Nothing is created before something is written."""
        return ModelDirectory(self._directory(location), location.label, root=self.top, is_private=self.is_private)

    def open_or_memory(self, location: Location) -> CacheOrMemory:
        """Open a model's directory, or, where nothing can be kept, hold in memory what comes."""
        directory = None if self.top is None else self._directory(location)
        return CacheOrMemory(directory, location.label, self.why_no_top, root=self.top, is_private=self.is_private)

    def _directory(self, location: Location) -> Path:
        first, *earlier = self.directories(location)
        return first if os.path.isdir(first) else next(filter(os.path.isdir, earlier), first)


def cache_scope(cache_dir: str | os.PathLike[str] | None, name: str, environ: Mapping[str, str]) -> CacheScope:
    """Return a scope of the cache in `cache_dir`, else in NDCACHE_HOME, else in the system's place for caches."""
    home = environ.get("NDCACHE_HOME")
    top, why_no_top = None, None
    try:
        top = cache_root(cache_dir, home)
    except CacheUnavailableError as error:
        why_no_top = str(error)
    return CacheScope(top, quote(name, safe=""), is_private=cache_dir is None and not home, why_no_top=why_no_top)
