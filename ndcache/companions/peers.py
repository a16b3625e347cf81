"""Hand companion files from one node of a cluster to the others, so that they leave the server once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import CacheUnavailableError, ChecksumError
from ..store.companion_note import CompanionNote
from ..store.directory import ModelDirectory
from .publish import publish, writing
from .rules import MAX_INCLUDED_BYTES

__all__ = ["CompanionFile", "CompanionFiles", "held_companions", "keep_companions", "read_companions"]


@dataclass(frozen=True)
class CompanionFile:
    """A companion file, and what the server calls its version."""

    data: bytes = field(repr=False)
    etag: str | None = None
    last_modified: str | None = None


@dataclass(frozen=True)
class CompanionFiles:
    """The companion files of a model, by their names, and the note about them."""

    note: CompanionNote
    files: Mapping[str, CompanionFile]


def held_companions(cache: ModelDirectory, manifest: str) -> dict[str, str] | None:
    """Return the SHA-256 of the companion files that came with a manifest, by their names.

    Parameters
    ----------
    cache : ModelDirectory
    manifest : str
        The name of the manifest, and its digest.

    Returns
    -------
    dict or None
        None if they were not asked for, or not all of them are there.
    """
    note = CompanionNote.read(cache.layout)
    if note.manifest != manifest or note.pending or note.failed:
        return None
    digests = dict[str, str]()
    for name in note.files:
        metadata = cache.metadata(name)
        if metadata is None or "sha256" not in metadata.digests or not cache.is_intact(name):
            return None
        digests[name] = metadata.digests["sha256"]
    return digests


def read_companions(cache: ModelDirectory) -> CompanionFiles:
    """Return the companion files in the cache.

    Raises
    ------
    CacheUnavailableError
        One of them is gone.
    """
    note, files = CompanionNote.read(cache.layout), dict[str, CompanionFile]()
    for name in note.files:
        metadata, data = cache.metadata(name), cache.read(name, MAX_INCLUDED_BYTES)
        if data is None or metadata is None:
            raise CacheUnavailableError("a companion file was deleted while it was sent to another node", shard=name)
        files[name] = CompanionFile(data, metadata.etag, metadata.last_modified)
    return CompanionFiles(note, files)


def keep_companions(
    cache: ModelDirectory, received: CompanionFiles, digests: Mapping[str, str], check: Callable[[], None]
) -> None:
    """Publish companion files that another node has sent.

    Parameters
    ----------
    cache : ModelDirectory
    received : CompanionFiles
    digests : mapping of str to str
        Their SHA-256, which did not come with them.
    check : callable
        Called now and then; may raise to stop.

    Raises
    ------
    ChecksumError
        They are not what they should be. None of the wrong bytes are kept.
    CacheError
    """
    for name, expected in digests.items():
        file = received.files.get(name, CompanionFile(b""))
        with writing(cache, name), cache.partials.create(name) as partial:
            partial.hasher.add("sha256", check)
            partial.write(file.data)
            partial.hasher.catch_up(check, wait=True)
            actual = partial.hasher.hexdigest("sha256")
            if actual != expected:
                raise ChecksumError(
                    f"another node sent wrong bytes: their sha256 is {actual}, expected {expected}",
                    shard=name,
                    expected=expected,
                    received=actual,
                    hint="The bytes came from another node of the cluster, and were not used.",
                )
            publish(cache, partial, name, etag=file.etag, last_modified=file.last_modified)
    received.note.write(cache.layout)
