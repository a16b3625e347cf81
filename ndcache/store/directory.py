"""One model's cache directory: look up, private parts, atomic publishing, delete, verify.

::

    <root>/<scope>/<model>/
        tensor-cache.json              the manifest, as the server sent it
        params_shard_0.bin             complete and checked, or not there at all
        .ndcache/                      ndcache's own state
            source.json                  where the model came from
            validators/<file>.json       what is known of a published file: size, time, digests, ETag
            parts/<file>.<random>        private to its writer, opened with O_EXCL; see `ndcache.parts`
            locks/<file>                 whose turn it is to download; see `lock`
            aside/<file>                 what turned out to be bad

A file gets its name by rename, after its size and digest were found right and its bytes were synced to disk, and is
never written again. So whoever sees the name sees the right bytes, and a reader that has it open or mapped keeps
them, whatever happens to the name. A validator is a memory, not a promise: where it is missing or disagrees
with the file or the manifest, the file's digest decides.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CacheUnavailableError, UnsafeCacheError, UnsafePathError
from ..files.folder import Folder, sync
from ..files.notes import read_note, write_note
from ..format.manifest import Manifest, Shard
from ..format.paths import STATE_DIRECTORY, check_path, flat_name, unflat
from .cleanup import delete_model, empty_trash, free_bytes
from .lock import DownloadLock, acquire_or_wait, try_lock
from .metadata import FileMetadata
from .partial import PartialFile, PartialFiles, PartialSource
from .publish import give_name, quarantine, remove_idle_copies
from .ranges import ByteRanges
from .translate import Reporting, disk_full

__all__ = ["ModelDirectory"]

#: Seconds after which a part is taken to have no writer any more, where nothing else tells.
_IDLE_SECONDS = 300


class ModelDirectory:
    """The cache directory of one model, which is a valid local model directory itself.

    Nothing is created before something is written, so that a read-only cache still serves what it has. What the
    operating system says comes out of each method as a `CacheError`.

    Parameters
    ----------
    directory : pathlib.Path
        The model's directory.
    source : str
        Where its files come from, without secrets; kept for listings.
    root : pathlib.Path, optional
        The cache's root, above `directory`: no symbolic link is followed below it. Default: two folders up.
    is_private : bool
        Whether the root, if it has to be made, is for this account only. Default False.

    Attributes
    ----------
    why_not_kept : str or None
        Why files that come do not go here; see `ndcache.in_memory`.
    """

    why_not_kept: str | None = None

    def __init__(
        self, directory: Path, source: str = "", *, root: Path | None = None, is_private: bool = False
    ) -> None:
        self.directory = directory
        root = directory.parent.parent if root is None else root
        self._folder = Folder(root, directory.relative_to(root).parts, is_private)
        self._state = self._folder / STATE_DIRECTORY
        self._parts = PartialFiles(self._state / "parts")
        self._metadata = self._state / "validators"
        self._source = source

    def fall_back(self, error: CacheUnavailableError) -> bool:
        """Return whether what cannot be kept here, because of `error`, goes elsewhere from now on."""
        return False

    # --- looking up

    def exists(self) -> bool:
        """Whether there is anything of the model."""
        with self._reporting():
            return self._folder.exists()

    def path(self, name: str) -> Path:
        """Where the file `name` lies, or would.

        Raises
        ------
        UnsafeCacheError
            A folder on the way is a symbolic link.
        """
        with self._reporting(name):
            folder, last = self._place(name)
            folder.check()
            return folder.path / last

    def size(self, name: str) -> int | None:
        """The size of a published file; None if there is none."""
        status = self._status(name)
        return None if status is None else status.st_size

    def version(self, name: str) -> tuple[int, int, int] | None:
        """Something that changes when another file is published under this name; None if there is none."""
        status = self._status(name)
        # Not its inode's number: some network file systems and FUSE give a file another one each time.
        return None if status is None else (status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def _status(self, name: str) -> os.stat_result | None:
        with self._reporting(name):
            folder, last = self._place(name)
            status = folder.status(last)
            return status if status is not None and stat.S_ISREG(status.st_mode) else None

    def has(self, shard: Shard) -> bool:
        """Whether the shard is there and of the right size."""
        return self.size(shard.data_path) == shard.nbytes

    def open_shard(self, shard: Shard) -> BinaryIO | None:
        """The shard's file, open for reading, if it is there and of the right size."""
        with self._reporting(shard.data_path):
            folder, last = self._place(shard.data_path)
            status = folder.status(last)
            if status is None or status.st_size != shard.nbytes:
                return None
            file = folder.open(last)
            if file is not None and os.fstat(file.fileno()).st_size != shard.nbytes:
                file.close()  # another one than a moment ago
                return None
            return file

    def is_now(self, name: str, file: BinaryIO) -> bool:
        """Whether an open file is the one that has this name, by size and time: inodes' numbers may not tell."""
        now, status = self._status(name), os.fstat(file.fileno())
        return now is not None and (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns)

    def is_known(self, shard: Shard, content_id: str) -> bool | None:
        """Whether the shard's file is what the manifest says, as far as is remembered: see `FileMetadata.compare`."""
        metadata, status = self.metadata(shard.data_path), self._status(shard.data_path)
        return None if metadata is None or status is None else metadata.compare(status, shard, content_id)

    def is_intact(self, name: str) -> bool:
        """Whether the file is as it was published, by size and time, be it of this version or another."""
        status = self._status(name)
        if status is None:
            return False
        metadata = self.metadata(name)
        return metadata is not None and metadata.is_unchanged(status)

    def read(self, name: str, limit: int) -> bytes | None:
        """The content of a small published file, up to `limit` bytes."""
        with self._reporting(name):
            folder, last = self._place(name)
            file = folder.open(last)
            if file is None:
                return None
            with file:
                size = os.fstat(file.fileno()).st_size
                return file.read(min(size, limit) + 1)  # more than `limit` if the file is larger

    def holds(self, name: str, digest: str, limit: int) -> bool:
        """Whether a small published file has this SHA-256."""
        data = self.read(name, limit)
        return data is not None and hashlib.sha256(data).hexdigest() == digest

    def metadata(self, name: str) -> FileMetadata | None:
        """What is known of the file; None if nothing is, or what is known cannot be read."""
        with self._reporting(name):
            note = read_note(self._metadata, f"{flat_name(name)}.json")
        return None if note is None else FileMetadata.from_note(note)

    # --- writing

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[PartialFile]:
        """A new part for the file `name`. At the end of the block it is closed, and kept if it is of further use."""
        with self._reporting(name):
            self._make(self._parts.folder)
            with self._parts.new(flat_name(name)) as part:
                yield part

    def copy_longest_partial(
        self,
        part: PartialFile,
        shard: Shard,
        content_id: str,
        check: Callable[[], None],
        *,
        is_checked: bool,
        is_exclusive: bool,
    ) -> None:
        """Begin the new `part` of a shard with what somebody else has of it.

        Parameters
        ----------
        part : Part
        shard : Shard
        content_id : str
            What the manifest says of the shard's content: parts with another claim are not used.
        check : callable
            Called now and then; may raise to end it.
        is_checked : bool
            Whether a digest will show what a crash of the system has torn.
        is_exclusive : bool
            Whether nobody else writes parts of this shard now, so that those which were found can be removed.
        """

        def is_usable(origin: PartialSource) -> bool:
            return origin.content_id == content_id and (is_checked or origin.is_trustworthy)

        with self._reporting(shard.data_path):
            found = self._parts.copy_longest(part, shard.nbytes, is_usable, check)
        if is_exclusive:
            for file_name in found:
                self._parts.remove(file_name)

    def open_some(self, shard: Shard, content_id: str, wanted: ByteRanges) -> BinaryIO | None:
        """A file of the shard's size that has the wanted bytes, fetched without the rest; None if there is none.

        They were compared with no digest.
        """

        def is_usable(origin: PartialSource) -> bool:
            return origin.content_id == content_id and origin.is_trustworthy

        with self._reporting(shard.data_path):
            return self._parts.open_with(flat_name(shard.data_path), wanted, shard.nbytes, is_usable)

    def acquire_or_wait(
        self, name: str, is_there: Callable[[], bool], sleep: Callable[[float], None]
    ) -> AbstractContextManager[DownloadLock | None]:
        """Wait until this thread should download the file `name`, or it is there: see `lock.acquire_or_wait`."""
        with self._reporting(name):
            locks = self._make(self._state / "locks")
        path = locks.path / flat_name(name)
        return acquire_or_wait(
            path, is_there=is_there, progress=lambda: self._parts.progress(flat_name(name)), sleep=sleep
        )

    def keep_with_holes(self, part: PartialFile, shard: Shard) -> BinaryIO:
        """Keep a part that has what is wanted of a shard, for `open_some`; it comes back open for reading."""
        with self._reporting(shard.data_path):
            return part.keep_with_holes(shard.nbytes)

    def publish(
        self,
        part: PartialFile,
        name: str,
        *,
        etag: str | None = None,
        last_modified: str | None = None,
        content_id: str | None = None,
    ) -> BinaryIO:
        """Give a complete and checked part its name; it comes back open for reading, whoever takes the name away again.

        Raises
        ------
        CacheUnavailableError
            From FileNotFoundError, if another process deleted the directory, or took the part for an orphan.
        CacheError
        """
        with self._reporting(name), self._folder.held(), self._parts.folder.held():
            sync(part.file.fileno())
            status, named = os.fstat(part.file.fileno()), part.folder.status(part.file_name)
            are_inodes_told = named is not None and os.path.samestat(named, status)
            part.file.close()
            folder, last = self._place(name)
            folder.make()
            file = give_name(part, folder, last, lambda: self.quarantine(name))
            try:
                folder.sync()
                known = FileMetadata(status.st_size, status.st_mtime_ns, part.digests, etag, last_modified, content_id)
                now = folder.status(last)
                # Somebody else's file may have taken its name by now.
                if now is not None and (os.path.samestat(now, status) if are_inodes_told else known.is_unchanged(now)):
                    self.try_to_remember(name, replace(known, mtime_ns=now.st_mtime_ns))
                if content_id is not None:  # a shard: whoever else downloads it will find it here
                    self._parts.remove_all(flat_name(name))
            except BaseException:
                file.close()
                raise
        return file

    def remember(self, name: str, metadata: FileMetadata) -> None:
        """Keep what is known of a published file; losing it in a crash only costs reading the file again."""
        with self._reporting(name):
            if not self._folder.exists():
                raise FileNotFoundError(errno.ENOENT, "the model was deleted just now", str(self.directory))
            self._make(self._metadata)
            self._write_note(self._metadata, f"{flat_name(name)}.json", metadata.to_note())

    def try_to_remember(self, name: str, metadata: FileMetadata) -> bool:
        """The same where it does not matter: a cache that is full or read-only forgets, and checks again.

        Returns
        -------
        bool
            Whether it is remembered.
        """
        try:
            self.remember(name, metadata)
        except UnsafeCacheError:
            raise
        except OSError:
            return False
        return True

    def quarantine(self, name: str, file: BinaryIO | None = None) -> None:
        """Take a bad file out of the way, without destroying the evidence if that can be helped.

        `file` is the open bad one, which may have lost its name to a good one in the meantime.
        """
        with self._reporting(name):
            folder, last = self._place(name)
            if file is None or self.is_now(name, file):
                with contextlib.suppress(FileNotFoundError):
                    quarantine(folder, last, self._make(self._state / "aside"), flat_name(name))

    def remove(self, name: str) -> None:
        """Remove a published file; if it is not there, nothing happens."""
        with self._reporting(name), contextlib.suppress(FileNotFoundError):
            folder, last = self._place(name)
            folder.unlink(last)

    # --- tidying

    def prune(self, manifest: Manifest, others: Callable[[], Iterable[Manifest]]) -> None:
        """Remove what is of no use any more: shards of former versions, and what interrupted loads left.

        Parameters
        ----------
        manifest : Manifest
            The one in use.
        others : callable
            Gives the other manifests whose shards are kept; called only if there is something in question.
        """
        with self._reporting():
            empty_trash(self._folder)
            remove_idle_copies(self._folder, _IDLE_SECONDS)
            shards = {flat_name(shard.data_path): shard for shard in manifest.shards}
            published = {entry.removesuffix(".json") for entry in self._metadata.entries()}
            under_way = self._parts.names() | set((self._state / "locks").entries())
            if (published | under_way) - shards.keys() - {flat_name(manifest.name)}:
                shards.update((flat_name(shard.data_path), shard) for other in others() for shard in other.shards)
            in_use = {shard.data_path for shard in shards.values()}
            for name in published - shards.keys():
                if unflat(name) not in in_use:
                    with contextlib.suppress(UnsafePathError, UnsafeCacheError):  # a note with a crafted name
                        self._remove_if_shard(unflat(name))
            for name in under_way:
                self._prune_partials(name, shards.get(name))

    def _prune_partials(self, flat: str, shard: Shard | None) -> None:
        if shard is None:
            self._parts.remove_idle(flat, _IDLE_SECONDS)
        elif self.has(shard):
            known = self.metadata(shard.data_path)
            self._parts.remove_idle(flat, _IDLE_SECONDS, None if known is None else known.content_id)
            _unlink(self._state / "locks", flat)

    def _remove_if_shard(self, name: str) -> None:
        check_path(name)  # no shard's name leads out of here
        metadata = self.metadata(name)
        if metadata is not None and metadata.content_id is not None:  # not a manifest, or some other file
            _unlink(*self._place(name))
            _unlink(self._metadata, f"{flat_name(name)}.json")
            _unlink(self._state / "locks", flat_name(name))

    def evict_partials(self, shards: Iterable[Shard]) -> None:
        """Remove what interrupted loads have left of these shards, unless somebody is at work on them."""
        with self._reporting():
            for shard in shards:
                flat = flat_name(shard.data_path)
                if self._parts.of(flat):
                    with try_lock(self._make(self._state / "locks").path / flat) as is_free:
                        if is_free:
                            self._parts.remove_all(flat)

    def manifest_names(self) -> list[str]:
        """The names of what may be manifests."""
        with self._reporting():
            found = [entry for entry in self._folder.entries() if entry.endswith(".json")]
        return [entry for entry in found if self.size(entry) is not None]

    def check_free_space(self, nbytes: int) -> None:
        """Raise `DiskFullError` unless the disk has room for `nbytes` more, or does not say.

        Raises
        ------
        CacheUnavailableError
            Nothing may be written there, whatever room there is.
        """
        with self._reporting():
            folder = next(p for p in (self.directory, *self.directory.parents) if os.path.exists(p))
            # Before its room: an image's read-only file system is always full. (On Windows it tells nothing.)
            if os.name != "nt" and not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, "it may not be written")
            free = free_bytes(self.directory)
        if free is not None and nbytes > free:
            raise disk_full(self.directory, nbytes, free)

    def delete(self) -> int:
        """Remove the whole directory; the bytes that it held. Loads that have its files open go on."""
        with self._reporting():
            if not self._folder.exists():
                return 0
            if not self._state.exists():
                if not os.listdir(self.directory):
                    return 0  # what is left where the folder itself could not be removed
                raise UnsafeCacheError(
                    f"{self.directory} is not a directory that ndcache made", hint="It was left alone."
                )
            return delete_model(self._folder)

    # --- inside

    def _place(self, name: str) -> tuple[Folder, str]:
        """The folder of a file, and its name there."""
        folder, (*above, last) = self._folder, name.split("/")
        for part in above:
            folder = folder / part
        return folder, last

    def _make(self, folder: Folder) -> Folder:
        """A folder of ndcache's own state, made if need be."""
        if not folder.exists():
            folder.make()
            if self._source:
                with contextlib.suppress(OSError):  # listings do without
                    self._write_note(self._state, "source.json", {"source": self._source})
        return folder

    def _write_note(self, folder: Folder, name: str, content: dict[str, Any]) -> None:
        # First where it is cleared away if this process dies.
        self._parts.folder.make()
        write_note(folder, name, content, (self._parts.folder, f"{name}.{secrets.token_hex(8)}"))

    def _reporting(self, name: str | None = None) -> Reporting:
        return Reporting(self.directory, name)


def _unlink(folder: Folder, name: str) -> None:
    with contextlib.suppress(OSError):
        folder.unlink(name)
