"""Where the cache is, and which models are in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import platformdirs

from .cache import disk_bytes
from .paths import STATE_DIRECTORY

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
    """The cache's top directory: the option, else NDCACHE_HOME, else the system's place for caches."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    return Path(home).expanduser().absolute() if home else Path(platformdirs.user_cache_dir("ndcache"))


def models(root: Path) -> Iterator[CachedModel]:
    """The models in the cache, of all scopes, by name."""
    for state in sorted(root.glob(f"*/*/{STATE_DIRECTORY}")):
        directory = state.parent
        if directory.name.endswith(".deleted"):
            continue
        try:
            source = json.loads((state / "source.json").read_text("utf-8"))["source"]
        except (OSError, ValueError, KeyError, TypeError):
            source = directory.name
        yield CachedModel(unquote(directory.parent.name), source, directory, disk_bytes(directory))
