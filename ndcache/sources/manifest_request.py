"""One manifest asked of a server: its bytes, that the cached ones are still right, or that it is not there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import (
    ConnectError,
    ManifestError,
    ManifestSyntaxError,
    NdcacheError,
    ProtocolError,
    TransferError,
    TruncatedError,
)
from ..format.parse import parse_manifest
from ..format.strict_json import MAX_MANIFEST_BYTES, WEB_PAGE_HINT
from ..http.content_coding import decode_body, encoding_of
from ..http.response import Response
from ..store.metadata import FileMetadata, may_blame_condition, settled_date
from .download import Downloader

__all__ = ["ManifestBody", "NotThereError", "refusal_of", "request_manifest"]

#: Statuses of the kind 4xx that say nothing about whether the file exists: who asks, when, and how fast.
_NOT_ABOUT_THE_FILE = (401, 407, 408, 429)
#: With the second request, if the answer to the first one was no good: whatever stands between gives the file anew.
_ANEW = {"Cache-Control": "no-cache"}
_WEB_PAGES = ("text/html", "application/xhtml+xml")
_OBJECT = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\n\r]*\{")


class NotThereError(NdcacheError):
    """The server has no manifest under this name, in whatever way it says so; `reason` is what to tell the user."""

    def __init__(self, reason: NdcacheError) -> None:
        super().__init__(reason.message)
        self.reason = reason


@dataclass(frozen=True)
class ManifestBody:
    """Hold what a server sent as a manifest, not yet parsed.

    Attributes
    ----------
    data : bytes
        Decoded.
    etag, last_modified : str or None
        What the server calls this version.
    is_html : bool
        Whether it says that this is a web page.
    """

    data: bytes
    etag: str | None
    last_modified: str | None
    is_html: bool

    @property
    def is_manifest(self) -> bool:
        """Whether this can be a manifest, a good or a bad one: a JSON object with records."""
        return bool(_OBJECT.match(self.data)) and (b'"records"' in self.data or b"\\u" in self.data)


def request_manifest(
    downloader: Downloader, url: str, source_url: str, known: FileMetadata | None
) -> ManifestBody | None:
    """Ask once for a manifest; and once more, without a condition, if the server makes nothing of the first request.

    Parameters
    ----------
    downloader : Downloader
    url, source_url : str
        See `Downloader.get`.
    known : FileMetadata or None
        Of the cached manifest.

    Returns
    -------
    ManifestBody or None
        None: it is still the version that is known.

    Raises
    ------
    NotThereError
        The answer's status says so.
    TransferError
    """
    conditions = {} if known is None else known.conditions
    try:
        answer = _ask(downloader, url, source_url, conditions)
    except TransferError as error:
        if not (conditions and may_blame_condition(error.status)):
            raise _judged(error) from error.__cause__
    else:
        if isinstance(answer, ManifestBody):
            return answer
        if conditions and known is not None and known.is_confirmed_by(answer):
            return None
    try:
        answer = _ask(downloader, url, source_url, _ANEW)
    except TransferError as error:
        raise _judged(error) from error.__cause__
    if isinstance(answer, ManifestBody):
        return answer
    raise ProtocolError("the server has nothing new without being asked for it (status 304)", url=url, status=304)


def refusal_of(body: ManifestBody, error: ManifestSyntaxError) -> NotThereError:
    """Return what to raise for a body that is no manifest at all."""
    if body.is_html or error.hint == WEB_PAGE_HINT:
        reason = _web_page(error.url, error.shard)
        reason.__cause__ = error
        return NotThereError(reason)
    return NotThereError(error)


def _web_page(url: str | None, name: str | None) -> ManifestSyntaxError:
    return ManifestSyntaxError(
        "the server sent a web page in place of the manifest", url=url, shard=name, hint=WEB_PAGE_HINT
    )


def _judged(error: TransferError) -> NdcacheError:
    """Tell an answer that the file is not there from a failure."""
    # A proxy's refusal of a tunnel has a status as well, which is not about the file.
    status = 0 if isinstance(error, ConnectError) else error.status or 0
    if 200 < status < 206 or (300 <= status < 500 and status not in _NOT_ABOUT_THE_FILE):
        return NotThereError(error)
    return error


def _ask(
    downloader: Downloader, url: str, source_url: str, headers: Mapping[str, str]
) -> ManifestBody | Mapping[str, str]:
    """Return the manifest, or the headers of a 304."""
    with downloader.get(url, source_url, headers, may_be_encoded=True) as response:
        if response.status == 304:
            return response.headers
        if response.status != 200:
            raise ProtocolError(f"the server answered with status {response.status}", url=url, status=response.status)
        headers = response.headers
        is_html = headers.get("Content-Type", "").partition(";")[0].strip().lower() in _WEB_PAGES
        encoding = encoding_of(headers.get("Content-Encoding"))
        try:
            data = decode_body(_chunks(response), encoding, MAX_MANIFEST_BYTES, downloader.cancellation.check, url)
        except ProtocolError as error:
            if is_html:  # whatever is in it
                raise NotThereError(_web_page(url, None)) from error
            raise
        if response.may_be_truncated:
            _check_end(data, url, downloader.cancellation.check)
    # What a mirror calls a version says nothing to the source.
    is_owners = url == source_url
    return ManifestBody(
        data, headers.get("ETag") if is_owners else None, settled_date(headers) if is_owners else None, is_html
    )


def _check_end(data: bytes, url: str, check: Callable[[], None]) -> None:
    """Raise if a body whose end nothing announced is not a whole manifest."""
    try:
        parse_manifest(data, name=url, url=url, check=check)
    except ManifestSyntaxError as error:
        raise TruncatedError("the body ended early", url=url) from error
    except ManifestError:
        pass  # It is whole, and will be judged by who asked.


def _chunks(response: Response) -> Iterator[bytes]:
    """Yield the body as it comes; raise if it ends before its announced length."""
    length, received = response.content_length, 0
    while data := response.read_some(1 << 16):
        received += len(data)
        yield data
    if length is not None and received < length:
        raise TruncatedError("the body ended early", url=response.url, expected=length, received=received)
