"""One model's cache directory: look up, private parts, atomic publishing, delete, verify.

::

    <root>/<scope>/<model>/
        tensor-cache.json              the manifest, as the server sent it
        params_shard_0.bin             complete and checked, or not there at all
        .ndcache/                      ndcache's own state
            source.json                  where the model came from
            validators/<file>.json       what is known of a published file: size, time, digests, ETag
            parts/<file>.<random>        private to its writer, opened with O_EXCL; see `ndcache.parts`
            locks/<file>                 whose turn it is to download; see `ndcache.locks`
            aside/<file>                 what turned out to be bad

A file gets its name by rename, after its size and digest were found right and its bytes were synced to disk, and is
never written again. So whoever sees the name sees the right bytes, and a reader that has it open or mapped keeps
them, whatever happens to the name. A validator is a memory, not a promise: where it is missing or disagrees
with the file or the manifest, the file's digest decides.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from .descriptors import check_shortage
from .errors import (
    CacheError,
    CacheUnavailableError,
    DiskFullError,
    NdcacheError,
    UnsafeCacheError,
    UnsafePathError,
)
from .locks import Turn, if_free, turn
from .manifest import Manifest, Shard
from .parts import Origin, Part, PartsFolder
from .paths import STATE_DIRECTORY, check_path
from .small_files import read_note, write_note
from .spans import Spans
from .validator import Validator

__all__ = ["ArtifactCache", "disk_bytes"]

#: Seconds after which a part is taken to have no writer any more, where nothing else tells.
_IDLE_SECONDS = 300


class ArtifactCache:
    """The cache directory of one model, which is a valid local model directory itself.

    Nothing is created before something is written, so that a read-only cache still serves what it has.

    Parameters
    ----------
    directory : pathlib.Path
        The model's directory.
    source : str
        Where its files come from, without secrets; kept for listings.

    Attributes
    ----------
    why_not_kept : str or None
        Why files that come do not go here; see `ndcache.in_memory`.
    """

    why_not_kept: str | None = None

    def __init__(self, directory: Path, source: str = "") -> None:
        self.directory = directory
        self._state = directory / STATE_DIRECTORY
        self._source = source

    def fall_back(self, error: CacheUnavailableError) -> bool:
        """Return whether what cannot be kept here, because of `error`, goes elsewhere from now on."""
        return False

    # --- looking up

    def path(self, name: str) -> Path:
        """Where the file `name` lies, or would.

        Raises
        ------
        UnsafeCacheError
            A folder on the way is a symbolic link.
        """
        path = self.directory
        for folder in name.split("/")[:-1]:
            path = path / folder
            if path.is_symlink():
                raise _unsafe(path)
        return path / name.rpartition("/")[2]

    def size(self, name: str) -> int | None:
        """The size of a published file; None if there is none."""
        status = self._status(name)
        return None if status is None else status.st_size

    def version(self, name: str) -> tuple[int, int, int] | None:
        """Something that changes when another file is published under this name; None if there is none."""
        status = self._status(name)
        return None if status is None else (status.st_ino, status.st_size, status.st_mtime_ns)

    def _status(self, name: str) -> os.stat_result | None:
        try:
            status = os.lstat(self.path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UnsafeCacheError:
            raise
        except OSError as error:
            raise _unavailable(self.directory, error) from error
        return status if stat.S_ISREG(status.st_mode) else None

    def has(self, shard: Shard) -> bool:
        """Whether the shard is there and of the right size."""
        return self.size(shard.data_path) == shard.nbytes

    def open_shard(self, shard: Shard) -> BinaryIO | None:
        """The shard's file, open for reading, if it is there and of the right size."""
        try:
            if not self.has(shard):
                return None
            file = open(self.path(shard.data_path), "rb")  # noqa: SIM115 - for who asked
            if os.fstat(file.fileno()).st_size == shard.nbytes:
                return file
            file.close()  # another one than a moment ago
            return None
        except FileNotFoundError:
            return None  # just now
        except UnsafeCacheError:
            raise
        except OSError as error:
            raise _unavailable(self.directory, error) from error

    def is_known(self, shard: Shard, claim: str) -> bool | None:
        """Whether the shard's file is what the manifest says, as far as is remembered: see `Validator.judge`."""
        validator, status = self.validator(shard.data_path), self._status(shard.data_path)
        return None if validator is None or status is None else validator.judge(status, shard, claim)

    def is_intact(self, name: str) -> bool:
        """Whether the file is as it was published, by size and time, be it of this version or another."""
        status = self._status(name)
        if status is None:
            return False
        validator = self.validator(name)
        return validator is not None and validator.is_of(status)

    def read(self, name: str, limit: int) -> bytes | None:
        """The content of a small published file, up to `limit` bytes."""
        size = self.size(name)
        if size is None:
            return None
        try:
            with open(self.path(name), "rb") as file:
                return file.read(min(size, limit) + 1)  # more than `limit` if the file is larger
        except FileNotFoundError:
            return None
        except UnsafeCacheError:
            raise
        except OSError as error:
            raise _unavailable(self.directory, error) from error

    def validator(self, name: str) -> Validator | None:
        """What is known of the file; None if nothing is, or what is known cannot be read."""
        note = read_note(self._validator_path(name))
        return None if note is None else Validator.from_note(note)

    # --- writing

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Part]:
        """A new part for the file `name`. At the end of the block it is closed, and kept if it is of further use."""
        with self._writing(name):
            folder = PartsFolder(self._folder("parts"))
            with folder.new(_flat(name)) as part:
                yield part

    def copy_longest_part(
        self, part: Part, shard: Shard, claim: str, check: Callable[[], None], *, is_checked: bool, is_alone: bool
    ) -> None:
        """Begin the new `part` of a shard with what somebody else has of it.

        Parameters
        ----------
        part : Part
        shard : Shard
        claim : str
            What the manifest says of the shard's content: parts with another claim are not used.
        check : callable
            Called now and then; may raise to end it.
        is_checked : bool
            Whether a digest will show what a crash of the system has torn.
        is_alone : bool
            Whether nobody else writes parts of this shard now, so that those which were found can be removed.
        """

        def is_usable(origin: Origin) -> bool:
            return origin.claim == claim and (is_checked or origin.has_lasted)

        folder = PartsFolder(self._state / "parts")
        found = folder.copy_longest(part, shard.nbytes, is_usable, check)
        if is_alone:
            for path in found:
                folder.remove(path)

    def open_some(self, shard: Shard, claim: str, wanted: Spans) -> BinaryIO | None:
        """A file of the shard's size that has the wanted bytes, fetched without the rest; None if there is none.

        They were compared with no digest.
        """

        def is_usable(origin: Origin) -> bool:
            return origin.claim == claim and origin.has_lasted

        folder = PartsFolder(self._state / "parts")
        return folder.open_with(_flat(shard.data_path), wanted, shard.nbytes, is_usable)

    def turn(
        self, name: str, is_there: Callable[[], bool], sleep: Callable[[float], None]
    ) -> AbstractContextManager[Turn | None]:
        """Wait until this thread should download the file `name`, or it is there: see `ndcache.locks.turn`."""
        parts = PartsFolder(self._state / "parts")
        with self._writing(name):
            path = self._folder("locks") / _flat(name)
        return turn(path, is_there=is_there, progress=lambda: parts.progress(_flat(name)), sleep=sleep)

    def settle(self, part: Part, shard: Shard) -> BinaryIO:
        """Keep a part that has what is wanted of a shard, for `open_some`; it comes back open for reading."""
        with self._writing(shard.data_path):
            return part.settle(shard.nbytes)

    def publish(
        self,
        part: Part,
        name: str,
        *,
        etag: str | None = None,
        last_modified: str | None = None,
        claim: str | None = None,
    ) -> BinaryIO:
        """Give a complete and checked part its name; it comes back open for reading, whoever takes the name away again.

        Raises
        ------
        CacheUnavailableError
            From FileNotFoundError, if another process deleted the directory, or took the part for an orphan.
        CacheError
        """
        with self._writing(name):
            os.fsync(part.file.fileno())
            status = os.fstat(part.file.fileno())
            part.file.close()
            target = self.path(name)
            _make_directory(target.parent)
            file = _move(part.path, target)
        try:
            self._published(name, part, status, etag, last_modified, claim)
        except BaseException:
            file.close()
            raise
        return file

    def _published(
        self,
        name: str,
        part: Part,
        status: os.stat_result,
        etag: str | None,
        last_modified: str | None,
        claim: str | None,
    ) -> None:
        """What follows when a file has got its name: make that last, remember it, clear away what it makes useless."""
        with self._writing(name):
            target = self.path(name)
            _sync_directory(target.parent)
            validator = Validator(
                nbytes=status.st_size,
                mtime_ns=status.st_mtime_ns,
                digests=part.digests,
                etag=etag,
                last_modified=last_modified,
                claim=claim,
            )
            with contextlib.suppress(FileNotFoundError):  # somebody else's file may have taken its name by now
                if os.path.samestat(os.lstat(target), status):
                    self.try_to_remember(name, validator)
            if claim is not None:  # a shard: whoever else downloads it will find it here
                PartsFolder(self._state / "parts").remove_all(_flat(name))

    def remember(self, name: str, validator: Validator) -> None:
        """Keep what is known of a published file; losing it in a crash only costs reading the file again."""
        self._folder("validators")
        self._write_small(self._validator_path(name), asdict(validator))

    def try_to_remember(self, name: str, validator: Validator) -> None:
        """The same where it does not matter: a cache that is full or read-only forgets, and checks again."""
        try:
            self.remember(name, validator)
        except UnsafeCacheError:
            raise
        except OSError:
            pass

    def set_aside(self, name: str, file: BinaryIO | None = None) -> None:
        """Take a bad file out of the way, without destroying the evidence.

        `file` is the open bad one, which may have lost its name to a good one in the meantime.
        """
        with self._writing(name), contextlib.suppress(FileNotFoundError):
            path = self.path(name)
            if file is None or os.path.samestat(os.lstat(path), os.fstat(file.fileno())):
                os.replace(path, self._folder("aside") / _flat(name))

    def tidy(self, manifest: Manifest, others: Callable[[], Iterable[Manifest]]) -> None:
        """Remove what is of no use any more: shards of former versions, and what interrupted loads left.

        Parameters
        ----------
        manifest : Manifest
            The one in use.
        others : callable
            Gives the other manifests whose shards are kept; called only if there is something in question.
        """
        if any((self._state / folder).is_symlink() for folder in (".", "parts", "locks", "validators")):
            return
        self._remove_graves()
        shards = {_flat(shard.data_path): shard for shard in manifest.shards}
        parts = PartsFolder(self._state / "parts")
        published = {entry.removesuffix(".json") for entry in _entries(self._state / "validators")}
        under_way = parts.names() | set(_entries(self._state / "locks"))
        if (published | under_way) - shards.keys() - {_flat(manifest.name)}:
            shards.update((_flat(shard.data_path), shard) for other in others() for shard in other.shards)
        for name in published - shards.keys():
            with contextlib.suppress(UnsafePathError, UnsafeCacheError):  # a note with a crafted name
                self._remove_if_shard(_unflat(name))
        for name in under_way:
            if name not in shards:
                parts.remove_idle(name, _IDLE_SECONDS)
            elif self.has(shards[name]):
                known = self.validator(shards[name].data_path)
                parts.remove_idle(name, _IDLE_SECONDS, None if known is None else known.claim)
                _unlink(self._state / "locks" / name)

    def _remove_if_shard(self, name: str) -> None:
        check_path(name)  # no shard's name leads out of here
        validator = self.validator(name)
        if validator is not None and validator.claim is not None:  # not a manifest, or some other file
            _unlink(self.path(name))
            _unlink(self._validator_path(name))
            _unlink(self._state / "locks" / _flat(name))

    def _remove_graves(self) -> None:
        """What is left of deletions that were interrupted."""
        for grave in self.directory.parent.glob(f"{glob.escape(self.directory.name)}.*.deleted"):
            shutil.rmtree(grave, ignore_errors=True)

    def make_room(self, shards: Iterable[Shard]) -> None:
        """Remove what interrupted loads have left of these shards, unless somebody is at work on them."""
        parts = PartsFolder(self._state / "parts")
        for shard in shards:
            name = _flat(shard.data_path)
            if parts.of(name):
                with if_free(self._folder("locks") / name) as is_free:
                    if is_free:
                        parts.remove_all(name)

    def manifest_names(self) -> list[str]:
        """The names of what may be manifests."""
        return [entry for entry in _entries(self.directory) if entry.endswith(".json") and self.size(entry) is not None]

    def ensure_room(self, nbytes: int) -> None:
        """Raise `DiskFullError` unless the disk has room for `nbytes` more.

        Raises
        ------
        CacheUnavailableError
            Nothing may be written there, whatever room there is.
        """
        with self._writing(self.directory.name):
            folder = next(p for p in (self.directory, *self.directory.parents) if p.exists())
            # Before its room: an image's read-only file system is always full. (On Windows it tells nothing.)
            if os.name != "nt" and not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, "it may not be written")
            free = shutil.disk_usage(folder).free
        if nbytes > free:
            raise _disk_full(self.directory, nbytes, free)

    def delete(self) -> int:
        """Remove the whole directory; the bytes that it held. Loads that have its files open go on."""
        if not self.directory.exists():
            return 0
        self._check_ours()
        nbytes = disk_bytes(self.directory)
        grave = self.directory.with_name(f"{self.directory.name}.{secrets.token_hex(4)}.deleted")
        try:
            os.replace(self.directory, grave)  # at once for whoever looks, however long the rest takes
            self._remove_graves()
            if grave.exists():
                shutil.rmtree(grave)  # to see why not
        except UnsafeCacheError:
            raise
        except OSError as error:
            raise _unavailable(self.directory, error) from error
        return nbytes

    # --- inside

    def _validator_path(self, name: str) -> Path:
        return self._state / "validators" / f"{_flat(name)}.json"

    def _folder(self, name: str) -> Path:
        """A folder of ndcache's own state, made if need be; never one that a symlink leads to."""
        folder = self._state / name
        if not (_is_own_folder(self._state) and _is_own_folder(folder)):
            _make_directory(folder)
            if self._source:
                self._write_small(self._state / "source.json", {"source": self._source})
        return folder

    def _write_small(self, path: Path, content: dict[str, Any]) -> None:
        # First where it is cleared away if this process dies.
        write_note(path, content, self._folder("parts") / f"{path.name}.{secrets.token_hex(8)}")

    def _check_ours(self) -> None:
        if self.directory.is_symlink() or not self._state.is_dir() or self._state.is_symlink():
            raise UnsafeCacheError(f"{self.directory} is not a directory that ndcache made", hint="It was left alone.")

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turn what the operating system says into errors that say what to do."""
        try:
            yield
        except NdcacheError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full(self.directory, None, None, name) from error
            raise _unavailable(self.directory, error) from error


def _flat(name: str) -> str:
    """A file name for a path: a slash cannot be part of one, and neither can `%` of what check_path lets in."""
    return name.replace("%", "%25").replace("/", "%2F")


def _unflat(name: str) -> str:
    return name.replace("%2F", "/").replace("%25", "%")


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def disk_bytes(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(folder, name))
                on_disk = 512 * getattr(status, "st_blocks", 0)  # fewer if it has holes; not every file system says
                total += min(status.st_size, on_disk or status.st_size)
    return total


def _move(part: Path, target: Path) -> BinaryIO:
    """Rename a part; it comes back open for reading."""
    if os.name == "nt":  # where an open file cannot be renamed
        os.replace(part, target)
        return open(target, "rb")
    file = open(part, "rb")  # noqa: SIM115 - for who asked
    try:
        os.replace(part, target)
    except BaseException:
        file.close()
        raise
    return file


def _is_own_folder(path: Path) -> bool:
    """Whether there is a folder; raises if a symbolic link leads to one."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if stat.S_ISLNK(mode):
        raise _unsafe(path)
    return stat.S_ISDIR(mode)


def _make_directory(directory: Path) -> None:
    """Make a directory and those above it, for good."""
    if directory.is_dir():
        return
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        if not missing[-1].parent.exists():
            raise  # somebody deletes it just now
        raise PermissionError(errno.EACCES, "no directory can be made there") from error  # /proc, an automounter
    for folder in reversed(missing):
        with contextlib.suppress(PermissionError):  # to list the one above
            _sync_directory(folder.parent)


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":
        return  # Windows has no handle on a directory to sync
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
            raise
    finally:
        os.close(handle)


def _unsafe(path: Path) -> UnsafeCacheError:
    return UnsafeCacheError(
        f"{path} leads elsewhere through a symbolic link", hint="It was left alone: look who put it there."
    )


def _unavailable(directory: Path, error: OSError) -> CacheError:
    check_shortage(error)  # of which the directory is not to blame
    return CacheUnavailableError(
        f"the cache directory {directory} cannot be used: {error.strerror or error}",
        hint="Choose another one: cache_dir, --cache-dir, or NDCACHE_HOME.",
    )


def _disk_full(directory: Path, needed: int | None, free: int | None, name: str | None = None) -> DiskFullError:
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
