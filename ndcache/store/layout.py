"""The folders of one model's cache directory, and what errors in them mean.

::

    <root>/<scope>/<model>/
        tensor-cache.json              the manifest, as the server sent it
        params_shard_0.bin             complete and checked, or not there at all
        .ndcache/                      ndcache's own state
            source.json                  where the model came from
            validators/<file>.json       what is known of a published file: see `FileMetadata`
            parts/<file>.<random>        a partial file, private to its writer: see `PartialFile`
            locks/<file>                 held by the process that downloads the file: see `acquire_or_wait`
            aside/<file>                 a file with wrong bytes, in quarantine

These names, and the form of the notes, are shared with other versions of ndcache that use the same cache.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import CacheUnavailableError, DiskFullError, NdcacheError
from ..files.descriptors import check_shortage
from ..files.folder import Folder
from ..files.notes import write_note
from ..format.paths import STATE_DIRECTORY

__all__ = ["Layout", "TranslateErrors", "disk_full"]


@dataclass(frozen=True)
class Layout:
    """The folders of one model's cache directory.

    Attributes
    ----------
    model : Folder
        The directory itself, with the manifest and the shards.
    source : str
        Where the model comes from, without secrets; noted for listings.
    """

    model: Folder
    source: str = ""

    @cached_property
    def state(self) -> Folder:
        """Return the folder of ndcache's own state."""
        return self.model / STATE_DIRECTORY

    @cached_property
    def partials(self) -> Folder:
        """Return the folder of partial files."""
        return self.state / "parts"

    @cached_property
    def metadata(self) -> Folder:
        """Return the folder of notes about published files."""
        return self.state / "validators"

    @cached_property
    def locks(self) -> Folder:
        """Return the folder of download locks."""
        return self.state / "locks"

    @cached_property
    def quarantine(self) -> Folder:
        """Return the folder of files with wrong bytes."""
        return self.state / "aside"

    def place(self, name: str) -> tuple[Folder, str]:
        """Return the folder in which the file `name` belongs, and its name there."""
        folder, (*above, last) = self.model, name.split("/")
        for component in above:
            folder = folder / component
        return folder, last

    def make(self, folder: Folder) -> Folder:
        """Make a folder of the state, unless it exists, and return it."""
        if not folder.exists():
            folder.make()
            if self.source:
                with contextlib.suppress(OSError):  # listings work without it
                    self.write_note(self.state, "source.json", {"source": self.source})
        return folder

    def write_note(self, folder: Folder, name: str, content: Mapping[str, Any]) -> None:
        """Write a note, first under a name among the partial files: `prune` finds it if this process is killed."""
        self.partials.make()
        write_note(folder, name, content, (self.partials, f"{name}.{secrets.token_hex(8)}"))

    def translate_errors(self, name: str | None = None) -> TranslateErrors:
        """Return a context manager that translates errors of the operating system; see `TranslateErrors`."""
        return TranslateErrors(self.model.path, name)


class TranslateErrors:
    """Context manager that turns errors of the operating system into a `CacheError` with a hint.

    Parameters
    ----------
    directory : pathlib.Path
        The model's directory.
    name : str or None
        The file in question.
    """

    __slots__ = ("_directory", "_name")

    def __init__(self, directory: Path, name: str | None) -> None:
        self._directory = directory
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, OSError) or isinstance(error, NdcacheError):
            return
        check_shortage(error)  # the directory is not to blame for that
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(self._directory, name=self._name) from error
        unavailable = CacheUnavailableError(
            f"the cache directory {self._directory} cannot be used: {error.strerror or error}",
            shard=self._name,
            hint="Choose another one: cache_dir, --cache-dir, or NDCACHE_HOME.",
        )
        unavailable.errno, unavailable.strerror = error.errno, error.strerror
        raise unavailable from error


def disk_full(
    directory: Path, needed: int | None = None, free: int | None = None, *, name: str | None = None
) -> DiskFullError:
    """Return the error for a disk without room, with the figures where they are known."""
    detail = "" if needed is None else f": {needed:,} bytes needed, {free:,} free"
    error = DiskFullError(
        f"no room in the cache directory {directory}{detail}",
        shard=name,
        expected=needed,
        received=free,
        hint="Free some space (ndcache ls, ndcache rm), or choose another disk: cache_dir, --cache-dir, NDCACHE_HOME.",
    )
    error.errno = errno.ENOSPC
    return error
