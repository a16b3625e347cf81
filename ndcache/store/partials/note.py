"""Notes about partial files: where their bytes come from, and which ones are there."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...files.folder import Folder
from ...files.notes import read_note, sendable, write_note
from ...files.system import boot_id
from .ranges import ByteRanges

__all__ = ["PartialNote", "PartialSource", "note_name"]

#: Stands in a note in place of a boot ID: the bytes were synced to disk, and survive a crash of the system.
_SYNCED = "synced"
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class PartialSource:
    """The source of the bytes of a partial file.

    Attributes
    ----------
    url : str
        Without secrets.
    etag : str
        The strong ETag of this version.
    content_id : str
        Identifies the shard's content at that time; see `FileMetadata.compare_content`.
    sha256 : str or None
        The SHA-256 that the server gave.
    boot : str
        The boot ID of the system that wrote the bytes: unless they were synced to disk, they survive the end of a
        process, but not a crash of the system. ``"synced"`` if they were synced; empty if the system has no boot ID.
    """

    url: str
    etag: str
    content_id: str
    sha256: str | None
    boot: str

    @classmethod
    def of_this_boot(cls, url: str, etag: str, content_id: str, sha256: str | None) -> PartialSource:
        """Return the source of bytes that this system writes now."""
        return cls(url, etag, content_id, sha256, boot_id())

    def synced(self) -> PartialSource:
        """Return the same source, of bytes that were synced to disk."""
        return replace(self, boot=_SYNCED)

    @property
    def is_trustworthy(self) -> bool:
        """Return whether all bytes that were written are certainly still there."""
        return self.boot == _SYNCED or (bool(self.boot) and self.boot == boot_id())


@dataclass(frozen=True)
class PartialNote:
    """The note beside a partial file.

    Attributes
    ----------
    source : PartialSource
    ranges : ByteRanges or None
        The bytes that are there; None if the partial file has no holes, so that its size shows them.
    """

    source: PartialSource
    ranges: ByteRanges | None = None

    def to_note(self) -> dict[str, Any]:
        """Return the fields as they are stored on disk."""
        source = self.source
        note = {
            "url": source.url,
            "etag": source.etag,
            "claim": source.content_id,
            "sha256": source.sha256,
            "boot": source.boot,
        }
        return note if self.ranges is None else {**note, "spans": list(self.ranges)}

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> PartialNote | None:
        """Return what was noted, or None if the note does not have the right form."""
        fields = {"content_id" if key == "claim" else key: value for key, value in note.items()}
        noted, sha256 = fields.pop("spans", None), fields.pop("sha256", "")
        if sha256 is not None and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
            return None
        try:
            source = PartialSource(
                sha256=sha256, **{key: text for key, text in fields.items() if isinstance(text, str)}
            )
            ranges = None if noted is None else _checked_ranges(noted)
        except (TypeError, ValueError):
            return None
        return cls(replace(source, etag=sendable(source.etag) or ""), ranges)

    @classmethod
    def read(cls, folder: Folder, file_name: str) -> PartialNote | None:
        """Return the note about a partial file; None if there is none, or it does not have the right form."""
        note = read_note(folder, note_name(file_name))
        return None if note is None else cls.from_note(note)

    def write(self, folder: Folder, file_name: str) -> None:
        """Write the note about a partial file, and replace an older one."""
        name = note_name(file_name)
        write_note(folder, name, self.to_note(), (folder, f"{name}.{secrets.token_hex(8)}"))


def note_name(file_name: str) -> str:
    """Return the file name of the note about a partial file."""
    return f"{file_name}.json"


def _checked_ranges(noted: Iterable[Iterable[int]]) -> ByteRanges:
    ranges = [(start, end) for start, end in noted]
    if not all(type(start) is type(end) is int and 0 <= start <= end for start, end in ranges):
        raise ValueError("not a list of byte ranges")
    return ByteRanges(ranges)
