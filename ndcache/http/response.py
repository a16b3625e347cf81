"""The response to one GET, whose body is read as it comes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import requests

from ..errors import NdcacheError, ProtocolError, StallError
from ..workers.cancellation import Cancellation
from ..workers.stall import StallWatch
from .limits.origin import Permit
from .limits.token_bucket import TokenBucket
from .translate import FAILURES, FailedRequest, is_tls_end, raise_transfer_error

__all__ = ["Response", "check_not_woken"]

_DRAIN_BYTES = 1 << 14


class Response:
    """The response to one GET, its body not yet read. Use it in a ``with`` block.

    Attributes
    ----------
    status : int
    headers : mapping
        Case-insensitive.
    url : str
        The URL that answered, after redirects.
    location : str or None
        The target of a redirect.
    linked_sha256 : str or None
        The file's SHA-256, which the first server gives if it stores the file elsewhere (Hugging Face).
    commit : str or None
        The commit that the file belongs to, which the first server gives (Hugging Face).
    permit : Permit or None
        Released when the body has been read or is given up.
    limited : float
        Seconds that this thread has waited because of the caller's own limit.
    may_be_truncated : bool
        Whether a body without framing ended with its TLS connection, but without TLS's notice that this was the end.
        Then only the body itself tells whether it is complete (RFC 9112, 9.8).
    """

    linked_sha256: str | None = None
    commit: str | None = None
    permit: Permit | None = None
    limited: float = 0.0
    may_be_truncated: bool = False

    def __init__(
        self,
        raw: requests.Response,
        cancellation: Cancellation,
        watch: StallWatch,
        location: str | None = None,
        bucket: TokenBucket | None = None,
    ) -> None:
        self.status: int = raw.status_code
        self.headers: Mapping[str, str] = raw.headers
        self.url: str = raw.url
        self.location = location
        self._raw = raw
        self._cancellation = cancellation
        self._watch = watch
        self._bucket = bucket

    @property
    def content_length(self) -> int | None:
        """Return the announced length of the body, or None if there is none.

        Raises
        ------
        ProtocolError
            The header is not a number.
        """
        text = self.headers.get("Content-Length")
        if text is None or "Transfer-Encoding" in self.headers:
            return None
        if not re.fullmatch(r"[0-9]{1,19}", text):
            raise ProtocolError(f"the server sent the Content-Length {text[:40]!r}", url=self.url, status=self.status)
        return int(text)

    @property
    def etag(self) -> str | None:
        """Return the ETag if it is a strong one, which only files with the same bytes share (RFC 9110, 8.8.3)."""
        text = self.headers.get("ETag", "").strip()
        return text if re.fullmatch(r'"[\x21\x23-\x7e]{1,256}"', text) else None

    def is_range(self, start: int, end: int, size: int) -> bool:
        """Return whether the body is bytes `start` to `end`, exclusive, of a file of `size` bytes."""
        text = self.headers.get("Content-Range", "").strip()
        if len(text) > 80 or not (match := re.fullmatch(r"(?i:bytes) ([0-9]+)-([0-9]+)/([0-9]+)", text)):
            return False
        return tuple(map(int, match.groups())) == (start, end - 1, size) and self.content_length in (None, end - start)

    def read_some(self, limit: int) -> bytes | memoryview:
        """Return the next bytes of the body, up to `limit`, as soon as there are any; no bytes mean its end.

        They are valid until the next call in the same thread, which may use their memory again.

        Raises
        ------
        TransferError
            The body broke off, as its HTTP framing shows. A body without framing just ends: count its bytes, or look
            at `may_be_truncated`.
        """
        if self._bucket is not None:
            limit = min(limit, self._bucket.read_bytes)
        self._watch.is_waiting = True
        try:
            data: bytes | memoryview = self._raw.raw.read1(limit, decode_content=False)
        except FAILURES as error:
            check_not_woken(self._cancellation, self._watch, self.url)
            if self.content_length is not None or "Transfer-Encoding" in self.headers or not is_tls_end(error):
                raise_transfer_error(error, FailedRequest(self.url, "body"))
            self.may_be_truncated, data = True, b""
        finally:
            self._watch.is_waiting = False
        if not data:
            # A socket that another thread has shut looks like the end of the body.
            check_not_woken(self._cancellation, self._watch, self.url)
        self._watch.received(len(data))
        if self._bucket is not None:
            self.limited += self._bucket.throttle(len(data), self._cancellation)
        return data

    def read(self, limit: int) -> bytes:
        """Return the whole body, or its first `limit` + 1 bytes if it is longer than `limit`."""
        body = bytearray()
        while len(body) <= limit and (data := self.read_some(min(limit + 1 - len(body), 1 << 16))):
            body += data
        return bytes(body)

    def __enter__(self) -> Response:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            length = 0 if self.status == 304 else self.content_length
            if kind is None and length is not None and length <= _DRAIN_BYTES:
                # A connection can be used again only after its body has been read to the end.
                self.read(_DRAIN_BYTES)
        except NdcacheError:
            pass
        finally:
            self._raw.close()
            self._cancellation.remove(self._watch)
            if self.permit is not None:
                self.permit.release()


def check_not_woken(cancellation: Cancellation, watch: StallWatch, url: str) -> None:
    """Raise if another thread ended the wait for the server, because of a cancellation or a stall."""
    cancellation.check()
    if watch.is_stalled:
        raise StallError("the server sends next to nothing", url=url, hint="Try again later.")
