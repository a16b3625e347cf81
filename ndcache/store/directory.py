"""One model's cache directory: look files up, and publish new ones.

A file gets its name by a rename, after its size and digest were checked and its bytes were synced to disk. It is never
written again. So everybody who sees the name sees the right bytes, and a reader that has the file open or mapped keeps
them, even if the name is removed or given to another file. Notes about published files save work, but prove nothing: if
a note is missing, or disagrees with the file or the manifest, the file's digest decides.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from ..errors import CacheUnavailableError, UnsafeCacheError
from ..files.folder import Folder, sync
from ..files.notes import read_note
from ..format.manifest import Shard
from ..format.paths import STATE_DIRECTORY, flatten
from ..format.safetensors.headers import HEADERS_DIRECTORY
from .digest_index import DigestIndex
from .layout import Layout
from .lock import DownloadLock, Patience, acquire_or_wait, try_lock
from .metadata import FileMetadata, Match
from .old_files import OldFiles
from .partials.file import PartialFile
from .partials.folder import PartialFiles
from .publish import give_name, quarantine, tell_apart, withdraw_note

__all__ = ["ModelDirectory", "read_metadata"]


class ModelDirectory:
    """The cache directory of one model, which is a valid local model directory itself.

    Folders are created only when something is written, so that a read-only cache still serves its files. Methods raise
    a `CacheError` for each error of the operating system.

    Parameters
    ----------
    directory : pathlib.Path
        The model's directory.
    source : str
        Where its files come from, without secrets; kept for listings.
    root : pathlib.Path, optional
        The cache's root, above `directory`: no symbolic link is followed below it. Default: two folders up.
    is_private : bool
        Whether to make the root, if it is missing, for this account only. Default False.
    is_cached : bool
        Whether the root is that of the cache. Default False.

    Attributes
    ----------
    directory : pathlib.Path
    layout : Layout
        Its folders.
    layout_in_cache : Layout or None
        Those in the cache, where loads note that they use the model; None if the model is elsewhere only.
    partials : PartialFiles
        Files that are being written, or that interrupted loads left.
    why_not_kept : str or None
        Why new files are not kept here; see `FallbackDirectory`.
    digests : DigestIndex or None
        Where other models of the cache have the same bytes; None for a directory outside the cache.
    old_files : OldFiles
        The files that count as missing.
    keeps_ranges : bool
        Whether some ranges of a shard will do. Only ndcache reads the partial files in which they are kept.
    """

    why_not_kept: str | None = None
    digests: DigestIndex | None = None
    old_files = OldFiles()
    keeps_ranges = True

    def __init__(
        self,
        directory: Path,
        source: str = "",
        *,
        root: Path | None = None,
        is_private: bool = False,
        is_cached: bool = False,
    ) -> None:
        self.directory = directory
        root = directory.parent.parent if root is None else root
        self.layout = Layout(Folder(root, directory.relative_to(root).parts, is_private), source, is_cached)
        self.layout_in_cache: Layout | None = self.layout
        self.partials = PartialFiles(self.layout)

    def fall_back(self, error: CacheUnavailableError) -> bool:
        """Keep new files elsewhere from now on, and return True; return False if the caller must raise `error`."""
        return False

    # --- looking up

    def exists(self) -> bool:
        """Return whether the model has a directory in the cache."""
        with self.layout.translate_errors():
            return self.layout.model.exists()

    def path(self, name: str) -> Path:
        """Return the path of the file `name`, which need not exist.

        Raises
        ------
        UnsafeCacheError
            A folder on the way is a symbolic link.
        """
        with self.layout.translate_errors(name):
            folder, last = self.layout.place(name)
            folder.check()
            return folder.path / last

    def size(self, name: str) -> int | None:
        """Return the size of a published file; None if there is none."""
        status = self._status(name)
        return None if status is None else status.st_size

    def version(self, name: str) -> tuple[int, int, int] | None:
        """Return a value that changes when another file is published under this name; None if there is none."""
        status = self._status(name)
        # Without the inode number: some network file systems, and FUSE, give a file a new one each time.
        return None if status is None else (status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def has(self, shard: Shard) -> bool:
        """Return whether the shard's file is there and of the right size."""
        return self.size(shard.data_path) == shard.nbytes

    def has_sha256(self, name: str, digest: str, limit: int) -> bool:
        """Return whether a published file of up to `limit` bytes has this SHA-256."""
        data = self.read(name, limit)
        return data is not None and hashlib.sha256(data).hexdigest() == digest

    def is_intact(self, name: str) -> bool:
        """Return whether a file, of any version, still has the size and time that it was published with."""
        status = self._status(name)
        if status is None:
            return False
        metadata = self.metadata(name)
        return metadata is not None and metadata.is_unchanged(status)

    def is_published(self, name: str, file: BinaryIO) -> bool:
        """Return whether an open file is still the one that has this name."""
        now, status = self._status(name), os.fstat(file.fileno())
        # By size and time, as inode numbers may change; see `version`.
        return now is not None and (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns)

    def compare(self, shard: Shard, content_id: str) -> Match:
        """Compare the shard's file, by the note about it, with the manifest; see `FileMetadata.compare`."""
        metadata, status = self.metadata(shard.data_path), self._status(shard.data_path)
        return Match.UNKNOWN if metadata is None or status is None else metadata.compare(status, shard, content_id)

    def metadata(self, name: str) -> FileMetadata | None:
        """Return the noted metadata of a published file; None if there is no note, or it cannot be read."""
        return None if self.old_files.has(name) else read_metadata(self.layout, name)

    def read(self, name: str, limit: int) -> bytes | None:
        """Return the first `limit` bytes of a published file, and one more if it is larger; None if there is none."""
        with self.layout.translate_errors(name):
            file = self.open_file(name)
            if file is None:
                return None
            with file:
                size = os.fstat(file.fileno()).st_size
                return file.read(min(size, limit) + 1)

    def open_file(self, name: str) -> BinaryIO | None:
        """Open a published file for reading; return None if there is none."""
        if self.old_files.has(name):
            return None
        with self.layout.translate_errors(name):
            folder, last = self.layout.place(name)
            return folder.open(last)

    def open_shard(self, shard: Shard) -> BinaryIO | None:
        """Open the shard's file for reading, if it is there and of the right size."""
        if self.old_files.has(shard.data_path):
            return None
        with self.layout.translate_errors(shard.data_path):
            folder, last = self.layout.place(shard.data_path)
            status = folder.status(last)
            if status is None or status.st_size != shard.nbytes:
                return None
            file = folder.open(last)
            if file is not None and os.fstat(file.fileno()).st_size != shard.nbytes:
                file.close()  # the file was replaced a moment ago
                return None
            return file

    def manifest_names(self) -> list[str]:
        """Return the names of files that may be manifests, and the paths of those that keep headers."""
        with self.layout.translate_errors():
            found = [entry for entry in self.layout.model.entries() if entry.endswith(".json")]
            found += [f"{STATE_DIRECTORY}/{HEADERS_DIRECTORY}/{entry}" for entry in self.layout.headers.entries()]
        return [entry for entry in found if self.size(entry) is not None]

    # --- writing

    def acquire_or_wait(
        self,
        name: str,
        is_there: Callable[[], bool],
        sleep: Callable[[float], None],
        patience: Patience | None = None,
    ) -> AbstractContextManager[DownloadLock | None]:
        """Wait until this thread should download the file `name`, or it is there; see `lock.acquire_or_wait`."""
        return acquire_or_wait(
            self._lock_path(name),
            is_there=is_there,
            progress=lambda: self.partials.progress(flatten(name)),
            sleep=sleep,
            patience=patience,
        )

    def try_lock(self, name: str, is_there: Callable[[], bool]) -> AbstractContextManager[bool]:
        """Take the lock to download the file `name` unless somebody holds it; see `lock.try_lock`."""
        return try_lock(self._lock_path(name), is_there)

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
        """Give a complete and checked partial file its name, and return it open for reading.

        Parameters
        ----------
        partial : PartialFile
        name : str
        etag, last_modified : str, optional
            What the server calls this version.
        content_id : str, optional
            Identifies a shard's content; see `FileMetadata.compare_content`. None for other files.
        syncing : callable, optional
            Returns a context manager, which is entered while the disk syncs.

        Raises
        ------
        CacheUnavailableError
            Raised from FileNotFoundError if another process deleted the directory, or the partial file as an orphan.
        CacheError
        """
        with self.layout.translate_errors(name), self.layout.model.held(), self.partials.folder.held():
            folder, last = self.layout.place(name)
            with syncing():
                sync(partial.file.fileno())
            tell_apart(partial, folder, last)
            status, named = os.fstat(partial.file.fileno()), partial.folder.status(partial.file_name)
            if named is None:
                raise FileNotFoundError(errno.ENOENT, "a file that is being written is gone", str(partial.path))
            has_stable_inodes = os.path.samestat(named, status)
            partial.file.close()
            folder.make()
            known = FileMetadata.of(
                status, partial.hasher.hexdigests, etag=etag, last_modified=last_modified, content_id=content_id
            )
            if content_id is not None:
                withdraw_note(self.layout, f"{flatten(name)}.json", known)
            file = give_name(partial, folder, last, lambda: self.quarantine(name))
            try:
                with syncing():
                    folder.sync()
                now = folder.status(last)
                # By now, somebody else's file may have taken the name.
                if now is not None and (
                    os.path.samestat(now, status) if has_stable_inodes else known.is_unchanged(now)
                ):
                    self.try_to_remember(name, replace(known, mtime_ns=now.st_mtime_ns))
                if content_id is not None:  # a shard: others who download it will find it here
                    self.partials.remove_all(flatten(name))
            except BaseException:
                file.close()
                raise
        return file

    def remember(self, name: str, metadata: FileMetadata) -> None:
        """Write a note about a published file. If a crash loses it, the file is only read once more."""
        with self.layout.translate_errors(name):
            if not self.layout.model.exists():
                raise FileNotFoundError(errno.ENOENT, "the model was deleted just now", str(self.directory))
            folder = self.layout.make(self.layout.metadata)
            self.layout.write_note(folder, f"{flatten(name)}.json", metadata.to_note())

    def try_to_remember(self, name: str, metadata: FileMetadata) -> bool:
        """Write a note about a published file, if that is possible.

        If the cache is full or read-only, the file is checked again next time.

        Returns
        -------
        bool
            Whether it was noted.
        """
        try:
            self.remember(name, metadata)
        except UnsafeCacheError:
            raise
        except OSError:
            return False
        return True

    def quarantine(self, name: str, file: BinaryIO | None = None) -> None:
        """Move a bad file out of the way, and keep it as evidence if possible.

        `file` is the open bad file, if given: a good one that has taken its name in the meantime is left alone.
        """
        with self.layout.translate_errors(name):
            folder, last = self.layout.place(name)
            if file is None or self.is_published(name, file):
                with contextlib.suppress(FileNotFoundError):
                    quarantine(folder, last, self.layout.make(self.layout.quarantine), flatten(name))

    def remove(self, name: str) -> None:
        """Remove a published file, if it is there."""
        with self.layout.translate_errors(name), contextlib.suppress(FileNotFoundError):
            folder, last = self.layout.place(name)
            folder.unlink(last)

    def _lock_path(self, name: str) -> Path:
        with self.layout.translate_errors(name):
            return self.layout.make(self.layout.locks).path / flatten(name)

    def _status(self, name: str) -> os.stat_result | None:
        return None if self.old_files.has(name) else self.layout.status(name)


def read_metadata(layout: Layout, name: str) -> FileMetadata | None:
    """Return the noted metadata of a published file; None if there is no note, or it cannot be read."""
    with layout.translate_errors(name):
        note = read_note(layout.metadata, f"{flatten(name)}.json")
    return None if note is None else FileMetadata.from_note(note)
