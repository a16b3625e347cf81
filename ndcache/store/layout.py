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
            headers/<file>               the headers of safetensors files: see `format.safetensors.headers`
            aside/<file>                 a file with wrong bytes, in quarantine
            used                         locked while the model is used; its time is that of the last use

``<root>/.<scope>.digests`` is the index of digests (see `DigestIndex`). ``<root>/.ndcache`` has the limits of servers.
``<root>/CACHEDIR.TAG`` is for backups.

These names, and the form of the notes, are shared with other versions of ndcache that use the same cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import CacheUnavailableError, DiskFullError, NdcacheError
from ..files.cache_tag import may_tag, write_tag
from ..files.descriptors import check_shortage
from ..files.folder import Folder
from ..files.notes import write_note
from ..format.paths import STATE_DIRECTORY
from ..format.safetensors.headers import HEADERS_DIRECTORY

__all__ = ["Layout", "TranslateErrors", "disk_full"]


#: Names that may lie in the cache's directory before the first model.
_OWN = re.compile(rf"{re.escape(STATE_DIRECTORY)}|\..+\.digests")


@dataclass(frozen=True)
class Layout:
    """The folders of one model's cache directory.

    Attributes
    ----------
    model : Folder
        The directory itself, with the manifest and the shards.
    source : str
        Where the model comes from, without secrets; noted for listings.
    is_cached : bool
        Whether the directory lies in the cache, so that the cache may be tagged.
    is_local_dir : bool
        Whether it is one of the user's, and has this model only.
    """

    model: Folder
    source: str = ""
    is_cached: bool = False
    is_local_dir: bool = False

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
    def headers(self) -> Folder:
        """Return the folder of headers of safetensors files."""
        return self.state / HEADERS_DIRECTORY

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

    def status(self, name: str) -> os.stat_result | None:
        """Return the status of a published file; None if there is none."""
        with self.translate_errors(name):
            folder, last = self.place(name)
            status = folder.status(last)
            return status if status is not None and stat.S_ISREG(status.st_mode) else None

    def make(self, folder: Folder) -> Folder:
        """Make a folder of the state, unless it exists, and return it."""
        if not folder.exists():
            top = Folder(self.model.root, (), self.model.is_private)
            is_to_be_tagged = self.is_cached and may_tag(top, _OWN)
            folder.make()
            if is_to_be_tagged:
                write_tag(top)
            if self.source:
                with contextlib.suppress(OSError):  # listings work without it
                    if self.state.status("source.json") is None:  # its time is when the model came to the cache
                        self.write_note(self.state, "source.json", {"source": self.source})
        return folder

    def write_note(self, folder: Folder, name: str, content: Mapping[str, Any]) -> None:
        """Write a note, first under a name among the partial files: `prune` finds it if this process is killed."""
        self.partials.make()
        write_note(folder, name, content, (self.partials, f"{name}.{secrets.token_hex(8)}"))

    def translate_errors(self, name: str | None = None) -> TranslateErrors:
        """Return a context manager that translates errors of the operating system; see `TranslateErrors`."""
        return TranslateErrors(self.model.path, name, is_local_dir=self.is_local_dir)


class TranslateErrors:
    """Context manager that turns errors of the operating system into a `CacheError` with a hint.

    Parameters
    ----------
    directory : pathlib.Path
        The model's directory.
    name : str or None
        The file in question.
    is_local_dir : bool
        Whether the directory is one of the user's. Default False: it lies in the cache.
    """

    __slots__ = ("_directory", "_is_local_dir", "_name")

    def __init__(self, directory: Path, name: str | None, *, is_local_dir: bool = False) -> None:
        self._directory = directory
        self._name = name
        self._is_local_dir = is_local_dir

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, OSError) or isinstance(error, NdcacheError):
            return
        check_shortage(error)  # the directory is not to blame for that
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(self._directory, name=self._name, is_local_dir=self._is_local_dir) from error
        unavailable = CacheUnavailableError(
            f"{_kind(self._is_local_dir)} {self._directory} cannot be used: {error.strerror or error}",
            shard=self._name,
            hint=f"Choose another one: {_options(self._is_local_dir)}.",
        )
        unavailable.errno, unavailable.strerror = error.errno, error.strerror
        raise unavailable from error


def disk_full(
    directory: Path,
    needed: int | None = None,
    free: int | None = None,
    *,
    name: str | None = None,
    is_local_dir: bool = False,
) -> DiskFullError:
    """Return the error for a disk without room, with the figures where they are known."""
    detail = "" if needed is None else f": {needed:,} bytes needed, {free:,} free"
    error = DiskFullError(
        f"no room in {_kind(is_local_dir)} {directory}{detail}",
        shard=name,
        expected=needed,
        received=free,
        hint=f"Free some space{'' if is_local_dir else ' (ndcache ls, ndcache rm)'}, or choose another disk:"
        f" {_options(is_local_dir)}.",
    )
    error.errno = errno.ENOSPC
    return error


def _kind(is_local_dir: bool) -> str:
    return "the directory" if is_local_dir else "the cache directory"


def _options(is_local_dir: bool) -> str:
    """Return the options that choose another directory."""
    return "local_dir, --local-dir" if is_local_dir else "cache_dir, --cache-dir, or NDCACHE_HOME"
