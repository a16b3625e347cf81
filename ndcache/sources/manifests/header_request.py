"""Request the header of a safetensors file, by byte ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import ManifestError, ProtocolError, RangeError, TransferError, TruncatedError
from ...format.safetensors.header import header_end
from ...format.safetensors.headers import FileHeader
from ...http.response import Response
from ...store.metadata import FileMetadata, may_blame_condition, settled_date
from ..client import Client
from .manifest_request import NO_CACHE, NotThereError, is_web_page, not_there_or, web_page_error

__all__ = ["request_header"]

#: The first request asks for so many bytes: the headers of most files are shorter.
_GUESS_BYTES = 256 << 10
#: Enough to recognise a web page, or a pointer to a file elsewhere.
_FIRST_BYTES = 256
_RANGE = re.compile(r"(?i:bytes) ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")


def request_header(client: Client, url: str, source_url: str, name: str, known: FileHeader | None) -> FileHeader | None:
    """Request the header of a file.

    If the condition may have made the server fail, request it again without one.

    Parameters
    ----------
    client : Client
    url, source_url : str
        See `Transport.get`.
    name : str
        The file's path below the model's directory.
    known : FileHeader or None
        The header that the cache keeps.

    Returns
    -------
    FileHeader or None
        Not yet parsed. None if the file has not changed.

    Raises
    ------
    NotThereError
        The server says that there is no such file.
    ManifestError
        This is not the beginning of a safetensors file.
    TransferError
    """
    version = None if known is None else FileMetadata(0, 0, {}, known.etag, known.last_modified)
    conditions = {} if version is None else version.conditions
    try:
        answer = _ask(client, url, source_url, name, conditions)
    except TransferError as error:
        if not (conditions and may_blame_condition(error.status)):
            raise not_there_or(error) from error.__cause__
    else:
        if isinstance(answer, FileHeader):
            return answer
        if conditions and version is not None and version.is_confirmed_by(answer):
            return None
    try:
        answer = _ask(client, url, source_url, name, NO_CACHE)
    except TransferError as error:
        raise not_there_or(error) from error.__cause__
    if isinstance(answer, FileHeader):
        return answer
    raise ProtocolError("the server answered status 304 to a request without a condition", url=url, status=304)


def _ask(
    client: Client, url: str, source_url: str, name: str, headers: Mapping[str, str]
) -> FileHeader | Mapping[str, str]:
    """Return the header of a file, or the headers of a 304."""
    with client.get(url, source_url, {**headers, "Range": f"bytes=0-{_GUESS_BYTES - 1}"}) as response:
        if response.status == 304:
            return response.headers
        nbytes = _size(response, 0)
        try:
            start = _read(response, b"", name, url, _GUESS_BYTES)
            end = header_end(start, name, url)
        except ManifestError as error:
            if is_web_page(response):
                raise NotThereError(web_page_error(url, name)) from error
            raise
        etag, last_modified = response.headers.get("ETag"), settled_date(response.headers)
        sha256, strong_etag = response.linked_sha256, response.etag
    if len(start) < end and (nbytes is None or end <= nbytes):
        start = _read_rest(client, url, source_url, name, start, end, strong_etag)
    if url != source_url:  # a mirror's name for a version means nothing to the source
        return FileHeader(name, start[:end], nbytes)
    return FileHeader(name, start[:end], nbytes, sha256, etag, last_modified)


def _read_rest(client: Client, url: str, source_url: str, name: str, start: bytes, end: int, etag: str | None) -> bytes:
    """Return the file up to the end of its header; `start` is what has been received, of the version `etag`."""
    if etag is None:
        start = b""  # the next bytes may be of another version
    headers = {"Range": f"bytes={len(start)}-{end - 1}", **({} if etag is None else {"If-Range": etag})}
    with client.get(url, source_url, headers) as response:
        if response.status == 200:
            start = b""
            _size(response, 0)
        else:
            _size(response, len(start))
        data = _read(response, start, name, url, end)
    if header_end(data, name, url) != end or len(data) < end:
        raise TruncatedError("the header ended early", url=url, shard=name, expected=end, received=len(data))
    return data


def _size(response: Response, first: int) -> int | None:
    """Check that the body begins at byte `first` of the file; return the size of the file, or None if it is unknown."""
    if response.status == 200:
        return response.content_length
    if response.status == 416:
        return 0
    match = _RANGE.fullmatch(response.headers.get("Content-Range", "").strip()) if response.status == 206 else None
    if match is None or int(match[1]) != first:
        kind = RangeError if response.status == 206 else ProtocolError
        raise kind(
            f"the server answered with status {response.status} to a request for bytes {first} and on",
            url=response.url,
            status=response.status,
        )
    return None if match[3] == "*" else int(match[3])


def _read(response: Response, start: bytes, name: str, url: str, limit: int) -> bytes:
    """Read the body behind `start`: a range to its end, a whole file to the end of its header, or to the limit."""
    if response.status == 416:
        return b""  # of an empty file, there are no ranges
    data = bytearray(start)
    while len(data) < limit and (more := response.read_some(min(limit - len(data), 1 << 16))):
        data += more
        if response.status == 200 and len(data) > 8 and len(data) >= header_end(bytes(data[:_FIRST_BYTES]), name, url):
            break
    return bytes(data)
