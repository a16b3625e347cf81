"""The interface of an opened model: its manifest, and an open file for each shard that is asked for."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from ..format.manifest import Manifest, Shard
from ..store.housekeeping.usage import Use
from ..store.partials.growing import GrowingFile

__all__ = ["Flaw", "Model", "ShardFile", "is_shortage"]


class Flaw(Enum):
    """Why `Model.check` does not accept a shard."""

    BAD = "it has wrong bytes or the wrong size, or cannot be read"
    BAD_AND_KEPT = "it is bad, and was not set aside, as the cache cannot be written"
    MISSING = "it is not there"
    OF_ANOTHER_VERSION = "it was replaced by the shard of another version of the model"


@dataclass(frozen=True)
class ShardFile:
    """A shard's file, checked as the options demand. The caller must close it.

    It is open, so that the bytes that were checked are the ones that are read, even if the file loses its name. It may
    have only the ranges of the requested tensors.

    Attributes
    ----------
    file : binary file
        Open for reading.
    from_cache : bool
        Whether nothing was downloaded.
    checked : str
        ``"size"``, or the strongest algorithm: ``"md5"``, ``"sha256"``, or, if the caller demands such a digest,
        ``"sha384"`` or ``"sha512"``.
    is_complete : bool
        Whether nothing of it is being downloaded any more. If not, it is shorter than the shard.
    """

    file: BinaryIO
    from_cache: bool
    checked: str
    is_complete: bool = True


class Model(ABC):
    """A model whose manifest is known.

    Parameters
    ----------
    manifest : Manifest
    directory : pathlib.Path
        The directory of its files, which need not exist yet.
    """

    #: The use of the model, which keeps it in the cache; None if it is elsewhere, or only looked at.
    use: Use | None = None

    def __init__(self, manifest: Manifest, directory: Path) -> None:
        self.manifest = manifest
        self.directory = directory

    def take_use(self) -> Use | None:
        """Return the use of the model, to be ended by the caller."""
        use, self.use = self.use, None
        return use

    def end_use(self) -> None:
        """Let others remove the model."""
        if (use := self.take_use()) is not None:
            use.end()

    @abstractmethod
    def has(self, shard: Shard) -> bool:
        """Return whether the shard's file is there and of the right size, without reading it."""

    @property
    def is_kept(self) -> bool:
        """Return whether the files that are obtained lie on disk, and not in memory."""
        return True

    def nbytes(self, shard: Shard) -> int:
        """Return how many bytes `obtain` reads or fetches; less than the shard has if only some ranges are wanted."""
        return shard.nbytes

    @abstractmethod
    def prepare(self, shards: Sequence[Shard]) -> bool:
        """Check that all these shards can be obtained, before the first one is.

        Returns
        -------
        bool
            Whether all are likely to need no network.

        Raises
        ------
        NdcacheError
            One of them is missing, or there is no room for them.
        """

    @abstractmethod
    def obtain(self, shard: Shard, growing: GrowingFile | None = None) -> ShardFile:
        """Return the shard's open file. Workers call this from several threads.

        If the shard is downloaded and has no digest, `growing` lets tasks read what is there meanwhile.
        """

    @abstractmethod
    def check(self, shard: Shard) -> str | Flaw:
        """Read the shard's file and compare its size and digests.

        Returns
        -------
        str or Flaw
            What the shard was checked by, ``"size"`` or the strongest algorithm; or why it is not right.
        """

    def finish(self) -> None:  # noqa: B027 - most models have nothing to do
        """Clean up after all requested shards have been obtained."""

    def close(self) -> None:  # noqa: B027
        """Release what the model holds. Nothing can be obtained any more."""


def is_shortage(error: OSError) -> bool:
    """Return whether an error is about this process, which lacks descriptors or memory, and not about the file."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
