"""Take over a file of another model of the cache: by a hard link, else by shared blocks, else by a copy."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator

from ..files.copying import copy_file
from ..files.folder import Folder
from ..format.manifest import Shard
from ..format.paths import flatten
from .directory import ModelDirectory
from .partials.file import PartialFile

__all__ = ["taken_over"]


@contextlib.contextmanager
def taken_over(
    source: ModelDirectory, name: str, cache: ModelDirectory, shard: Shard, check: Callable[[], None]
) -> Iterator[PartialFile | None]:
    """Yield a partial file of a shard with the bytes of another model's file, to be checked and published.

    After the block, nothing is left of it unless it was published. It may be a hard link: nothing may write to it.

    Parameters
    ----------
    source : ModelDirectory
        The other model.
    name : str
        The file there.
    cache : ModelDirectory
        The model that has the shard.
    shard : Shard
    check : callable
        Called now and then; may raise to stop.

    Yields
    ------
    PartialFile or None
        None if the other model does not have a file of the shard's size under that name.
    """
    with cache.layout.translate_errors(shard.data_path):
        partial = None
        if source.size(name) == shard.nbytes:
            folder, last = source.layout.place(name)
            target, flat = cache.layout.make(cache.layout.partials), flatten(shard.data_path)
            partial = _link(folder, last, target, flat) or _copy(folder, last, target, flat, check)
        if partial is None:
            yield None
            return
        try:
            # Looked at only now: nobody else can replace a file with this name.
            is_whole = os.fstat(partial.file.fileno()).st_size == shard.nbytes
            partial.ranges.add(0, shard.nbytes)
            yield partial if is_whole else None
        finally:
            partial.delete()


def _link(folder: Folder, name: str, target: Folder, flat: str) -> PartialFile | None:
    """Return a hard link to a file; None if the file system, or the file's owner, does not permit it."""
    new_name = f"{flat}.{secrets.token_hex(8)}"
    try:
        folder.link(name, target, new_name)
    except (OSError, NotImplementedError):
        return None
    file = target.open(new_name)
    if file is None:  # a symbolic link was planted just now
        with contextlib.suppress(OSError):
            target.unlink(new_name)
        return None
    return PartialFile(target, flat, new_name, file)


def _copy(folder: Folder, name: str, target: Folder, flat: str, check: Callable[[], None]) -> PartialFile | None:
    file = folder.open(name)
    if file is None:
        return None
    with file:
        partial = PartialFile.open_new(target, flat)
        try:
            copy_file(file, partial.file, check)
        except BaseException:
            partial.delete()
            raise
    return partial
