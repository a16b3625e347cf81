"""Decoding of bodies that a server encoded although it was asked not to."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

from ..errors import ProtocolError, TruncatedError

if TYPE_CHECKING:
    from zlib import _Decompress

__all__ = ["decode_body", "encoding_of"]

#: The most bytes to decode in one step.
_STEP_BYTES = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"


def encoding_of(header: str | None) -> str:
    """Return the codings of a Content-Encoding header in lower case, or an empty string if there is none."""
    codings = [coding.strip().lower() for coding in (header or "").split(",")]
    return ", ".join(coding for coding in codings if coding not in ("", "identity"))


def decode_body(chunks: Iterator[bytes], encoding: str, limit: int, check: Callable[[], None], url: str) -> bytes:
    """Decode a body as it comes, and stop as soon as it is longer than `limit` bytes.

    Parameters
    ----------
    chunks : iterator of bytes
        The body as the server sends it. No more chunks are taken than needed.
    encoding : str
        See `encoding_of`.
    limit : int
        The most bytes that the decoded body may have.
    check : callable
        Called after each MiB; may raise to end the decoding.
    url : str
        For messages.

    Raises
    ------
    ProtocolError
        The encoding is unknown, or the body is damaged.
    TruncatedError
        The body ended early.
    """
    if not encoding:
        steps = chunks
    elif encoding in ("gzip", "x-gzip"):
        steps = _gunzip(chunks)
    elif encoding == "deflate":
        steps = _inflate(chunks)
    else:
        raise ProtocolError(
            f"the server sent a body encoded as {encoding[:40]!r}, which cannot be decoded",
            url=url,
            hint="Let the server send the file as it is, or with gzip.",
        )
    body = bytearray()
    try:
        for step in steps:
            check()
            body += step
            if len(body) > limit:
                break
    except zlib.error as error:
        raise ProtocolError(f"the {encoding} body of the response is damaged", url=url) from error
    except EOFError as error:
        raise TruncatedError(f"the {encoding} body of the response ended early", url=url) from error
    return bytes(body)


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decode one or more members of gzip, and ignore the padding after the last one (RFC 1952, 2.2)."""
    rest = yield from _decompressed(zlib.decompressobj(wbits=31), next(chunks, b""), chunks)
    while True:
        while len(rest) < len(_GZIP_MAGIC) and (more := next(chunks, b"")):
            rest += more
        if not rest.startswith(_GZIP_MAGIC):
            return
        rest = yield from _decompressed(zlib.decompressobj(wbits=31), rest, chunks)


def _inflate(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decode zlib's format, which "deflate" means, or the raw one, which some servers send (RFC 9110, 8.4.1.2)."""
    start = next(chunks, b"")
    while len(start) < 2 and (more := next(chunks, b"")):
        start += more
    is_zlib = start[:1] and start[0] & 0x0F == 8 and int.from_bytes(start[:2], "big") % 31 == 0
    yield from _decompressed(zlib.decompressobj(wbits=15 if is_zlib else -15), start, chunks)


def _decompressed(decoder: _Decompress, data: bytes, chunks: Iterator[bytes]) -> Generator[bytes, None, bytes]:
    """Yield the decoded bytes of `data` and `chunks` step by step, and return what follows their end."""
    while not decoder.eof:
        if decoded := decoder.decompress(data, _STEP_BYTES):
            yield decoded
        data = decoder.unconsumed_tail
        if not data and not decoder.eof and not decoded:
            data = next(chunks, b"")
            if not data:
                raise EOFError
    return decoder.unused_data
