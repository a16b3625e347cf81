"""One shard on its way: what has come of it, what to ask the server for next, and whether to believe the answer.

A transfer that breaks off goes on where it was, now or in another process, if the server then says with a 206, the
exact Content-Range and the same strong ETag that what follows belongs to what is there. In all other cases it starts
over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import (
    ChecksumError,
    ProtocolError,
    RangeError,
    RemoteChangedError,
    SizeMismatchError,
    TransferError,
    TruncatedError,
    redact,
)
from .manifest import Shard
from .parts import Part
from .transport import Response
from .validator import Validator

__all__ = ["Transfer", "unasked"]


@dataclass
class Transfer:
    """How far a shard's transfer has come.

    Attributes
    ----------
    shard : Shard
    claim : str
        What the manifest says of its content; see `Validator.agrees`.
    owner : str
        The source's URL, which the caller's session is for.
    part : Part
        What has come, and of which version.
    cached : Validator or None
        What is known of an older file that may still be right.
    is_inherited : bool
        Whether the first bytes are what somebody else left.
    with_ranges : bool
        Whether the server may be asked for the rest of the file.
    changes : int
        How often the file changed on the server.
    """

    shard: Shard
    claim: str
    owner: str
    part: Part
    cached: Validator | None
    is_inherited: bool = False
    with_ranges: bool = True
    changes: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are there already, left by somebody else or by a try that failed later."""
        return self.part.origin is not None and self.part.nbytes == self.shard.nbytes

    def conditions(self, url: str) -> dict[str, str]:
        """The headers of the next request: for the rest, or only if the file is not the one in the cache, or none."""
        origin = self.part.origin
        if self.part.nbytes and origin is not None and origin.url == redact(url) and self.with_ranges:
            return {"Range": f"bytes={self.part.nbytes}-{self.shard.nbytes - 1}", "If-Range": origin.etag}
        if self.cached is not None and self.cached.etag and url == self.owner:
            return {"If-None-Match": self.cached.etag}
        return {}

    def accept(self, url: str, response: Response) -> bool:
        """Judge an answer, before its body is read.

        Returns
        -------
        bool
            Whether the body is what the part lacks; a whole file makes the part start over. If not, ask again: this
            time for the whole file.
        """
        start, origin = self.part.nbytes, self.part.origin
        was_asked_for_rest = "Range" in self.conditions(url)
        if not was_asked_for_rest and response.status != 200:
            raise unasked(response)
        if response.status == 206 and response.is_range(start, self.shard.nbytes):
            if origin is None or response.etag != origin.etag:
                self._note_change(url)
                return False
            return True
        if response.status != 200:  # another range, or 416: the file there is shorter than what came of it
            self.with_ranges = False
            return False
        _check_length(response, self.shard)
        if was_asked_for_rest and origin is not None and response.etag != origin.etag:
            self._note_change(url)
        else:
            self.with_ranges = not was_asked_for_rest  # the server may not care for them
        if start or origin is not None:
            self.part.restart()
        if response.etag is not None:
            self.part.comes_from(redact(url), response.etag, self.claim, response.linked_sha256)
        return True

    def check(self, url: str, expected: Mapping[str, str]) -> None:
        """Raise unless all has come and has the expected digests."""
        part, shard = self.part, self.shard
        if part.nbytes != shard.nbytes:
            raise TruncatedError(
                f"the body ended early, after {part.nbytes:,} of {shard.nbytes:,} bytes",
                url=url,
                shard=shard.data_path,
                expected=shard.nbytes,
                received=part.nbytes,
            )
        for algorithm, digest in expected.items():
            actual = part.digest(algorithm)
            if actual != digest:
                part.restart()
                raise ChecksumError(
                    f"wrong {algorithm}: {actual} came, {digest} is what it should be",
                    url=url,
                    shard=shard.data_path,
                    expected=digest,
                    received=actual,
                    hint="The file on the server is damaged, or of another version than the manifest.",
                )

    def _note_change(self, url: str) -> None:
        self.part.restart()
        self.changes += 1
        if self.changes > 1:
            raise RemoteChangedError(
                "the file changed on the server while it was being read, and again when it was begun anew",
                url=url,
                shard=self.shard.data_path,
                hint="Is it being uploaded just now? Try again later.",
            )


def unasked(response: Response) -> TransferError:
    kind = RangeError if response.status in (206, 416) else ProtocolError
    return kind(
        f"the server answered a plain request with status {response.status}", url=response.url, status=response.status
    )


def _check_length(response: Response, shard: Shard) -> None:
    """Before the body is read: what is announced must be what the manifest promises."""
    length = response.content_length
    if length is None or length == shard.nbytes:
        return
    raise SizeMismatchError(
        f"the server has {length:,} bytes where the manifest says {shard.nbytes:,}",
        url=response.url,
        shard=shard.data_path,
        expected=shard.nbytes,
        received=length,
        hint=_what_it_is(response, length),
    )


def _what_it_is(response: Response, length: int) -> str:
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        return "It is a web page: check the URL, and whether it needs a login."
    if length < 512 and response.read(512).startswith(b"version https://git-lfs"):
        return "It is a git-lfs pointer, not the file: serve the file itself (git lfs pull)."
    return "The manifest and the shard are of different versions, or the upload is not complete."
