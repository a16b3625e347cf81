"""Transfers that break off and are resumed, by the same process or another one, from the same version or none."""

from __future__ import annotations

import gzip
import hashlib
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.http.retry import RetryPolicy
from ndcache.sources.downloads.download import Downloader

from ...helpers.downloads import (
    DATA,
    ETAG,
    OTHER,
    PATH,
    REST,
    SHARD,
    WHOLE,
    broken_off,
    changed,
    fetched,
    files,
    leave_partial,
    plan,
    ranges,
    rest_of,
)
from ...helpers.servers import Connection, Request, ScriptedServer, reply, then_close, then_reset, then_stall

CHUNKED = {**ETAG, "Transfer-Encoding": "chunked"}


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(broken_off(), id="shorter than Content-Length"),
        pytest.param(
            then_close(reply(200, b"EA60\r\n" + DATA[:60_000] + b"\r\n", CHUNKED, length=None)), id="chunked body cut"
        ),
        pytest.param(then_close(reply(200, DATA[:60_000], ETAG, length=None)), id="short body without a length"),
    ],
)
def test_row_1_a_truncated_body_is_resumed(downloader: Downloader, scripted: ScriptedServer, first: Any) -> None:
    scripted.script[PATH] = [first, rest_of(DATA, 60_000)]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    assert ranges(scripted) == [WHOLE, REST]
    assert scripted.requests[1].headers["if-range"] == '"1"'
    assert (downloader.client.context.stats.network_bytes, downloader.client.context.stats.retries) == (100_000, 1)


def test_row_1_the_partial_file_of_a_failed_download_is_kept(
    downloader: Downloader, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.script[PATH] = [broken_off(), then_close(rest_of(DATA, 60_000)[:-40_000])]
    with pytest.raises(ndcache.TruncatedError, match="60,000 of 100,000") as caught:
        fetched(downloader, [scripted.url + "params_shard_0.bin"])
    assert caught.value.attempts == 4
    # Another call, as if by another process, resumes it.
    scripted.script[PATH] = [rest_of(DATA, 60_000)]
    before = len(scripted.requests)
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    assert ranges(scripted)[before:] == [REST]
    assert downloader.client.context.stats.resumed_bytes == 60_000
    assert all(seconds >= 0 for seconds in downloader.client.context.stats.seconds.values())
    assert files(downloader.cache.directory) == ["params_shard_0.bin"]


@pytest.mark.parametrize("etag", [None, 'W/"1"', "1", '"' + "x" * 300 + '"', '"a b"'])
def test_without_a_strong_etag_a_transfer_starts_over(
    downloader: Downloader, scripted: ScriptedServer, etag: str | None
) -> None:
    scripted.script[PATH] = [broken_off(etag=etag), reply(200, DATA)]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    assert ranges(scripted) == [None, None]


def test_row_3_a_body_of_another_length_than_the_manifests_is_not_read(
    downloader: Downloader, scripted: ScriptedServer
) -> None:
    scripted.script[PATH] = [reply(200, DATA + b"x", ETAG)]
    with pytest.raises(ndcache.SizeMismatchError, match="100,001 bytes where the manifest says 100,000"):
        fetched(downloader, [scripted.url + "params_shard_0.bin"])
    assert (downloader.client.context.stats.network_bytes, len(scripted.requests)) == (0, 2)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(reply(200, DATA, length=-1), id="negative length"),
        pytest.param(reply(200, DATA, length="1e5"), id="garbage length"),
        pytest.param(reply(200, DATA, {"Content-Length": "99999"}), id="two lengths"),
        pytest.param(reply(200, DATA, length="100000, 100000"), id="doubled length"),
        pytest.param(then_close(b"HTTP/1.1 two hundred OK\r\n\r\n"), id="status line"),
        pytest.param(then_close(b"nonsense\r\n\r\n"), id="not HTTP"),
        pytest.param(then_close(b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * 70_000 + b"\r\n\r\n"), id="long header"),
        pytest.param(then_close(b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 200 + b"\r\n"), id="many headers"),
    ],
)
def test_row_4_a_response_that_is_not_http_is_an_error(
    downloader: Downloader, scripted: ScriptedServer, answer: Any
) -> None:
    scripted.script[PATH] = [answer]
    with pytest.raises(ndcache.ProtocolError) as caught:
        fetched(downloader, [scripted.url + "params_shard_0.bin"])
    assert len(scripted.requests) == caught.value.attempts == 2
    assert files(downloader.cache.directory) == []


