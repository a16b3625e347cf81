"""Request one manifest: its bytes, or the answer that it has not changed, or that there is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ...errors import (
    ConnectError,
    ManifestError,
    ManifestSyntaxError,
    NdcacheError,
    ProtocolError,
    TransferError,
    TruncatedError,
)
from ...format.parse import parse_manifest
from ...format.strict_json import MAX_MANIFEST_BYTES, WEB_PAGE_HINT
from ...http.content_coding import decode_body, encoding_of
from ...http.response import Response
from ...store.metadata import FileMetadata, may_blame_condition, settled_date
from ..client import Client

__all__ = [
    "NO_CACHE",
    "ManifestBody",
    "NotThereError",
    "is_web_page",
    "not_there_or",
    "refusal_of",
    "request_manifest",
    "web_page_error",
]

#: Statuses from 400 to 499 that do not tell whether the file exists: they are about access, time and pace.
_NOT_ABOUT_THE_FILE = (401, 407, 408, 429)
#: The header of the second request, after a useless answer to the first one: it makes caches on the way ask the server.
NO_CACHE = {"Cache-Control": "no-cache"}
_WEB_PAGES = ("text/html", "application/xhtml+xml")
_OBJECT = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\n\r]*\{")


class NotThereError(NdcacheError):
    """The server has no manifest under this name, however it says so.

    Attributes
    ----------
    reason : NdcacheError
        The error for the user.
    """

    def __init__(self, reason: NdcacheError) -> None:
        super().__init__(reason.message)
        self.reason = reason


@dataclass(frozen=True)
class ManifestBody:
    """The body that a server sent as a manifest, not yet parsed.

    Attributes
    ----------
    data : bytes
        Without the Content-Encoding.
    etag, last_modified : str or None
        The version, as the source names it.
    is_html : bool
        Whether the server says that this is a web page.
    """

    data: bytes
    etag: str | None
    last_modified: str | None
    is_html: bool

    @property
    def is_index(self) -> bool:
        """Return whether this can be an index of safetensors files, valid or not."""
        return bool(_OBJECT.match(self.data)) and (b'"weight_map"' in self.data or b"\\u" in self.data)

    @property
    def is_manifest(self) -> bool:
        """Return whether this can be a manifest, valid or not: a JSON object with records."""
        return bool(_OBJECT.match(self.data)) and (b'"records"' in self.data or b"\\u" in self.data)


def request_manifest(
    client: Client,
    url: str,
    source_url: str,
    known: FileMetadata | None,
    parse: Callable[..., object] = parse_manifest,
) -> ManifestBody | None:
    """Request a manifest; if the condition may have made the server fail, request it again without one.

    Parameters
    ----------
    client : Client
    url, source_url : str
        See `Transport.get`.
    known : FileMetadata or None
        The metadata of the cached manifest.
    parse : callable
        Parse a body whose end was not announced, to find out whether it is complete.

    Returns
    -------
    ManifestBody or None
        None if the cached manifest has not changed.

    Raises
    ------
    NotThereError
        The answer's status says that there is no such file.
    TransferError
    """
    conditions = {} if known is None else known.conditions
    try:
        answer = _ask(client, url, source_url, conditions, parse)
    except TransferError as error:
        if not (conditions and may_blame_condition(error.status)):
            raise not_there_or(error) from error.__cause__
    else:
        if isinstance(answer, ManifestBody):
            return answer
        if conditions and known is not None and known.is_confirmed_by(answer):
            return None
    try:
        answer = _ask(client, url, source_url, NO_CACHE, parse)
    except TransferError as error:
        raise not_there_or(error) from error.__cause__
    if isinstance(answer, ManifestBody):
        return answer
    raise ProtocolError("the server answered status 304 to a request without a condition", url=url, status=304)


def refusal_of(body: ManifestBody, error: ManifestSyntaxError) -> NotThereError:
    """Return the error to raise for a body that is no manifest at all."""
    if body.is_html or error.hint == WEB_PAGE_HINT:
        reason = web_page_error(error.url, error.shard)
        reason.__cause__ = error
        return NotThereError(reason)
    return NotThereError(error)


def web_page_error(url: str | None, name: str | None) -> ManifestSyntaxError:
    return ManifestSyntaxError(
        "the server sent a web page in place of the manifest", url=url, shard=name, hint=WEB_PAGE_HINT
    )


def not_there_or(error: TransferError) -> NdcacheError:
    """Return `NotThereError` for an error whose status says that there is no such file, else the error itself."""
    # The status of a proxy that refuses a tunnel is not about the file.
    status = 0 if isinstance(error, ConnectError) else error.status or 0
    if 200 < status < 206 or (300 <= status < 500 and status not in _NOT_ABOUT_THE_FILE):
        return NotThereError(error)
    return error


def is_web_page(response: Response) -> bool:
    """Return whether the server says that a body is a web page."""
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower() in _WEB_PAGES


def _ask(
    client: Client, url: str, source_url: str, headers: Mapping[str, str], parse: Callable[..., object]
) -> ManifestBody | Mapping[str, str]:
    """Return the manifest, or the headers of a 304."""
    check = client.context.cancellation.check
    with client.get(url, source_url, headers, may_be_encoded=True) as response:
        if response.status == 304:
            return response.headers
        if response.status != 200:
            raise ProtocolError(f"the server answered with status {response.status}", url=url, status=response.status)
        headers = response.headers
        is_html = is_web_page(response)
        encoding = encoding_of(headers.get("Content-Encoding"))
        try:
            data = decode_body(_chunks(response), encoding, MAX_MANIFEST_BYTES, check, url)
        except ProtocolError as error:
            if is_html:
                raise NotThereError(web_page_error(url, None)) from error
            raise
        if response.may_be_truncated:
            _check_end(data, url, check, parse)
    if url != source_url:  # a mirror's name for a version means nothing to the source
        return ManifestBody(data, None, None, is_html)
    return ManifestBody(data, headers.get("ETag"), settled_date(headers), is_html)


def _check_end(data: bytes, url: str, check: Callable[[], None], parse: Callable[..., object]) -> None:
    """Check that a body whose end was not announced is a complete manifest."""
    try:
        parse(data, name=url, url=url, check=check)
    except ManifestSyntaxError as error:
        raise TruncatedError("the body ended early", url=url) from error
    except ManifestError:
        pass  # it is complete, and the caller checks the rest


def _chunks(response: Response) -> Iterator[bytes]:
    """Yield the body as it arrives; raise if it ends before its announced length."""
    length, received = response.content_length, 0
    while data := response.read_some(1 << 16):
        received += len(data)
        yield bytes(data)  # what a decoder keeps must not change
    if length is not None and received < length:
        raise TruncatedError("the body ended early", url=response.url, expected=length, received=received)
