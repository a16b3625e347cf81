"""A directory of the user's choice for one model, in which files of the cache need not be downloaded again.

It is a `ModelDirectory` of its own, with its own partial files, locks and notes. A file that it lacks is looked up in
the cache, and copied when it is needed. A file that ndcache did not put there is never overwritten or moved.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from ..errors import CacheUnavailableError, UnsafeCacheError
from ..files.copying import copy_file
from ..files.notes import read_note
from ..format.manifest import Shard
from ..location import Location
from .directory import ModelDirectory, read_metadata
from .inventory import CacheScope
from .metadata import FileMetadata
from .partials.file import PartialFile
from .partials.folder import PartialFiles

__all__ = ["LayeredDirectory", "LocalScope", "open_layered"]


class LayeredDirectory(ModelDirectory):
    """A model's directory that looks up in the cache what it does not have.

    Parameters
    ----------
    directory : pathlib.Path
        Without symbolic links.
    source : str
        Where the files come from, without secrets.
    seed : ModelDirectory or None
        The model's directory in the cache, or another one that has its files.
    """

    keeps_ranges = False  # other programs read the files

    def __init__(self, directory: Path, source: str, seed: ModelDirectory | None) -> None:
        super().__init__(directory, source, root=directory.parent)
        self.layout = replace(self.layout, is_local_dir=True)
        self.partials = PartialFiles(self.layout)
        self.seed = seed
        self.layout_in_cache = None if seed is None else seed.layout_in_cache

    def adopt(self, name: str, file: BinaryIO | None = None, check: Callable[[], None] = lambda: None) -> None:
        """Copy a file of the cache into this directory, unless it is there.

        Parameters
        ----------
        name : str
        file : binary file, optional
            The file of the cache, open, if it must be the one with that name.
        check : callable
            Called now and then; may raise to stop.

        Raises
        ------
        UnsafeCacheError
            There is another file with that name.
        CacheError
        """
        if self.seed is None or (self._owns(name) and not self._is_foreign(name)):
            return
        if file is not None and not self.seed.is_published(name, file):
            return  # not a file of the cache
        metadata = self.seed.metadata(name)
        opened = self.seed.open_file(name)
        if opened is None:
            return
        with opened, self.partials.create(name) as partial:
            status = os.fstat(opened.fileno())
            copy_file(opened, partial.file, check)
            self.publish(partial, name).close()
        if metadata is not None and metadata.is_unchanged(status) and (now := super()._status(name)) is not None:
            self.try_to_remember(name, replace(metadata, mtime_ns=now.st_mtime_ns))

    def update(self, name: str, file: BinaryIO, check: Callable[[], None] = lambda: None) -> None:
        """Copy a file of a local model into this directory, unless it is there and has not changed since.

        Parameters
        ----------
        name : str
        file : binary file
            Open for reading. It may be a link's target: the model is the user's own.
        check : callable
            Called now and then; may raise to stop.

        Raises
        ------
        UnsafeCacheError
            There is another file with that name.
        CacheError
        """
        status = os.fstat(file.fileno())
        version = f'"{status.st_size:x}-{status.st_mtime_ns:x}"'
        known, there = read_metadata(self.layout, name), self.layout.status(name)
        if known is not None and there is not None:
            if not known.is_unchanged(there):
                super().quarantine(name)  # somebody has changed it
            elif known.etag == version and not self.old_files.has(name):
                return
        with self.partials.create(name) as partial:
            copy_file(file, partial.file, check)
            self.publish(partial, name, etag=version).close()

    def check_manifest(self, name: str, digest: str, limit: int) -> None:
        """Check that the file with the manifest's name, if ndcache did not put it there, is the one that the load uses.

        Raises
        ------
        UnsafeCacheError
            It belongs to another model.
        """
        # Its note may be missing: another process is just writing it, or was killed before it could.
        if self._is_foreign(name) and not self.has_sha256(name, digest, limit):
            raise self._foreign(name)

    def check_source(self) -> None:
        """Check that this directory has no files of another model.

        Raises
        ------
        UnsafeCacheError
            It has.
        """
        with self.layout.translate_errors():
            other = (read_note(self.layout.state, "source.json") or {}).get("source")
        if isinstance(other, str) and other != self.layout.source:
            raise UnsafeCacheError(
                f"{self.directory} has another model, {other}",
                hint="Give another directory; this one was left as it is.",
            )

    # --- looking up

    def _owns(self, name: str) -> bool:
        return self.layout.status(name) is not None

    def _seed_for(self, name: str) -> ModelDirectory | None:
        """Return the directory to look a file up in if this one does not have it."""
        return None if self._owns(name) else self.seed

    def _status(self, name: str) -> os.stat_result | None:
        status = super()._status(name)
        return status if status is not None or self.seed is None else self.seed._status(name)

    def metadata(self, name: str) -> FileMetadata | None:
        seed = self._seed_for(name)
        return super().metadata(name) if seed is None else seed.metadata(name)

    def open_file(self, name: str) -> BinaryIO | None:
        seed = self._seed_for(name)
        return super().open_file(name) if seed is None else seed.open_file(name)

    def open_shard(self, shard: Shard) -> BinaryIO | None:
        seed = self._seed_for(shard.data_path)
        return super().open_shard(shard) if seed is None else seed.open_shard(shard)

    # --- writing

    def publish(
        self,
        partial: PartialFile,
        name: str,
        *,
        etag: str | None = None,
        last_modified: str | None = None,
        content_id: str | None = None,
        syncing: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> BinaryIO:
        self.check_source()  # another process may have begun to fetch another model since the directory was opened
        if self._is_foreign(name) and not (
            self._owns(name) and filecmp.cmp(partial.path, self.path(name), shallow=False)
        ):
            raise self._foreign(name)
        return super().publish(
            partial, name, etag=etag, last_modified=last_modified, content_id=content_id, syncing=syncing
        )

    def remember(self, name: str, metadata: FileMetadata) -> None:
        seed = self._seed_for(name)
        if seed is None:
            super().remember(name, metadata)
        else:
            seed.remember(name, metadata)

    def quarantine(self, name: str, file: BinaryIO | None = None) -> None:
        if self._is_foreign(name):
            raise self._foreign(name)
        seed = self._seed_for(name)
        if seed is None:
            super().quarantine(name, file)
        else:
            seed.quarantine(name, file)

    def _is_foreign(self, name: str) -> bool:
        """Return whether there is a file with this name that ndcache did not put there, or a link."""
        if self._owns(name):
            # An old file, which counts as missing, has metadata nevertheless.
            return read_metadata(self.layout, name) is None
        with self.layout.translate_errors(name):
            folder, last = self.layout.place(name)
            return folder.status(last) is not None

    def _foreign(self, name: str) -> UnsafeCacheError:
        return UnsafeCacheError(
            f"{self.directory} has another file with the name {name}, which was left as it is",
            shard=name,
            hint="Is it of another model? Give an empty or a new directory, or move that file away.",
        )


@dataclass(frozen=True)
class LocalScope(CacheScope):
    """A scope of the cache whose files go to a directory of the user's.

    Attributes
    ----------
    local_dir : pathlib.Path
    """

    local_dir: Path = Path()

    def make_room(self, nbytes: int, model: Path) -> int:
        return 0  # nothing is added to the cache

    def open(self, location: Location) -> LayeredDirectory:
        seed = None if self.top is None else super().open(location)
        return open_layered(self.local_dir, location.label, seed)


def open_layered(local_dir: Path, source: str, seed: ModelDirectory | None) -> LayeredDirectory:
    """Open a directory of the user's, which need not exist, for the model at `source`.

    Raises
    ------
    CacheUnavailableError
        It is a file, or cannot be looked at.
    UnsafeCacheError
        It has another model.
    """
    real = Path(os.path.realpath(local_dir))
    if real.exists() and not real.is_dir():
        error = CacheUnavailableError(
            f"{local_dir} is a file, not a directory", hint="Give a directory, or a path that does not exist yet."
        )
        error.errno = errno.ENOTDIR
        raise error
    directory = LayeredDirectory(real, source, seed)
    directory.check_source()
    return directory
