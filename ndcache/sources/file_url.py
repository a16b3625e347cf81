"""Single files: the URL to request, the models that a file may belong to, and its place in the cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from ..errors import UnsafePathError, redact
from ..format.paths import check_path
from ..location import Location, locate, remote_location
from ..location.hub import hf_endpoint
from ..store.inventory import CacheScope
from ..urls.url import parse

__all__ = ["choose_model", "delete_file", "file_url", "find_file", "possible_models"]


def file_url(url: str, revision: str | None = None) -> str:
    """Return the http(s) URL of a file, for every spelling that `ndcache.load` knows.

    Raises
    ------
    ValueError
        `url` does not name a file on a server, or `revision` does not fit it.
    """
    location = locate(url, revision=revision)
    if not location.is_remote:
        raise ValueError(f"this is not the URL of a file on a server: {redact(url)}")
    # `locate` takes the name off a manifest's URL, and takes any other file for a directory.
    base = location.url(location.manifest_names[0]) if len(location.manifest_names) == 1 else location.base[:-1]
    file = replace(parse(base), query=location.query)
    if file.path.rpartition("/")[2] == "" or re.search(r"/([?#].*)?$", url):
        raise ValueError(f"this URL names a directory, not a file: {redact(url)}")
    return file.with_user


def possible_models(url: str) -> Iterator[tuple[Location, str]]:
    """Yield each directory above a file, the nearest first, and the file's path in it.

    Any of them may be the directory of the model that the file belongs to.

    Raises
    ------
    UnsafePathError
        The file's name cannot be that of a model's file.
    ValueError
        `url` does not name a file on a server.
    """
    file, endpoint = parse(file_url(url)), hf_endpoint(os.environ)
    folder, _, name = file.path.rpartition("/")
    check_path(unquote(name))
    while True:
        yield remote_location(replace(file, path=f"{folder}/"), (), endpoint), unquote(name)
        if not folder:
            return
        folder, _, last = folder.rpartition("/")
        name = f"{last}/{name}"
        try:
            check_path(unquote(name))
        except UnsafePathError:
            return  # no model has a file with this path, or with a longer one that ends in it


def find_file(cache: CacheScope, url: str) -> Path | None:
    """Return the path of a single file in the cache, or None if it is not there."""
    for location, name in possible_models(url):
        directory = cache.open(location)
        if directory.size(name) is not None:
            return directory.path(name)
    return None


def choose_model(cache: CacheScope, url: str) -> tuple[Location, str]:
    """Return the model that a new file is stored with, and the file's path in it.

    It is the nearest model with a directory in the cache, or else one at the URL of the file's own folder.
    """
    places = list(possible_models(url))
    return next((place for place in places if cache.open(place[0]).exists()), places[0])


def delete_file(cache: CacheScope, url: str) -> None:
    """Remove a single file from the cache, wherever it lies there."""
    for location, name in possible_models(url):
        directory = cache.open(location)
        if directory.size(name) is not None:
            directory.remove(name)
