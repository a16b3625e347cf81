"""An opened model: its manifest, and a local file for each shard asked for. Here: one that is read in place."""

from __future__ import annotations

import errno
import logging
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from ..errors import ChecksumError, NotFoundError, SizeMismatchError
from ..files.descriptors import check_shortage
from ..format.integrity import Integrity, find_mismatch, manifest_names_to_try, verify_and_parse
from ..format.manifest import Manifest, Shard
from ..format.strict_json import MAX_MANIFEST_BYTES
from ..stats import LoadStats
from ..workers.cancellation import Cancellation

__all__ = ["Flaw", "LocalModel", "Model", "ShardFile", "is_shortage"]

logger = logging.getLogger("ndcache")


class Flaw(Enum):
    """Why `Model.check` did not find a shard right."""

    BAD = "wrong bytes, the wrong size, or it cannot be read"
    BAD_AND_KEPT = "the same, in a cache that cannot be written, so that it was not set aside"
    MISSING = "it is not there"
    OF_ANOTHER_VERSION = "it was replaced by that of another version of the model"


@dataclass(frozen=True)
class ShardFile:
    """A shard's file, whole or with what is wanted of it, and checked as far as the options say.

    It is open, so that what was checked is what will be read, whatever becomes of its name. Whoever gets it closes it.
    """

    file: BinaryIO
    from_cache: bool
    checked: str  # "size", or the strongest algorithm: "md5", "sha256", of a pin "sha384" or "sha512", too


class Model(ABC):
    """A model whose manifest is known.

    Attributes
    ----------
    manifest : Manifest
    directory : pathlib.Path
        Where its files lie, or will.
    """

    def __init__(self, manifest: Manifest, directory: Path) -> None:
        self.manifest = manifest
        self.directory = directory

    @abstractmethod
    def has(self, shard: Shard) -> bool:
        """Whether the shard's file is there, and of the right size; looks at no bytes."""

    def is_ready(self, shard: Shard) -> bool:
        """Whether `obtain` will need no network, as far as can be told without reading the file."""
        return self.has(shard)

    def nbytes(self, shard: Shard) -> int:
        """Bytes that obtaining the shard takes, which are fewer than it has if only some of it is fetched."""
        return shard.nbytes

    @abstractmethod
    def prepare(self, shards: Sequence[Shard]) -> None:
        """Before anything is fetched: raise if these shards cannot all be had."""

    @abstractmethod
    def obtain(self, shard: Shard) -> ShardFile:
        """The shard's file. Called from the workers."""

    @abstractmethod
    def check(self, shard: Shard) -> str | Flaw:
        """Read the shard's file and compare its size and digests.

        Returns
        -------
        str or Flaw
            What it was checked by: ``"size"``, or the strongest algorithm; or why it is not right.
        """

    def finish(self) -> None:  # noqa: B027 - most have nothing to do
        """Everything that was asked for has been obtained."""

    def close(self) -> None:  # noqa: B027
        """Nothing more will be obtained."""


class LocalModel(Model):
    """A directory of the user's: read in place, never written to."""

    def __init__(
        self,
        directory: Path,
        manifest_names: Sequence[str],
        *,
        verify: str,
        cancellation: Cancellation,
        stats: LoadStats,
        integrity: Integrity,
    ) -> None:
        self._verify = verify
        self._cancellation = cancellation
        self._stats = stats
        self._integrity = integrity
        names = manifest_names_to_try(manifest_names, integrity)
        super().__init__(_read_manifest(directory, names, integrity, cancellation.poll), directory)

    def has(self, shard: Shard) -> bool:
        try:
            return self._path(shard).stat().st_size == shard.nbytes
        except OSError:
            return False

    def prepare(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            path = self._path(shard)
            if not path.is_file():
                raise NotFoundError(f"there is no file {path}", shard=shard.data_path)
            if (size := path.stat().st_size) != shard.nbytes:
                raise SizeMismatchError(
                    f"{path} has {size:,} bytes where the manifest says {shard.nbytes:,}",
                    shard=shard.data_path,
                    expected=shard.nbytes,
                    received=size,
                    hint="The copy is not complete, or of another version than the manifest.",
                    retryable=False,
                )

    def obtain(self, shard: Shard) -> ShardFile:
        file = self._open(shard)
        expected = self._expected(shard)
        try:
            if (wrong := self._mismatch(file, shard, expected)) is not None:
                algorithm, right, actual = wrong
                raise ChecksumError(
                    f"{self._path(shard)} has the {algorithm} {actual}, and should have {right}",
                    shard=shard.data_path,
                    expected=right,
                    received=actual,
                    hint="The file is damaged, or of another version than the manifest: copy it again.",
                    retryable=False,
                )
        except BaseException:
            file.close()
            raise
        return ShardFile(file, from_cache=True, checked=next(iter(expected), "size"))

    def check(self, shard: Shard) -> str | Flaw:
        try:
            status = os.stat(self._path(shard))
            if not stat.S_ISREG(status.st_mode) or status.st_size != shard.nbytes:
                return Flaw.BAD
            with open(self._path(shard), "rb") as file:
                good = self._mismatch(file, shard, shard.digests) is None
        except (FileNotFoundError, NotADirectoryError):
            return Flaw.MISSING
        except OSError as error:
            if is_shortage(error):
                raise NotFoundError(f"{self._path(shard)} cannot be read: {error}", shard=shard.data_path) from error
            logger.warning("%s cannot be read: %s", self._path(shard), error.strerror)
            return Flaw.BAD
        return shard.integrity if good else Flaw.BAD

    def _mismatch(self, file: BinaryIO, shard: Shard, expected: Mapping[str, str]) -> tuple[str, str, str] | None:
        if not expected:
            return None
        with self._stats.timed("hash", file=shard.data_path):
            return find_mismatch(file, expected, self._cancellation.check)

    @property
    def _is_pinned(self) -> bool:
        """Whether the caller vouches for the manifest, and so for the digests in it."""
        return self.manifest.name in self._integrity

    def _expected(self, shard: Shard) -> dict[str, str]:
        """The digests that are compared at each load: what the caller has pinned, or everything."""
        if self._verify == "always" or (self._is_pinned and self._verify != "never"):
            return shard.digests
        return {} if self._verify == "never" or shard.required_digest is None else dict([shard.required_digest])

    def _open(self, shard: Shard) -> BinaryIO:
        path = self._path(shard)
        try:
            return open(path, "rb")
        except OSError as error:
            check_shortage(error)
            raise NotFoundError(f"{path} cannot be read: {error.strerror}", shard=shard.data_path) from error

    def _path(self, shard: Shard) -> Path:
        return self.directory.joinpath(*shard.data_path.split("/"))


def is_shortage(error: OSError) -> bool:
    """Whether an error says nothing about the file that was to be read, but something about this process."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def _read_manifest(directory: Path, names: Sequence[str], integrity: Integrity, check: Callable[[], None]) -> Manifest:
    for name in names:
        try:
            with open(directory / name, "rb") as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
        except (FileNotFoundError, IsADirectoryError):
            continue
        except OSError as error:
            check_shortage(error)
            raise NotFoundError(f"{directory / name} cannot be read: {error.strerror}") from error
        return verify_and_parse(
            data, name=name, url=str(directory / name), integrity=integrity, check=check, retryable=False
        )
    raise NotFoundError(
        f"there is no {' or '.join(names)} in {directory}",
        hint="Give the directory that holds the manifest, or the manifest itself.",
    )
