"""Notes about published files, so that they need not be read or asked for again."""

from __future__ import annotations

import email.utils
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

from ..format.manifest import Shard

__all__ = ["FileMetadata", "Match", "may_blame_condition", "settled_date"]

#: ETags that can be sent back: any in quotes, and those without quotes that several servers give. Not ``*`` or ``""``,
#: which could be of any version.
_ETAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e]{1,256}"|[\w.:+/=~-]{1,256}', re.ASCII)
_DATE = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")

#: How many bytes a digest has, by algorithm.
_DIGEST_BYTES = {"md5": 16, "sha256": 32, "sha384": 48, "sha512": 64}
#: Resolutions of file times, in nanoseconds: from FAT and zip (2 s), tar and layers of images (1 s) to NTFS (100 ns).
_UNITS = (2 * 10**9, 10**9, 10**6, 10**3, 100)


class Match(Enum):
    """The answer to whether a file has the content that the manifest describes."""

    SAME = "the same content"
    DIFFERENT = "other content"
    UNKNOWN = "it cannot be told without reading the file"


@dataclass(frozen=True)
class FileMetadata:
    """Facts about a file, noted when it was published.

    An ETag or a date that cannot be sent back to a server is dropped.

    Attributes
    ----------
    nbytes, mtime_ns : int
        Size and modification time of the file on disk.
    digests : mapping of str to str
        The digests that were computed from its bytes and found right, by algorithm.
    etag, last_modified : str or None
        What the server called this version.
    content_ids : mapping of str to str
        For a shard, the `content_id` of each manifest (see `compare_content`) by the manifest's name; a digest of the
        shard itself is under the empty name. The latest comes first. Empty for other files.
    """

    nbytes: int
    mtime_ns: int
    digests: Mapping[str, str] = field(default_factory=dict)
    etag: str | None = None
    last_modified: str | None = None
    content_ids: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.etag is not None and not _ETAG.fullmatch(self.etag):
            object.__setattr__(self, "etag", None)
        if self.last_modified is not None and _seconds(self.last_modified) is None:
            object.__setattr__(self, "last_modified", None)

    @classmethod
    def of(
        cls,
        status: os.stat_result,
        digests: Mapping[str, str],
        *,
        etag: str | None = None,
        last_modified: str | None = None,
        content_id: str | None = None,
    ) -> FileMetadata:
        """Return the metadata of a file with this status; for `content_id`, see `compare_content`."""
        known = cls(status.st_size, status.st_mtime_ns, digests, etag, last_modified)
        return known if content_id is None else known.with_content_id(content_id)

    @property
    def conditions(self) -> dict[str, str]:
        """Return the headers that ask a server for the file only if it has another version."""
        if self.etag is not None:
            return {"If-None-Match": self.etag}
        # With a date in the future, no later version would be newer.
        seconds = None if self.last_modified is None else _seconds(self.last_modified)
        if self.last_modified is not None and seconds is not None and seconds <= time.time():
            return {"If-Modified-Since": self.last_modified}
        return {}

    def is_confirmed_by(self, headers: Mapping[str, str]) -> bool:
        """Return whether a 304 that answers a request with `conditions` names this version, or no version."""
        if self.etag is not None:
            return headers.get("ETag", self.etag).removeprefix("W/") == self.etag.removeprefix("W/")
        return headers.get("Last-Modified", self.last_modified) == self.last_modified

    def is_unchanged(self, status: os.stat_result) -> bool:
        """Return whether a file is still the one that was published, by size and time.

        A copy may have a coarser time: image layers keep whole seconds, FAT keeps even ones. So the published time,
        rounded down to such a unit, counts as unchanged. A later change of the file does not pass: its time falls into
        another unit, or, where times are finer, is not a round one.
        """
        if status.st_size != self.nbytes:
            return False
        now, then = status.st_mtime_ns, self.mtime_ns
        return now == then or any(now == then - then % unit for unit in _UNITS)

    def compare(self, status: os.stat_result, shard: Shard, content_id: str) -> Match:
        """Compare a file, by its status, with what the manifest says of the shard.

        If the file is unchanged, the note about its content holds. If it has changed, its digest can be computed; if
        the manifest has none, nothing is known but whether the file came with this manifest.

        Parameters
        ----------
        status : os.stat_result
            The file's status.
        shard : Shard
        content_id : str
            See `compare_content`.
        """
        if self.is_unchanged(status):
            return self.compare_content(shard, content_id)
        return Match.UNKNOWN if shard.digests or self.has_content_id(content_id) else Match.DIFFERENT

    def compare_content(self, shard: Shard, content_id: str) -> Match:
        """Compare the content of the file as it was published with what the manifest now says of the shard.

        Parameters
        ----------
        shard : Shard
        content_id : str
            Identifies the shard's content according to the manifest: a digest of the shard, or, if there is none, the
            name and digest of the manifest, as any change of the manifest may mean a change of the shard.
        """
        if common := shard.digests.keys() & self.digests.keys():
            if any(shard.digests[algorithm] != self.digests[algorithm] for algorithm in common):
                return Match.DIFFERENT
            return Match.SAME if common == shard.digests.keys() else Match.UNKNOWN
        if shard.digests:
            is_of_other_digest = "" in self.content_ids and not self.has_content_id(content_id)
            return Match.DIFFERENT if is_of_other_digest else Match.UNKNOWN
        return Match.SAME if self.has_content_id(content_id) else Match.DIFFERENT

    def is_compared_first(self, shard: Shard) -> bool:
        """Return whether a digest is demanded of a file that came with manifests which have none of it."""
        has_no_digest = bool(self.content_ids) and "" not in self.content_ids
        return bool(shard.digests) and has_no_digest and not shard.digests.keys() & self.digests.keys()

    def has_content_id(self, content_id: str) -> bool:
        """Return whether the file was found right for a manifest with this `content_id`."""
        return content_id in self.content_ids.values()

    def with_content_id(self, content_id: str) -> FileMetadata:
        """Return the metadata of a file that was found right for one more manifest, or a new version of one."""
        name = _manifest_name(content_id)
        others = {other: old for other, old in self.content_ids.items() if other != name}
        return replace(self, content_ids={name: content_id, **others})

    def to_note(self) -> dict[str, Any]:
        """Return the fields as they are stored on disk."""
        note = asdict(self)
        note["claim"] = "\n".join(note.pop("content_ids").values()) or None
        return note

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> FileMetadata | None:
        """Return what was noted, or None if the note does not have the right form."""
        fields = dict(note)
        claim = fields.pop("claim", None)
        try:
            found = cls(**fields)
        except TypeError:
            return None
        if not all(isinstance(text, (str, type(None))) for text in (found.etag, found.last_modified, claim)):
            return None
        if not _are_digests(found.digests) or not type(found.nbytes) is type(found.mtime_ns) is int:
            return None
        content_ids = {_manifest_name(content_id): content_id for content_id in (claim or "").split("\n") if content_id}
        return replace(found, content_ids=content_ids)


