"""One model's cache directory: look up, private parts, atomic publishing, delete, verify.

::

    <root>/<scope>/<model>/
        tensor-cache.json              the manifest, as the server sent it
        params_shard_0.bin             complete and checked, or not there at all
        .ndcache/                      ndcache's own state
            source.json                  where the model came from
            validators/<file>.json       what is known of a published file: size, time, digests, ETag
            parts/<file>.<random>        private to its writer, opened with O_EXCL
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
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CacheError, CacheUnavailableError, DiskFullError, NdcacheError, UnsafeCacheError
from .manifest import Shard
from .paths import STATE_DIRECTORY

__all__ = ["ArtifactCache", "Part", "Validator", "disk_bytes"]


@dataclass(frozen=True)
class Validator:
    """What was true of a file when it was published.

    Attributes
    ----------
    nbytes, mtime_ns : int
        Size and time of change of the file on disk.
    md5, sha256 : str or None
        Digests that were computed from its bytes.
    etag, last_modified : str or None
        What the server called this version.
    claim : str or None
        What the manifest said of it; see `ArtifactCache.is_known`.
    """

    nbytes: int
    mtime_ns: int
    md5: str | None = None
    sha256: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    claim: str | None = None

    def is_of(self, status: os.stat_result) -> bool:
        """Whether a file is still the one that was published, by size and time."""
        return (status.st_size, status.st_mtime_ns) == (self.nbytes, self.mtime_ns)


@dataclass
class Part:
    """A file being written, private to its writer until it is published.

    Attributes
    ----------
    file : binary file
        Open for writing at the end of what has come.
    path : pathlib.Path
        Its name for now.
    nbytes : int
        Bytes written.
    digests : dict of str to hash object
        Fed with every byte written.
    """

    file: BinaryIO
    path: Path
    nbytes: int = 0
    digests: dict[str, Any] = field(default_factory=dict)

    def write(self, data: bytes) -> None:
        """Append `data`."""
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) :]  # a disk that fills up takes a part first
        for digest in self.digests.values():
            digest.update(data)
        self.nbytes += len(data)

    def digest(self, algorithm: str) -> str | None:
        """The hex digest of what was written, if it was asked for at the start."""
        return self.digests[algorithm].hexdigest() if algorithm in self.digests else None


class ArtifactCache:
    """The cache directory of one model, which is a valid local model directory itself.

    Nothing is created before something is written, so that a read-only cache still serves what it has.

    Parameters
    ----------
    directory : pathlib.Path
        The model's directory.
    source : str
        Where its files come from, without secrets; kept for listings.
    """

    def __init__(self, directory: Path, source: str = "") -> None:
        self.directory = directory
        self._state = directory / STATE_DIRECTORY
        self._source = source

    # --- looking up

    def path(self, name: str) -> Path:
        """Where the file `name` lies, or would."""
        return self.directory.joinpath(*name.split("/"))

    def size(self, name: str) -> int | None:
        """The size of a published file; None if there is none."""
        try:
            status = os.lstat(self.path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _unavailable(self.directory, error) from error
        return status.st_size if stat.S_ISREG(status.st_mode) else None

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
        except OSError as error:
            raise _unavailable(self.directory, error) from error

    def is_known(self, shard: Shard, claim: str, file: BinaryIO | None = None) -> bool | None:
        """Whether the shard's file is what the manifest says, as far as is remembered; None if that is not known.

        What is remembered holds for a file whose size and time are those it was published with.

        Parameters
        ----------
        shard : Shard
        claim : str
            What the manifest says of the shard's content: a digest, or else the manifest's name and own digest.
        file : binary file, optional
            The open file, if it need not be the one that has the name now.
        """
        validator = self.validator(shard.data_path)
        try:
            status = os.stat(self.path(shard.data_path) if file is None else file.fileno())
        except FileNotFoundError:
            return None
        if validator is None or not validator.is_of(status):
            return None
        for known, wanted in ((validator.sha256, shard.sha256sum), (validator.md5, shard.md5sum)):
            if wanted is not None and known is not None:
                return known == wanted
        if validator.claim is None:
            return True if shard.integrity == "size" else None
        if shard.integrity != "size":
            return None if validator.claim == claim else False
        # Without a digest, any change of the manifest may be one of the shard; that of another manifest is not.
        name, _, was_named = validator.claim.partition(" ")
        return validator.claim == claim or (bool(was_named) and name != claim.partition(" ")[0])

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
        except OSError as error:
            raise _unavailable(self.directory, error) from error

    def validator(self, name: str) -> Validator | None:
        """What is known of the file; None if nothing is, or what is known cannot be read."""
        try:
            with open(self._validator_path(name), "rb") as file:
                return Validator(**json.loads(file.read(1 << 16)))
        except (OSError, ValueError, TypeError):
            return None

    # --- writing

    @contextlib.contextmanager
    def part(self, name: str, algorithms: tuple[str, ...] = ()) -> Iterator[Part]:
        """A new part for the file `name`; it is removed at the end of the block unless published in it."""
        with self._writing(name):
            folder = self._folder("parts")
            path = folder / f"{_flat(name)}.{secrets.token_hex(8)}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            handle = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o644)
            digests = {algorithm: hashlib.new(algorithm, usedforsecurity=False) for algorithm in algorithms}
            with os.fdopen(handle, "wb", buffering=0) as file:
                try:
                    yield Part(file, path, digests=digests)
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)

    def publish(
        self,
        part: Part,
        name: str,
        *,
        etag: str | None = None,
        last_modified: str | None = None,
        claim: str | None = None,
    ) -> BinaryIO:
        """Give a complete and checked part its name; the published file comes back open for reading.

        Raises
        ------
        CacheUnavailableError
            From FileNotFoundError, if another process deleted the directory or published another file just then.
        CacheError
        """
        with self._writing(name):
            os.fsync(part.file.fileno())
            status = os.fstat(part.file.fileno())
            part.file.close()
            target = self.path(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part.path, target)
            _sync_directory(target.parent)
            validator = Validator(
                nbytes=status.st_size,
                mtime_ns=status.st_mtime_ns,
                md5=part.digest("md5"),
                sha256=part.digest("sha256"),
                etag=etag,
                last_modified=last_modified,
                claim=claim,
            )
            self.try_to_remember(name, validator)
            file = open(target, "rb")  # noqa: SIM115 - for who asked
            if not os.path.samestat(os.fstat(file.fileno()), status):
                file.close()
                raise FileNotFoundError(errno.ENOENT, "another process put a file of its own in its place")
            return file

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

    def ensure_room(self, nbytes: int) -> None:
        """Raise `DiskFullError` unless the disk has room for `nbytes` more."""
        folder = next(p for p in (self.directory, *self.directory.parents) if p.exists())
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
            shutil.rmtree(grave)
        except OSError as error:
            raise _unavailable(self.directory, error) from error
        return nbytes

    # --- inside

    def _validator_path(self, name: str) -> Path:
        return self._state / "validators" / f"{_flat(name)}.json"

    def _folder(self, name: str) -> Path:
        """A folder of ndcache's own state, made if need be; never one that a symlink leads to."""
        folder = self._state / name
        if self._state.is_symlink() or folder.is_symlink():
            raise UnsafeCacheError(
                f"{folder} leads elsewhere through a symbolic link", hint="It was left alone: look who put it there."
            )
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            if self._source:
                self._write_small(self._state / "source.json", {"source": self._source})
        return folder

    def _write_small(self, path: Path, content: dict[str, Any]) -> None:
        fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        try:
            with open(fresh, "x", encoding="utf-8") as file:
                json.dump(content, file)
            os.replace(fresh, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise

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


def disk_bytes(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":
        return  # Windows has no handle on a directory to sync
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unavailable(directory: Path, error: OSError) -> CacheError:
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
