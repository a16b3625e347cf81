"""An opened model: its manifest, and a local file for each shard asked for. Here: one that is read in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .digests import mismatch
from .errors import ChecksumError, NotFoundError, SizeMismatchError
from .manifest import Manifest, Shard
from .parse import parse_manifest
from .stop import Stop
from .strict_json import MAX_MANIFEST_BYTES

__all__ = ["LocalModel", "Model", "Obtained"]


@dataclass(frozen=True)
class Obtained:
    """A shard's file, whole and checked as far as the options say.

    It is open, so that what was checked is what will be read, whatever becomes of its name. Whoever gets it closes it.
    """

    file: BinaryIO
    from_cache: bool
    checked: str  # "sha256", "md5" or "size"


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
    def has(self, shard: Shard, *, of_any_size: bool = False) -> bool:
        """Whether the shard's file is there, and of the right size unless any will do; looks at no bytes."""

    def is_ready(self, shard: Shard) -> bool:
        """Whether `obtain` will need no network, as far as can be told without reading the file."""
        return self.has(shard)

    @abstractmethod
    def prepare(self, shards: Sequence[Shard]) -> None:
        """Before anything is fetched: raise if these shards cannot all be had."""

    @abstractmethod
    def obtain(self, shard: Shard) -> Obtained:
        """The shard's file. Called from the workers."""

    @abstractmethod
    def check(self, shard: Shard) -> bool:
        """Whether the shard's file, which is there, has the right size and digest; its bytes are read."""


class LocalModel(Model):
    """A directory of the user's: read in place, never written to."""

    def __init__(self, directory: Path, manifest_names: Sequence[str], *, verify: str, stop: Stop) -> None:
        self._verify = verify
        self._stop = stop
        super().__init__(_read_manifest(directory, manifest_names), directory)

    def has(self, shard: Shard, *, of_any_size: bool = False) -> bool:
        try:
            size = self._path(shard).stat().st_size
        except OSError:
            return False
        return of_any_size or size == shard.nbytes

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
                )

    def obtain(self, shard: Shard) -> Obtained:
        file = self._open(shard)
        try:
            if self._verify == "always" and (digests := mismatch(file, shard, self._stop.check)):
                raise ChecksumError(
                    f"{self._path(shard)} has the digest {digests[1]}, the manifest says {digests[0]}",
                    shard=shard.data_path,
                    expected=digests[0],
                    received=digests[1],
                    hint="The file is damaged: copy it again.",
                )
        except BaseException:
            file.close()
            raise
        return Obtained(file, from_cache=True, checked=shard.integrity if self._verify == "always" else "size")

    def check(self, shard: Shard) -> bool:
        with self._open(shard) as file:
            return self.has(shard) and mismatch(file, shard, self._stop.check) is None

    def _open(self, shard: Shard) -> BinaryIO:
        path = self._path(shard)
        try:
            return open(path, "rb")
        except OSError as error:
            raise NotFoundError(f"{path} cannot be read: {error.strerror}", shard=shard.data_path) from error

    def _path(self, shard: Shard) -> Path:
        return self.directory.joinpath(*shard.data_path.split("/"))


def _read_manifest(directory: Path, names: Sequence[str]) -> Manifest:
    for name in names:
        try:
            with open(directory / name, "rb") as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
        except FileNotFoundError:
            continue
        return parse_manifest(data, name=name, url=str(directory / name))
    raise NotFoundError(
        f"there is no {' or '.join(names)} in {directory}",
        hint="Give the directory that holds the manifest, or the manifest itself.",
    )