def _manifest_name(content_id: str) -> str:
    return content_id.rpartition(" ")[0]


def may_blame_condition(status: int | None) -> bool:
    """Return whether a status may mean that the server refused a request because of its condition.

    Other reasons have their own statuses: access, too many requests, or a missing file.
    """
    return status is not None and 400 <= status < 500 and status not in (401, 403, 404, 407, 408, 410, 429)


def settled_date(headers: Mapping[str, str]) -> str | None:
    """Return a response's Last-Modified, unless the file may still change in that second (RFC 9110, 8.8.2.2)."""
    modified, now = headers.get("Last-Modified"), _seconds(headers.get("Date", ""))
    then = None if modified is None else _seconds(modified)
    return modified if then is not None and then < (time.time() if now is None else now) else None


def _seconds(date: str) -> float | None:
    """Return an HTTP date as seconds since 1970; None if it does not have the usual form."""
    if not _DATE.fullmatch(date):
        return None
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None


def _are_digests(noted: object) -> bool:
    """Return whether a value from a note is a mapping of algorithms to hex digests."""
    return isinstance(noted, dict) and all(
        isinstance(text, str) and re.fullmatch(r"[0-9a-f]*", text) and len(text) == 2 * _DIGEST_BYTES.get(algorithm, -1)
        for algorithm, text in noted.items()
    )
