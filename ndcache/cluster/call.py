"""The values that travel between the client and the tasks of one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..format.manifest import Shard

__all__ = [
    "Call",
    "Failure",
    "Held",
    "HeldFiles",
    "ManifestFile",
    "NodeId",
    "PartialState",
    "Piece",
    "Survey",
    "without_records",
]


@dataclass(frozen=True)
class Call:
    """Describe a call to its tasks. Its repr hides possible secrets, as engines log the arguments of tasks.

    Attributes
    ----------
    source : str
        The source as the user gave it; each worker locates it, with its own environment.
    options : mapping of str to object
        Options of `LoaderOptions` that travel.
    files : mapping of str to object or None
        Which companion files are wanted: the arguments of `Companions`; None for none.
    manifest_name, manifest_sha256 : str
        The manifest's file name, and the digest of its bytes; empty before it is known.
    """

    source: str = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, Any] | None = None
    manifest_name: str = ""
    manifest_sha256: str = ""


@dataclass(frozen=True)
class NodeId:
    """Identify a node: all workers that share a cache directory.

    Attributes
    ----------
    host, boot : str
        The host's name, and the id of its boot.
    device, inode : int
        Of the cache's top directory, as the worker sees it.
    """

    host: str
    boot: str
    device: int
    inode: int


@dataclass(frozen=True)
class ManifestFile:
    """A manifest as it lies in a cache.

    Attributes
    ----------
    name : str
    data : bytes
    etag, last_modified : str or None
        What the server calls this version.
    """

    name: str
    data: bytes = field(repr=False)
    etag: str | None = None
    last_modified: str | None = None


@dataclass(frozen=True)
class Held:
    """A shard that a node has, and that is right.

    Attributes
    ----------
    digests : mapping of str to str
        Its digests by algorithm. May be empty, if the manifest has none and none was computed yet.
    etag : str or None
        What the origin calls this version.
    received : int
        Bytes that came from the origin just now.
    """

    digests: Mapping[str, str]
    etag: str | None = None
    received: int = 0


@dataclass(frozen=True)
class Survey:
    """List the files of a model that a node has.

    Attributes
    ----------
    directory : pathlib.Path
        The model's directory in the node's cache.
    held : mapping of int to Held
        The shards that are there and right, by their index in the manifest.
    files : dict of str to str or None
        The SHA-256 of the companion files that are there, by their names; None if they are not complete.
    """

    directory: Path
    held: Mapping[int, Held]
    files: dict[str, str] | None = None


@dataclass(frozen=True)
class HeldFiles:
    """List the companion files that a node has.

    Attributes
    ----------
    digests : dict of str to str
        Their SHA-256, by their names.
    nbytes : int
        Their sizes together.
    """

    digests: dict[str, str]
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """Some bytes of one shard.

    Attributes
    ----------
    index : int
        The shard's index in the manifest.
    shard : Shard
        Without its records; see `without_records`.
    start, end : int
        The first byte, and the one after the last.
    """

    index: int
    shard: Shard
    start: int
    end: int

    @property
    def size(self) -> int:
        """Return the number of bytes in it."""
        return self.end - self.start

    @property
    def is_whole(self) -> bool:
        """Return whether it is the whole shard."""
        return self.size == self.shard.nbytes


@dataclass(frozen=True)
class PartialState:
    """Record the progress of a node with a shard that it receives in several pieces.

    Attributes
    ----------
    file_name : str
        Its partial file. Whoever writes to it next may rely on its last writer having closed it.
    nbytes : int
        Bytes that are there, from the beginning.
    """

    file_name: str
    nbytes: int


@dataclass(frozen=True)
class Failure:
    """An error, as the result of a task. So engines do not log it, and tasks that take the result can pass it on.

    Attributes
    ----------
    error : Exception
    is_passed_on : bool
        Whether another task failed, whose result this one needed.
    """

    error: Exception = field(repr=False)
    is_passed_on: bool = False


def without_records(shard: Shard) -> Shard:
    """Return a shard without its records, which tasks do not need."""
    return replace(shard, records=())
