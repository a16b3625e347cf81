"""A model in a local directory, read in place."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from ..context import LoadContext
from ..errors import ChecksumError, NotFoundError, SizeMismatchError
from ..files.descriptors import check_shortage
from ..format.integrity import find_mismatch, manifest_names_to_try, verify_and_parse
from ..format.manifest import Manifest, Shard
from ..format.strict_json import MAX_MANIFEST_BYTES
from ..location import Location
from .model import Flaw, Model, ShardFile, is_shortage

__all__ = ["LocalModel", "open_local_model"]

logger = logging.getLogger("ndcache")


class LocalModel(Model):
    """A model in a local directory, which is read in place and never written to.

    Parameters
    ----------
    manifest : Manifest
    directory : pathlib.Path
    context : LoadContext
    """

    def __init__(self, manifest: Manifest, directory: Path, context: LoadContext) -> None:
        super().__init__(manifest, directory)
        self._context = context

    def has(self, shard: Shard) -> bool:
        try:
            return self._path(shard).stat().st_size == shard.nbytes
        except OSError:
            return False

    def prepare(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            path, status = self._path(shard), None
            try:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    status = path.stat()
            except OSError as error:
                raise NotFoundError(f"{path} cannot be read: {error.strerror}", shard=shard.data_path) from error
            if status is None or not stat.S_ISREG(status.st_mode):
                raise NotFoundError(f"there is no file {path}", shard=shard.data_path)
            if (size := status.st_size) != shard.nbytes:
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
        expected = self._required_digests(shard)
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
        with self._context.stats.timed("hash", file=shard.data_path):
            return find_mismatch(file, expected, self._context.cancellation.check)

    def _required_digests(self, shard: Shard) -> dict[str, str]:
        """Return the digests that every load compares: those that the caller demands, or all."""
        verify = self._context.verify
        if verify == "never":
            return {}
        # A caller who demands a digest of the manifest also demands the digests in it.
        if verify == "always" or self.manifest.name in self._context.integrity:
            return shard.digests
        return {} if shard.required_digest is None else dict([shard.required_digest])

    def _open(self, shard: Shard) -> BinaryIO:
        path = self._path(shard)
        try:
            return open(path, "rb")
        except OSError as error:
            check_shortage(error)
            raise NotFoundError(f"{path} cannot be read: {error.strerror}", shard=shard.data_path) from error

    def _path(self, shard: Shard) -> Path:
        return self.directory.joinpath(*shard.data_path.split("/"))


def open_local_model(location: Location, context: LoadContext) -> LocalModel:
    """Open the model in a local directory.

    Raises
    ------
    NotFoundError
        There is no manifest, or it cannot be read.
    ManifestError, ChecksumError
        The manifest cannot be used, or is not the one that the caller demands.
    """
    directory, names = location.directory, manifest_names_to_try(location.manifest_names, context.integrity)
    assert directory is not None
    for name in names:
        path = directory / name
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
        except (FileNotFoundError, IsADirectoryError):
            continue
        except OSError as error:
            check_shortage(error)
            raise NotFoundError(f"{path} cannot be read: {error.strerror}") from error
        check = context.cancellation.poll
        manifest = verify_and_parse(
            data, name=name, url=str(path), integrity=context.integrity, check=check, retryable=False
        )
        return LocalModel(manifest, directory, context)
    raise NotFoundError(
        f"there is no {' or '.join(names)} in {directory}",
        hint="Give the directory that holds the manifest, or the manifest itself.",
    )
