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
from .errors import CacheUnavailableError
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
    """Yield the models in the cache, of all scopes, by name.

    Raises
    ------
    CacheUnavailableError
        It cannot be read.
    """
    try:
        os.listdir(root)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CacheUnavailableError(
            f"the cache {root} cannot be read: {error.strerror}",
            hint="Choose another one: cache_dir, --cache-dir, or NDCACHE_HOME.",
        ) from error
    for state in sorted(root.glob(f"*/*/{STATE_DIRECTORY}")):
        directory = state.parent
        if directory.name.endswith(".deleted"):
            continue
        try:
            source = json.loads((state / "source.json").read_text("utf-8"))["source"]
        except (OSError, ValueError, KeyError, TypeError):
            source = directory.name
        yield CachedModel(unquote(directory.parent.name), source, directory, disk_bytes(directory))
