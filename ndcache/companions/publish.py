"""Publish a companion file in the cache, whoever sent it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

from ..format.paths import flatten
from ..store.directory import ModelDirectory, read_metadata
from ..store.lock import share_lock, try_lock
from ..store.partials.file import PartialFile

__all__ = ["publish", "writing"]


@contextlib.contextmanager
def writing(cache: ModelDirectory, name: str) -> Iterator[None]:
    """Write and publish a companion file in the block; then remove what killed processes left of it.

    Several processes may write the same file at once. They share a lock meanwhile, so the last one that ends knows that
    partial files which are still there belong to nobody. After a failure, they are kept for the next load.
    """
    with cache.layout.translate_errors(name):
        path = cache.layout.make(cache.layout.locks).path / flatten(name)
    is_complete = False
    try:
        with share_lock(path):
            yield
        is_complete = True
    finally:
        with try_lock(path, lambda: True) as is_last:
            if is_last and is_complete:
                cache.partials.remove_all(flatten(name))


def publish(
    cache: ModelDirectory, partial: PartialFile, name: str, *, etag: str | None, last_modified: str | None
) -> None:
    """Give a complete and checked companion file its name.

    If somebody has changed the file of this name, it is kept aside.

    Parameters
    ----------
    cache : ModelDirectory
    partial : PartialFile
        Its SHA-256 has been computed.
    name : str
    etag, last_modified : str or None
        What the server calls this version.

    Raises
    ------
    CacheError
    """
    _set_aside_changed(cache, name, partial.hasher.hexdigest("sha256"))
    cache.publish(partial, name, etag=etag, last_modified=last_modified).close()


def _set_aside_changed(cache: ModelDirectory, name: str, sha256: str) -> None:
    """Keep a file that somebody has changed since it was published: its name goes to the new one."""
    status, known = cache.layout.status(name), read_metadata(cache.layout, name)
    if status is None or (known is not None and known.is_unchanged(status)):
        return
    with cache.layout.translate_errors(name):
        folder, last = cache.layout.place(name)
        file = folder.open(last)
        if file is None:
            return
        with file:
            is_equal = hashlib.sha256(file.read()).hexdigest() == sha256
    if not is_equal:
        cache.quarantine(name)