def test_row_5_a_compressed_bomb_is_not_decoded(downloader: Downloader, scripted: ScriptedServer) -> None:
    bomb = gzip.compress(bytes(50 << 20))
    scripted.script[PATH] = [reply(200, bomb, {"Content-Encoding": "gzip"})]
    tracemalloc.start()
    try:
        with pytest.raises(ndcache.ProtocolError, match="'gzip' although none was asked for"):
            fetched(downloader, [scripted.url + "params_shard_0.bin"])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert [request.headers["accept-encoding"] for request in scripted.requests] == ["identity"] * 2


def test_row_6_a_server_that_ignores_ranges_sends_the_whole_file(
    downloader: Downloader, scripted: ScriptedServer
) -> None:
    scripted.script[PATH] = [broken_off(), broken_off(80_000), reply(200, DATA, ETAG)]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    assert ranges(scripted) == [WHOLE, REST, WHOLE]  # it is not asked for a range again


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(reply(206, DATA[60_000:], ETAG), id="absent"),
        pytest.param(reply(206, DATA[60_000:], {**ETAG, "Content-Range": "bytes */100000"}), id="star"),
        pytest.param(reply(206, DATA[60_000:], {**ETAG, "Content-Range": "bytes 60000-99999/*"}), id="unknown size"),
        pytest.param(reply(206, DATA[60_000:], {**ETAG, "Content-Range": "bytes 59999-99998/100000"}), id="shifted"),
        pytest.param(reply(206, DATA[60_000:], {**ETAG, "Content-Range": "bytes 60000-99999/100001"}), id="other size"),
        pytest.param(reply(206, DATA[60_000:], {**ETAG, "Content-Range": "items 60000-99999/100000"}), id="other unit"),
        pytest.param(reply(206, DATA[60_000:], {**ETAG, "Content-Range": "bytes 60000-99999"}), id="no size"),
        pytest.param(rest_of(DATA, 60_000, **{"content-range": "bytes 0-1/100000"}), id="two of them"),
        pytest.param(rest_of(DATA, 60_000)[:-1].replace(b": 40000", b": 39999"), id="another length"),
        pytest.param(
            reply(206, b"--x\r\n\r\n", {**ETAG, "Content-Type": "multipart/byteranges; boundary=x"}), id="multipart"
        ),
    ],
)
def test_row_7_another_range_than_the_requested_one_is_not_used(
    downloader: Downloader, scripted: ScriptedServer, answer: bytes
) -> None:
    url = scripted.url + "params_shard_0.bin"
    scripted.script[PATH] = [broken_off(), answer, reply(200, DATA, ETAG)]
    assert fetched(downloader, [url]) == DATA
    assert ranges(scripted) == [WHOLE, REST, WHOLE]
    os.unlink(downloader.cache.path("params_shard_0.bin"))
    scripted.requests.clear()
    scripted.script["/always/params_shard_0.bin"] = [broken_off(), answer]
    with pytest.raises(ndcache.RangeError, match="a plain request with status 206"):
        fetched(downloader, [scripted.url + "always/params_shard_0.bin"])
    assert ranges(scripted) == [WHOLE, REST, WHOLE, WHOLE]


