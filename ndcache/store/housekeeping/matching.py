"""Find the models of the cache that the user means: by source, by path, or by a pattern."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from ...errors import NotFoundError
from ...location import Location, locate
from ...location.hub import short_source
from .listing import CachedModel

__all__ = ["match_source"]


def match_source(source: str | os.PathLike[str]) -> Callable[[CachedModel], bool]:
    """Return a function that tells whether a model is meant.

    Parameters
    ----------
    source : str or path-like
        A source, as for a load; the path of a model's directory in the cache; or a pattern with ``*``, which is
        compared with the source as it is listed, and with ``hf://owner/name``.
    """
    location: Location | None = None
    try:
        location = locate(source)
    except (ValueError, NotFoundError):
        pass  # a pattern, or the text of a listing, which need not be a URL
    keys = location.cache_keys if location is not None and location.is_remote else ()
    place = None if location is None or location.directory is None else _place(location.directory)
    # Only ``*`` has a meaning: URLs may have ``?``, and brackets around an address.
    pattern = re.sub(r"([?[])", r"[\1]", os.fspath(source).strip())

    def is_meant(model: CachedModel) -> bool:
        if model.path.name in keys or (place is not None and _place(model.path) == place):
            return True
        names = (model.source, model.source.removesuffix("/"), short_source(model.source))
        return any(name is not None and fnmatchcase(name, pattern) for name in names)

    return is_meant


def _place(directory: Path) -> tuple[str, ...]:
    """Return what identifies a model's directory: the way to the cache may have links, the way below it may not."""
    directory = Path(os.path.abspath(directory))
    return os.path.realpath(directory.parent.parent), *directory.parts[-2:]
