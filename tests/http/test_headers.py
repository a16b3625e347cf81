"""Header fields of hostile servers: only valid ones are believed, and all errors are ours."""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Iterator

import pytest
import requests
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ndcache
from ndcache.http.response import Response
from ndcache.http.translate import raise_for_status
from ndcache.http.transport import Transport
from ndcache.workers.cancellation import Cancellation
from ndcache.workers.stall import StallWatch

from ..helpers.servers import ScriptedServer, then_close

#: What a header field can hold when http.client has parsed it.
TEXTS = st.text(st.characters(min_codepoint=1, max_codepoint=255, exclude_characters="\r\n"), max_size=60)
NUMBERS = st.one_of(
    st.integers(0, 200).map(str),
    st.integers(-(10**30), 10**30).map(str),
    st.sampled_from(["", "*", "+1", "-0", "00", "0x1", "1_0", "1e3", "1.0", " 1", "٣", "²", "9" * 5000]),
)
CONTENT_RANGES = st.one_of(
    TEXTS,
    st.builds(
        "{}{}{}-{}{}{}".format,
        st.sampled_from(["bytes", "Bytes", "byte", "bytes=", "items", ""]),
        st.sampled_from([" ", "", "  ", "\t", "="]),
        NUMBERS,
        NUMBERS,
        st.sampled_from(["/", "", "//", " / "]),
        NUMBERS,
    ),
)


def response(**headers: str) -> Response:
    raw = requests.Response()
    raw.status_code, raw.url = 206, "http://host/"
    raw.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    return Response(raw, Cancellation(), StallWatch(timeout=1))


@given(CONTENT_RANGES, st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
@example("bytes 5-9/10", 5, 10, 10)
@example("bytes 5-9/20", 5, 10, 20)
@example("bytes 05-9/10", 5, 10, 10)
@example("bytes 5-9/10,bytes 5-9/10", 5, 10, 10)
@example("bytes 5-9/10\n", 5, 10, 10)
@example("bytes \u0665-9/10", 5, 10, 10)
def test_row_7_only_the_exact_content_range_is_believed(text: str, start: int, end: int, size: int) -> None:
    believed = response(Content_Range=text).is_range(start, end, size)
    if believed:
        unit, _, numbers = text.strip().partition(" ")
        first, last, total = numbers.replace("/", "-").split("-")
        assert (unit.lower(), int(first), int(last), int(total)) == ("bytes", start, end - 1, size)
    if text == f"bytes {start}-{end - 1}/{size}":
        assert believed or end == 0


@given(TEXTS | NUMBERS)
@example("100, 100")
def test_row_4_any_content_length_is_a_number_or_an_error(text: str) -> None:
    if text.isascii() and text.isdigit() and len(text) < 20:
        assert response(Content_Length=text).content_length == int(text)
    else:
        with pytest.raises(ndcache.ProtocolError, match="Content-Length"):
            assert response(Content_Length=text).content_length


@given(TEXTS | TEXTS.map('"{}"'.format) | TEXTS.map('W/"{}"'.format))
def test_an_etag_can_be_sent_back(text: str) -> None:
    etag = response(ETag=text).etag
    assert etag is None or (etag == text.strip() and etag.isascii() and etag.isprintable() and " " not in etag)


@given(st.integers(100, 999), st.dictionaries(st.sampled_from(["Retry-After", "Content-Encoding"]), TEXTS | NUMBERS))
@example(503, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 -9999"})
@example(429, {"Retry-After": "Fri, 99 Foo 2020 99:99:99 GMT"})
def test_row_14_any_status_and_headers_give_a_response_or_our_error(status: int, headers: dict[str, str]) -> None:
    fields = requests.structures.CaseInsensitiveDict(headers)
    encoding = headers.get("Content-Encoding", "").replace(",", " ").lower().split()
    if status in (304, 416) or (status in (200, 206) and set(encoding) <= {"identity"}):
        raise_for_status(status, fields, "http://host/")
        return
    with pytest.raises(ndcache.TransferError) as caught:
        raise_for_status(status, fields, "http://host/")
    if isinstance(caught.value, ndcache.RateLimitedError):
        assert caught.value.retry_after is None or 0 <= caught.value.retry_after < 1e12


# --- over a socket ------------------------------------------------------------------------------------

FIELDS = st.builds(
    "{}: {}".format,
    st.sampled_from(
        [
            "Content-Length",
            "Transfer-Encoding",
            "Location",
            "ETag",
            "Content-Range",
            "Set-Cookie",
            "Connection",
            "X",
            "",
        ]
    ),
    TEXTS | NUMBERS | st.sampled_from(["chunked", "http://[::1", "//", "file:///etc/passwd", "keep-alive", "close"]),
)
STATUS_LINES = st.one_of(
    st.sampled_from(
        ["HTTP/1.1 200 OK", "HTTP/1.1 206 P", "HTTP/1.0 304", "HTTP/1.1 302 F", "HTTP/1.1 100 C", "HTTP/2"]
    ),
    TEXTS,
)
HEADS = st.builds(
    lambda first, fields, end: "\r\n".join([first, *fields]).encode("utf-8") + end,
    STATUS_LINES,
    st.lists(FIELDS, max_size=5),
    st.sampled_from([b"\r\n\r\n", b"\n\n", b"", b"\r\n\r\nabcdef", b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n"]),
)


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


def test_row_4_a_refused_response_leaves_no_socket_open(server: ScriptedServer) -> None:
    server.script = {"/": [then_close(b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\nConnection: close\r\n\r\nabc")]}
    gc.collect()
    with warnings.catch_warnings(record=True) as caught, contextlib.closing(Transport(timeout=(5.0, 5.0))) as transport:
        warnings.simplefilter("always")
        with pytest.raises(ndcache.ProtocolError):
            transport.get(server.url, {}, Cancellation())
        gc.collect()
    assert caught == []


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(HEADS | st.binary(max_size=200))
@example(b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551616\r\n\r\nabc")
@example(b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n")
@example(os.urandom(1 << 17))
def test_row_4_any_bytes_of_a_server_give_a_response_or_our_error(server: ScriptedServer, data: bytes) -> None:
    """The result is a response that can be read to its end, or one of our errors, and comes without waiting."""
    server.script = {"/": [then_close(data)]}
    with (
        contextlib.closing(Transport(timeout=(5.0, 5.0))) as transport,
        contextlib.suppress(ndcache.TransferError),
        transport.get(server.url, {}, Cancellation()) as answer,
    ):
        assert answer.status in (200, 206, 304, 416)
        assert len(answer.read(1 << 18)) <= 1 << 18
