"""What is remembered of a file in the cache, so that it need not be read or asked for again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .manifest import Shard

__all__ = ["Validator"]


@dataclass(frozen=True)
class Validator:
    """What was true of a file when it was published.

    Attributes
    ----------
    nbytes, mtime_ns : int
        Size and time of change of the file on disk.
    digests : mapping of str to str
        Those that were computed from its bytes and found right, by algorithm.
    etag, last_modified : str or None
        What the server called this version.
    claim : str or None
        What the manifest said of it, or several ones did, each in its line; see `agrees`.
    """

    nbytes: int
    mtime_ns: int
    digests: Mapping[str, str] = field(default_factory=dict)
    etag: str | None = None
    last_modified: str | None = None
    claim: str | None = None

    def is_of(self, status: os.stat_result) -> bool:
        """Whether a file is still the one that was published, by size and time."""
        return (status.st_size, status.st_mtime_ns) == (self.nbytes, self.mtime_ns)

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> Validator | None:
        """What was noted, if it has the right form."""
        try:
            found = cls(**note)
        except TypeError:
            return None
        if not isinstance(found.digests, dict):
            return None
        texts = (found.etag, found.last_modified, found.claim, *found.digests.values())
        are_texts = all(isinstance(text, (str, type(None))) for text in texts)
        return found if are_texts and type(found.nbytes) is type(found.mtime_ns) is int else None

    def judge(self, status: os.stat_result, shard: Shard, claim: str) -> bool | None:
        """Whether a file is what the manifest says of the shard; None if that cannot be told.

        What is remembered of its content holds if its size and time are those it was published with. Without them, a
        digest can be computed; and if there is none, all there is to go by is whether it came with this manifest.

        Parameters
        ----------
        status : os.stat_result
            Of the file.
        shard : Shard
        claim : str
            See `agrees`.
        """
        if self.is_of(status):
            return self.agrees(shard, claim)
        return None if shard.digests or self.has_claim(claim) else False

    def agrees(self, shard: Shard, claim: str) -> bool | None:
        """Whether this was a file of what the manifest now says of the shard; None if that cannot be told.

        Parameters
        ----------
        shard : Shard
        claim : str
            What the manifest says of the shard's content: a digest, or else the manifest's name and own digest, as any
            change of the manifest may be one of the shard.
        """
        if common := shard.digests.keys() & self.digests.keys():
            if any(shard.digests[algorithm] != self.digests[algorithm] for algorithm in common):
                return False
            return True if common == shard.digests.keys() else None
        if shard.digests:
            return None if self.claim in (None, claim) else False
        return self.has_claim(claim)

    def has_claim(self, claim: str) -> bool:
        """Whether the file was found right for this claim."""
        return self.claim is not None and claim in self.claim.split("\n")

    def with_claim(self, claim: str) -> Validator:
        """The same of a file that was found right for one more claim: those of other manifests are still true."""
        name = claim.partition(" ")[0]
        others = [old for old in (self.claim or "").split("\n") if old and old.partition(" ")[0] != name]
        return replace(self, claim="\n".join([claim, *others]))
