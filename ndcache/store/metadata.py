"""What is remembered of a file in the cache, so that it need not be read or asked for again."""

from __future__ import annotations

import email.utils
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..format.manifest import Shard

__all__ = ["FileMetadata", "may_blame_condition", "settled_date"]

#: ETags that can be sent back: any in quotes, and without them what several servers give. Not ``*`` or ``""``, which
#: could be of any version.
_ETAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e]{1,256}"|[\w.:+/=~-]{1,256}', re.ASCII)
_DATE = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")

#: How many bytes a digest has, by algorithm.
_DIGEST_BYTES = {"md5": 16, "sha256": 32, "sha384": 48, "sha512": 64}
#: Units of time, in nanoseconds, that file systems and archives keep: FAT and zip, tar and layers of images, NTFS, …
_UNITS = (2 * 10**9, 10**9, 10**6, 10**3, 100)


@dataclass(frozen=True)
class FileMetadata:
    """What was true of a file when it was published.

    An ETag or a date that cannot be sent back is dropped: from an answer, and from a note of any age.

    Attributes
    ----------
    nbytes, mtime_ns : int
        Size and time of change of the file on disk.
    digests : mapping of str to str
        Those that were computed from its bytes and found right, by algorithm.
    etag, last_modified : str or None
        What the server called this version.
    content_id : str or None
        What the manifest said of it, or several ones did, each in its line; see `compare_content`.
    """

    nbytes: int
    mtime_ns: int
    digests: Mapping[str, str] = field(default_factory=dict)
    etag: str | None = None
    last_modified: str | None = None
    content_id: str | None = None

    def __post_init__(self) -> None:
        if self.etag is not None and not _ETAG.fullmatch(self.etag):
            object.__setattr__(self, "etag", None)
        if self.last_modified is not None and _seconds(self.last_modified) is None:
            object.__setattr__(self, "last_modified", None)

    @property
    def conditions(self) -> dict[str, str]:
        """The headers that ask a server for the file only if it has another version."""
        if self.etag is not None:
            return {"If-None-Match": self.etag}
        # With a date to come, no later version would be newer.
        seconds = None if self.last_modified is None else _seconds(self.last_modified)
        if self.last_modified is not None and seconds is not None and seconds <= time.time():
            return {"If-Modified-Since": self.last_modified}
        return {}

    def is_confirmed_by(self, headers: Mapping[str, str]) -> bool:
        """Whether a 304 to a request with `conditions` is about this version, if it says about which one."""
        if self.etag is not None:
            return headers.get("ETag", self.etag).removeprefix("W/") == self.etag.removeprefix("W/")
        return headers.get("Last-Modified", self.last_modified) == self.last_modified

    def is_unchanged(self, status: os.stat_result) -> bool:
        """Whether a file is still the one that was published, by size and time.

        Where it was copied to, times may be coarser: an image's layers have whole seconds, FAT two of them. The time
        that is left of the file's own is its time: whoever changes the file later does so in another unit, or, where
        times are finer, at no round one.
        """
        if status.st_size != self.nbytes:
            return False
        now, then = status.st_mtime_ns, self.mtime_ns
        return now == then or any(now == then - then % unit for unit in _UNITS)

    def to_note(self) -> dict[str, Any]:
        """Return the fields under the names that they have on disk."""
        note = asdict(self)
        note["claim"] = note.pop("content_id")
        return note

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> FileMetadata | None:
        """Return what was noted, or None if it does not have the right form."""
        fields = {"content_id" if name == "claim" else name: value for name, value in note.items()}
        try:
            found = cls(**fields)
        except TypeError:
            return None
        texts = (found.etag, found.last_modified, found.content_id)
        if not all(isinstance(text, (str, type(None))) for text in texts) or not _are_digests(found.digests):
            return None
        if not type(found.nbytes) is type(found.mtime_ns) is int:
            return None
        return found

    def compare(self, status: os.stat_result, shard: Shard, content_id: str) -> bool | None:
        """Whether a file is what the manifest says of the shard; None if that cannot be told.

        What is remembered of its content holds if its size and time are those it was published with. Without them, a
        digest can be computed; and if there is none, all there is to go by is whether it came with this manifest.

        Parameters
        ----------
        status : os.stat_result
            Of the file.
        shard : Shard
        content_id : str
            See `compare_content`.
        """
        if self.is_unchanged(status):
            return self.compare_content(shard, content_id)
        return None if shard.digests or self.has_content_id(content_id) else False

    def compare_content(self, shard: Shard, content_id: str) -> bool | None:
        """Whether this was a file of what the manifest now says of the shard; None if that cannot be told.

        Parameters
        ----------
        shard : Shard
        content_id : str
            What the manifest says of the shard's content: a digest, or else the manifest's name and own digest, as any
            change of the manifest may be one of the shard.
        """
        if common := shard.digests.keys() & self.digests.keys():
            if any(shard.digests[algorithm] != self.digests[algorithm] for algorithm in common):
                return False
            return True if common == shard.digests.keys() else None
        if shard.digests:
            return None if self.content_id in (None, content_id) else False
        return self.has_content_id(content_id)

    def has_content_id(self, content_id: str) -> bool:
        """Whether the file was found right for this claim."""
        return self.content_id is not None and content_id in self.content_id.split("\n")

    def with_content_id(self, content_id: str) -> FileMetadata:
        """The same of a file that was found right for one more claim: those of other manifests are still true."""
        name = content_id.partition(" ")[0]
        others = [old for old in (self.content_id or "").split("\n") if old and old.partition(" ")[0] != name]
        return replace(self, content_id="\n".join([content_id, *others]))


def may_blame_condition(status: int | None) -> bool:
    """Whether a request may have been refused for the condition in it, and not for access, pace or the file."""
    return status is not None and 400 <= status < 500 and status not in (401, 403, 404, 407, 408, 410, 429)


def settled_date(headers: Mapping[str, str]) -> str | None:
    """Return an answer's Last-Modified, unless the file may change in that second once more (RFC 9110, 8.8.2.2)."""
    modified, now = headers.get("Last-Modified"), _seconds(headers.get("Date", ""))
    then = None if modified is None else _seconds(modified)
    return modified if then is not None and then < (time.time() if now is None else now) else None


def _seconds(date: str) -> float | None:
    """Read a date of HTTP, as seconds since 1970; None if it is not in its usual form."""
    if not _DATE.fullmatch(date):
        return None
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None


def _are_digests(noted: object) -> bool:
    """Whether these are hex digests by algorithm, as they are noted."""
    return isinstance(noted, dict) and all(
        isinstance(text, str) and re.fullmatch(r"[0-9a-f]*", text) and len(text) == 2 * _DIGEST_BYTES.get(algorithm, -1)
        for algorithm, text in noted.items()
    )