def test_row_8_a_transfer_starts_over_after_status_416(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script[PATH] = [broken_off(), reply(416, headers={"Content-Range": "bytes */5"}), reply(200, DATA, ETAG)]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    assert ranges(scripted) == [WHOLE, REST, WHOLE]


def test_row_8_a_complete_partial_file_is_checked_and_published(
    downloader: Downloader, scripted: ScriptedServer
) -> None:
    scripted.script[PATH] = [reply(416)]
    leave_partial(downloader.cache, scripted.url + "params_shard_0.bin", DATA)
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    assert scripted.requests == []
    assert files(downloader.cache.directory) == ["params_shard_0.bin"]


@pytest.mark.parametrize("data", [OTHER, OTHER[:60_000], DATA + b"x"])
def test_row_8_a_partial_file_with_wrong_bytes_is_deleted(
    downloader: Downloader, scripted: ScriptedServer, data: bytes
) -> None:
    """Bits may flip on the disk, for example."""
    scripted.script[PATH] = (
        [reply(200, DATA, ETAG)] if len(data) >= len(DATA) else [rest_of(DATA, 60_000), reply(200, DATA, ETAG)]
    )
    leave_partial(downloader.cache, scripted.url + "params_shard_0.bin", data)
    downloader = changed(downloader, policy=RetryPolicy(retries=0))  # the server is not at fault
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    assert files(downloader.cache.directory) == ["params_shard_0.bin"]


@pytest.mark.parametrize("digests", [True, False])
def test_row_25_a_partial_file_from_before_a_power_loss_needs_a_digest(
    downloader: Downloader, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, digests: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ndcache.store.partials.note.boot_id", lambda: "another start of the system")
        leave_partial(downloader.cache, scripted.url + "params_shard_0.bin", bytes(60_000))
    scripted.script[PATH] = [rest_of(DATA, 60_000), reply(200, DATA, ETAG)] if digests else [reply(200, DATA, ETAG)]
    downloader = changed(downloader, verify="download" if digests else "never")
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    assert ranges(scripted) == ([REST, WHOLE] if digests else [WHOLE])


@pytest.mark.parametrize("kept", ["content", "etag", "url", "note", "boot"])
def test_partial_files_of_other_content_are_not_used(
    downloader: Downloader, scripted: ScriptedServer, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = scripted.url + "params_shard_0.bin"
    old, shard = bytes(60_000), replace(SHARD, md5sum=None)  # nothing but the rules would notice what is wrong
    if kept == "boot":
        monkeypatch.setattr("ndcache.store.partials.note.boot_id", lambda: "another start of the system")
    leave_partial(
        downloader.cache,
        url + "x" if kept == "url" else url,
        old,
        '"0"' if kept == "etag" else '"1"',
        "another claim" if kept == "content" else "content",
    )
    monkeypatch.undo()
    if kept == "note":
        for path in (downloader.cache.directory / ".ndcache" / "parts").glob("*.json"):
            path.write_bytes(b"{")

    def answer(connection: Connection, request: Request) -> None:
        """Respond as a server that follows the rules and has the version "1"."""
        asked = "range" in request.headers and request.headers.get("if-range") == '"1"'
        connection.send(rest_of(DATA, 60_000) if asked else reply(200, DATA, ETAG))

    scripted.script[PATH] = [answer]
    assert fetched(downloader, [url], shard) == DATA


def test_row_9_a_file_that_changes_starts_over(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script[PATH] = [broken_off(data=OTHER), reply(200, DATA, {"ETag": '"2"'})]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"], replace(SHARD, md5sum=None)) == DATA
    assert ranges(scripted) == [WHOLE, REST]


@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_row_9_a_file_that_keeps_changing_is_an_error(
    downloader: Downloader, scripted: ScriptedServer, ignores_if_range: bool
) -> None:
    def changing(connection: Connection, request: Request) -> None:
        etag = f'"{len(scripted.requests)}"'
        if ignores_if_range and "range" in request.headers:
            connection.send(rest_of(OTHER, 60_000, etag))
        else:
            connection.send(reply(200, DATA[:60_000], {"ETag": etag}, length=len(DATA)))

    scripted.script[PATH] = [changing]
    with pytest.raises(ndcache.RemoteChangedError, match="and again") as caught:
        fetched(downloader, [scripted.url + "params_shard_0.bin"], replace(SHARD, md5sum=None))
    assert caught.value.retryable
    assert ranges(scripted) == ([WHOLE, REST, WHOLE, REST] if ignores_if_range else [WHOLE, REST, REST])
    assert files(downloader.cache.directory) == []


@pytest.mark.parametrize("answer", [reply(200, DATA, {"ETag": '"2"'}), reply(416), reply(206, DATA, ETAG)])
def test_a_useless_partial_file_costs_no_attempt(
    downloader: Downloader, scripted: ScriptedServer, answer: bytes
) -> None:
    """Another process left it: it must not make a download without retries fail."""
    leave_partial(downloader.cache, scripted.url + "params_shard_0.bin", OTHER[:60_000])
    scripted.script[PATH] = [answer, reply(200, DATA, {"ETag": '"2"'})]
    downloader = changed(downloader, policy=RetryPolicy(retries=0))
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA


def test_row_9_a_range_of_another_version_is_not_used(downloader: Downloader, scripted: ScriptedServer) -> None:
    """The server ignores If-Range, and the ETag of its 206 is that of another version."""
    scripted.script[PATH] = [broken_off(data=OTHER), rest_of(DATA, 60_000, '"2"'), reply(200, DATA, {"ETag": '"2"'})]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"], replace(SHARD, md5sum=None)) == DATA


def test_row_10_content_that_changes_under_one_etag_is_a_checksum_error(
    downloader: Downloader, scripted: ScriptedServer
) -> None:
    mixed = OTHER[:60_000] + DATA[60_000:]
    scripted.script[PATH] = [broken_off(data=OTHER), rest_of(DATA, 60_000), reply(200, DATA, ETAG)]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    os.unlink(downloader.cache.path("params_shard_0.bin"))
    scripted.script[PATH] = [reply(200, mixed, ETAG)]
    with pytest.raises(ndcache.ChecksumError) as caught:
        fetched(downloader, [scripted.url + "params_shard_0.bin"])
    for digest in (hashlib.md5(mixed).hexdigest(), str(SHARD.md5sum)):
        assert digest in str(caught.value)
    assert caught.value.attempts == 2


@pytest.mark.parametrize("first", [then_reset, then_close, then_stall])
def test_row_12_a_broken_connection_loses_no_received_bytes(
    downloader: Downloader, scripted: ScriptedServer, first: Any
) -> None:
    """The client may lose bytes that the reset overtook, and asks for all that it does not have."""
    data = os.urandom(9 << 20)
    shard = replace(SHARD, nbytes=len(data), md5sum=hashlib.md5(data).hexdigest())

    def answer(connection: Connection, request: Request) -> None:
        if start := int(request.headers.get("range", "bytes=0-").partition("=")[2].partition("-")[0]):
            connection.send(rest_of(data, start))
        else:
            first(reply(200, data[: 6 << 20], ETAG, length=len(data)))(connection, request)

    scripted.script[PATH] = [answer]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"], shard) == data
    assert downloader.client.context.stats.network_bytes == len(data)


def test_row_12_each_mebibyte_of_progress_renews_the_retries(downloader: Downloader, scripted: ScriptedServer) -> None:
    """The connection breaks nine times, after a mebibyte each, with three retries allowed."""
    data = os.urandom(10 << 20)
    shard = replace(SHARD, nbytes=len(data), md5sum=hashlib.md5(data).hexdigest())

    def answer(connection: Connection, request: Request) -> None:
        start = int(request.headers.get("range", "bytes=0-").partition("=")[2].partition("-")[0])
        whole = rest_of(data, start) if start else reply(200, data, ETAG)
        connection.send(whole[: len(whole) - (len(data) - start) + (1 << 20)])

    scripted.script[PATH] = [answer]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"], shard) == data
    assert (len(scripted.requests), downloader.client.context.stats.network_bytes) == (10, len(data))


def test_row_12_the_same_bytes_again_are_no_progress(downloader: Downloader, scripted: ScriptedServer) -> None:
    """The server sends two mebibytes each time, always the same ones."""
    data = os.urandom(3 << 20)
    scripted.script[PATH] = [then_close(reply(200, data[: 2 << 20], length=len(data)))]
    with pytest.raises(ndcache.TruncatedError):
        fetched(downloader, [scripted.url + "params_shard_0.bin"], replace(SHARD, nbytes=len(data)))
    assert len(scripted.requests) == 4


def test_row_12_a_server_that_stops_listening_is_tried_again(downloader: Downloader, scripted: ScriptedServer) -> None:
    url = scripted.url + "params_shard_0.bin"
    with pytest.raises(ndcache.NotFoundError):
        fetched(downloader, [url])
    scripted.close()
    with pytest.raises(ndcache.ConnectError, match="refuses connections") as caught:
        fetched(downloader, [url])
    assert caught.value.attempts == 4


def test_row_6_a_web_page_in_place_of_the_rest_keeps_the_partial_file(
    downloader: Downloader, scripted: ScriptedServer
) -> None:
    """A hotel's network may answer with its login page."""
    page = reply(200, b"<html>Welcome!</html>", {"Content-Type": "text/html"})
    scripted.script[PATH] = [broken_off(), page]
    with pytest.raises(ndcache.SizeMismatchError, match="web page"):
        fetched(downloader, [scripted.url + "params_shard_0.bin"])
    scripted.script[PATH] = [rest_of(DATA, 60_000)]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    assert ranges(scripted)[-1] == REST


def test_a_mirror_does_not_resume_the_sources_transfer(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script["/bad/params_shard_0.bin"] = [broken_off(data=OTHER), reply(404)]
    scripted.script["/good/params_shard_0.bin"] = [reply(200, DATA, ETAG)]
    urls = [f"{scripted.url}{where}/params_shard_0.bin" for where in ("bad", "good")]
    assert fetched(downloader, urls, replace(SHARD, md5sum=None)) == DATA
    assert ranges(scripted) == [WHOLE, REST, WHOLE]


# --- partial files of other processes -----------------------------------------------------------------


def test_the_longest_of_several_partial_files_is_used(downloader: Downloader, scripted: ScriptedServer) -> None:
    url = scripted.url + "params_shard_0.bin"
    for nbytes in (10, 60_000, 500):
        leave_partial(downloader.cache, url, DATA[:nbytes])
    scripted.script[PATH] = [rest_of(DATA, 60_000)]
    assert fetched(downloader, [url]) == DATA
    assert files(downloader.cache.directory) == ["params_shard_0.bin"]


@pytest.mark.parametrize("is_exclusive", [False, True])
def test_a_partial_file_with_a_writer_is_copied_and_kept(
    downloader: Downloader, scripted: ScriptedServer, is_exclusive: bool
) -> None:
    url = scripted.url + "params_shard_0.bin"
    with downloader.cache.partials.create("params_shard_0.bin") as theirs:
        theirs.set_source(url, '"1"', "content", None)
        theirs.write(DATA[:60_000])

        def answer(connection: Connection, request: Request) -> None:
            assert theirs.path.exists() is not is_exclusive
            theirs.write(b"their own business")
            connection.send(rest_of(DATA, 60_000))

        scripted.script[PATH] = [answer]
        file = downloader.download_shard(plan([url]), is_exclusive=is_exclusive).file
        assert file is not None
        with file:
            assert file.read() == DATA
    assert files(downloader.cache.directory) == ["params_shard_0.bin"]


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo"])
def test_row_30_a_planted_partial_file_is_not_read(
    downloader: Downloader, scripted: ScriptedServer, tmp_path: Path, kind: str
) -> None:
    url = scripted.url + "params_shard_0.bin"
    leave_partial(downloader.cache, url, DATA[:60_000])
    (partial,) = (p for p in (downloader.cache.directory / ".ndcache" / "parts").iterdir() if p.suffix != ".json")
    partial.unlink()
    victim = tmp_path / "victim"
    victim.write_bytes(OTHER[:60_000])
    if kind == "symlink":
        partial.symlink_to(victim)
    elif kind == "directory":
        partial.mkdir()
    else:
        os.mkfifo(partial)
    scripted.script[PATH] = [reply(200, DATA, ETAG)]
    assert fetched(downloader, [url], replace(SHARD, md5sum=None)) == DATA
    assert ranges(scripted) == [WHOLE]
    assert victim.read_bytes() == OTHER[:60_000]
