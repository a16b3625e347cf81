"""A model in a local directory, read in place."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from ..context import LoadContext
from ..errors import CacheError, ChecksumError, ManifestLayoutError, NdcacheError, NotFoundError, SizeMismatchError
from ..files.descriptors import check_shortage
from ..files.folder import Folder
from ..format.integrity import (
    check_manifest_digest,
    find_mismatch,
    has_right_header,
    manifest_names_to_try,
    verify_and_parse,
)
from ..format.manifest import Manifest, Shard
from ..format.safetensors.index import is_safetensors
from ..format.strict_json import MAX_MANIFEST_BYTES
from ..location import Location
from ..store.directory import ModelDirectory
from ..store.housekeeping.usage import begin_use
from ..store.layout import Layout
from ..store.metadata import FileMetadata
from ..store.partials.growing import GrowingFile
from .choice import choose_safetensors, say_names
from .local_headers import read_local_headers
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
        self._root = str(directory)

    def path(self, name: str) -> str:
        """Return the path of a file; `name` must have been checked."""
        # Not a `pathlib.Path`: one takes as long to make as the file to open, and there may be thousands.
        return os.path.join(self._root, *name.split("/"))

    def has(self, shard: Shard) -> bool:
        try:
            return os.stat(self.path(shard.data_path)).st_size == shard.nbytes
        except OSError:
            return False

    def prepare(self, shards: Sequence[Shard]) -> bool:
        for shard in shards:
            path, status = self.path(shard.data_path), None
            try:
                status = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                pass
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
        return True

    def obtain(self, shard: Shard, growing: GrowingFile | None = None) -> ShardFile:
        file = self._open(shard)
        expected = self._required_digests(shard)
        try:
            if (wrong := self._mismatch(file, shard, expected)) is not None:
                algorithm, right, actual = wrong
                raise ChecksumError(
                    f"{self.path(shard.data_path)} has the {algorithm} {actual}, and should have {right}",
                    shard=shard.data_path,
                    expected=right,
                    received=actual,
                    hint="The file is damaged, or of another version than the manifest: copy it again.",
                    retryable=False,
                )
            if not has_right_header(file, shard):
                raise ManifestLayoutError(
                    f"{self.path(shard.data_path)} was replaced by another file after its header was read",
                    shard=shard.data_path,
                    hint="Load it again.",
                    retryable=True,
                )
        except BaseException:
            file.close()
            raise
        return ShardFile(file, from_cache=True, checked=next(iter(expected), "size"))

    def check(self, shard: Shard) -> str | Flaw:
        path, expected = self.path(shard.data_path), dict(shard.digests)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode) or status.st_size != shard.nbytes:
                return Flaw.BAD
            if not expected and (noted := self.noted(shard.data_path)) is not None:
                expected.update(noted.digests)
            with open(path, "rb") as file:
                count = self._context.arrivals.reading(shard.data_path)
                good = self._mismatch(file, shard, expected, count) is None
        except (FileNotFoundError, NotADirectoryError):
            return Flaw.MISSING
        except OSError as error:
            if is_shortage(error):
                raise NotFoundError(f"{path} cannot be read: {error}", shard=shard.data_path) from error
            logger.warning("%s cannot be read: %s", path, error.strerror)
            return Flaw.BAD
        return next(iter(expected), "size") if good else Flaw.BAD

    def noted(self, name: str) -> FileMetadata | None:
        """Return what was noted when a file was fetched into this directory; None for others."""
        with contextlib.suppress(CacheError):
            return self.notes.metadata(name)
        return None

    @functools.cached_property
    def notes(self) -> ModelDirectory:
        """Return the directory with the notes that `fetch` has left, if it made it; only for reading."""
        real = Path(os.path.realpath(self.directory))
        return ModelDirectory(real, root=real)

    def _mismatch(
        self,
        file: BinaryIO,
        shard: Shard,
        expected: Mapping[str, str],
        count: Callable[[int], None] = lambda _: None,
    ) -> tuple[str, str, str] | None:
        if not expected:
            return None
        with self._context.stats.timed("hash", file=shard.data_path):
            return find_mismatch(file, expected, self._context.cancellation.check, count)

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
        path = self.path(shard.data_path)
        try:
            return open(path, "rb", buffering=0)
        except OSError as error:
            check_shortage(error)
            raise NotFoundError(f"{path} cannot be read: {error.strerror}", shard=shard.data_path) from error


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
        if (manifest := _open_manifest(directory, name, context)) is not None:
            return _open(manifest, directory, context)
    if location.is_folder and names == location.manifest_names:
        chosen = choose_safetensors(_list(directory), str(directory), lambda name: str(directory / name))
        if chosen is not None and (manifest := _open_manifest(directory, chosen, context)) is not None:
            return _open(manifest, directory, context)
    raise NotFoundError(
        f"there is no {say_names(names, 'in', os.path.abspath(directory))}",
        hint="Give the directory that holds the manifest, or the manifest itself.",
    )


def _open(manifest: Manifest, directory: Path, context: LoadContext) -> LocalModel:
    model = LocalModel(manifest, directory, context)
    if context.is_use:  # a directory in the cache may be loaded by its path; others do not have the file
        place = Path(os.path.abspath(directory))
        model.use = begin_use(Layout(Folder(place.parent.parent, place.parts[-2:])), creates=False)
    return model


def _open_manifest(directory: Path, name: str, context: LoadContext) -> Manifest | None:
    """Read and check a manifest, or the headers of safetensors files; return None if there is no such file."""
    path, check, integrity = directory / name, context.cancellation.poll, context.integrity
    try:
        with open(path, "rb") as file:
            if is_safetensors(name):
                headers = read_local_headers(directory, name, file, check)
            else:
                data = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        return None
    except NdcacheError:
        raise
    except OSError as error:
        check_shortage(error)
        raise NotFoundError(f"{path} cannot be read: {error.strerror}") from error
    if not is_safetensors(name):
        return verify_and_parse(data, name=name, url=str(path), integrity=integrity, check=check, retryable=False)
    if headers.index is not None:
        check_manifest_digest(headers.index.start, name, str(path), integrity, retryable=False)
    return headers.manifest(lambda file: str(directory / file), integrity, check)


def _list(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(directory) if entry.is_file())
    except OSError as error:
        check_shortage(error)
        raise NotFoundError(f"{directory} cannot be listed: {error.strerror}") from error
