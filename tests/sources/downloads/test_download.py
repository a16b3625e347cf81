"""Downloads of one shard into the cache: what is published, what is refused, and how often the server is asked."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import replace
from typing import Any

import pytest

import ndcache
from ndcache.sources.downloads.download import Downloader
from ndcache.store.metadata import Match

from ...helpers.downloads import DATA, ETAG, OTHER, PATH, SHARD, broken_off, changed, fetched, files, rest_of
from ...helpers.servers import Connection, Request, ScriptedServer, reply, then_close, then_reset, then_stall


def test_the_right_bytes_are_published(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script[PATH] = [reply(200, DATA, {"ETag": '"1"'})]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    assert files(downloader.cache.directory) == ["params_shard_0.bin"]
    metadata = downloader.cache.metadata("params_shard_0.bin")
    assert metadata is not None
    assert (metadata.digests["md5"], metadata.etag, metadata.nbytes) == (SHARD.md5sum, '"1"', SHARD.nbytes)
    assert downloader.cache.compare(SHARD, "content") is Match.SAME
    stats = downloader.client.context.stats
    assert (stats.network_bytes, stats.requests, stats.retries) == (100_000, 1, 0)


def test_a_body_without_a_length_is_counted(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script[PATH] = [then_close(reply(200, DATA, length=None))]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA


@pytest.mark.parametrize(
    ("answer", "error", "tries"),
    [
        (then_close(reply(200, DATA[:-1], length=len(DATA))), ndcache.TruncatedError, 4),
        (then_close(reply(200, DATA[:-1], length=None)), ndcache.TruncatedError, 4),
        (
            then_close(reply(200, b"186A0\r\nabc", {"Transfer-Encoding": "chunked"}, length=None)),
            ndcache.TruncatedError,
            4,
        ),
        (then_close(reply(200, b"zz\r\n", {"Transfer-Encoding": "chunked"}, length=None)), ndcache.TruncatedError, 4),
        (then_reset(reply(200, DATA[:9], length=len(DATA))), ndcache.ConnectError, 4),
        (then_stall(reply(200, DATA[:9], length=len(DATA))), ndcache.StallError, 4),
        (reply(500, b"oops"), ndcache.ServerError, 4),
        (reply(429, b"", {"Retry-After": "0"}), ndcache.RateLimitedError, 4),
        (reply(429, b"", {"Retry-After": "4000"}), ndcache.RateLimitedError, 1),
        (reply(200, DATA + b"x"), ndcache.SizeMismatchError, 2),
        (then_close(reply(200, DATA + b"x", length=None)), ndcache.SizeMismatchError, 2),
        (reply(200, DATA[:-1]), ndcache.SizeMismatchError, 2),
        (reply(200, OTHER), ndcache.ChecksumError, 2),
        (reply(206, DATA, {"Content-Range": "bytes 0-99999/100000"}), ndcache.RangeError, 2),
        (reply(416), ndcache.RangeError, 2),
        (reply(304, length=None), ndcache.ProtocolError, 2),
        (reply(200, DATA, {"Content-Encoding": "gzip"}), ndcache.ProtocolError, 2),
        (reply(404, b"gone"), ndcache.NotFoundError, 1),
        (reply(401), ndcache.AuthError, 1),
        (reply(403), ndcache.AuthError, 1),
    ],
)
def test_a_wrong_response_is_not_published(
    downloader: Downloader, scripted: ScriptedServer, answer: Any, error: type[ndcache.NdcacheError], tries: int
) -> None:
    scripted.script[PATH] = [answer]
    with pytest.raises(error) as caught:
        fetched(downloader, [scripted.url + "params_shard_0.bin?signature=secret"])
    assert type(caught.value) is error
    assert len(scripted.requests) == tries == caught.value.attempts
    assert files(downloader.cache.directory) == []
    message = str(caught.value)
    assert "params_shard_0.bin" in message
    assert scripted.url in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("headers", "body", "hint"),
    [
        ({"Content-Type": "text/html; charset=utf-8"}, b"<!doctype html>", "web page"),
        ({}, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100000\n", "git-lfs"),
        ({}, b"x", "different versions"),
    ],
)
def test_row_3_the_error_guesses_what_the_server_sent_instead(
    downloader: Downloader, scripted: ScriptedServer, headers: dict[str, str], body: bytes, hint: str
) -> None:
    scripted.script[PATH] = [reply(200, body, headers)]
    with pytest.raises(ndcache.SizeMismatchError, match=hint) as caught:
        fetched(downloader, [scripted.url + "params_shard_0.bin"])
    assert (caught.value.expected, caught.value.received) == (100_000, len(body))


def test_row_2_an_endless_body_is_cut_off(downloader: Downloader, scripted: ScriptedServer) -> None:
    def endless(connection: Connection, request: Request) -> None:
        connection.send(reply(200, length=None))
        while True:  # until the client hangs up
            connection.send(DATA)

    scripted.script[PATH] = [endless]
    with pytest.raises(ndcache.SizeMismatchError, match="more bytes than expected"):
        fetched(downloader, [scripted.url + "params_shard_0.bin"])
    # Each of the two attempts received at most one byte more than expected.
    assert downloader.client.context.stats.network_bytes <= 2 * (SHARD.nbytes + 1)


@pytest.mark.parametrize(
    "first", [reply(500), then_close(reply(200, DATA[:9], length=len(DATA))), then_reset(b""), reply(200, OTHER)]
)
def test_a_second_attempt_may_succeed(downloader: Downloader, scripted: ScriptedServer, first: Any) -> None:
    scripted.script[PATH] = [first, reply(200, DATA)]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    assert downloader.client.context.stats.retries == 1
    assert files(downloader.cache.directory) == ["params_shard_0.bin"]


def test_mirrors_are_tried_in_turn(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script["/gone/params_shard_0.bin"] = [reply(404)]
    scripted.script["/bad/params_shard_0.bin"] = [reply(200, OTHER)]
    scripted.script["/good/params_shard_0.bin"] = [reply(200, DATA)]
    urls = [f"{scripted.url}{where}/params_shard_0.bin" for where in ("gone", "bad", "good")]
    assert fetched(downloader, urls) == DATA
    with pytest.raises(ndcache.NotFoundError) as caught:
        fetched(downloader, urls[:2])
    assert [type(error) for error in caught.value.others] == [ndcache.ChecksumError]


def test_a_checksum_error_has_both_digests(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script[PATH] = [reply(200, OTHER)]
    with pytest.raises(ndcache.ChecksumError) as caught:
        fetched(downloader, [scripted.url + "params_shard_0.bin"])
    actual = hashlib.md5(OTHER).hexdigest()
    assert (caught.value.expected, caught.value.received) == (SHARD.md5sum, actual)
    assert actual in str(caught.value)
    assert str(SHARD.md5sum) in str(caught.value)


def test_every_known_digest_is_compared(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script[PATH] = [reply(200, DATA)]
    shard = replace(SHARD, sha256sum=hashlib.sha256(DATA).hexdigest())
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"], shard) == DATA
    with pytest.raises(ndcache.ChecksumError, match="md5"):
        fetched(downloader, [scripted.url + "params_shard_0.bin"], replace(shard, md5sum="0" * 32))
    with pytest.raises(ndcache.ChecksumError, match="sha256"):
        fetched(downloader, [scripted.url + "params_shard_0.bin"], replace(shard, sha256sum="0" * 64))


def test_without_digests_only_sizes_are_compared(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script[PATH] = [reply(200, OTHER), reply(200, b"short")]
    downloader = changed(downloader, verify="never")
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == OTHER
    with pytest.raises(ndcache.SizeMismatchError):
        fetched(downloader, [scripted.url + "params_shard_0.bin"])


# --- the server's own digests -------------------------------------------------------------------------


def test_hugging_faces_sha256_is_compared(downloader: Downloader, scripted: ScriptedServer) -> None:
    def linked(data: bytes) -> bytes:
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return reply(302, headers={"Location": "/storage/shard", "X-Linked-Etag": etag, "X-Linked-Size": "100000"})

    scripted.script["/storage/shard"] = [broken_off(), rest_of(DATA, 60_000), reply(200, DATA, ETAG)]
    scripted.script[PATH] = [linked(DATA), linked(DATA), linked(OTHER)]
    shard = replace(SHARD, md5sum=None)
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"], shard) == DATA
    metadata = downloader.cache.metadata("params_shard_0.bin")
    assert metadata is not None
    assert metadata.digests == {"sha256": hashlib.sha256(DATA).hexdigest()}
    with pytest.raises(ndcache.ChecksumError, match="sha256"):
        fetched(downloader, [scripted.url + "params_shard_0.bin"], shard)


def test_hugging_faces_sha256_is_compared_without_an_etag_too(downloader: Downloader, scripted: ScriptedServer) -> None:
    etag = f'"{hashlib.sha256(DATA).hexdigest()}"'
    scripted.script["/storage/shard"] = [reply(200, OTHER)]  # without an ETag nobody goes on from there
    scripted.script[PATH] = [reply(302, headers={"Location": "/storage/shard", "X-Linked-Etag": etag})]
    with pytest.raises(ndcache.ChecksumError, match="sha256"):
        fetched(downloader, [scripted.url + "params_shard_0.bin"], replace(SHARD, md5sum=None))


def test_a_digest_from_a_redirect_target_is_ignored(downloader: Downloader, scripted: ScriptedServer) -> None:
    other = ScriptedServer()
    try:
        other.script["/shard"] = [reply(200, DATA, {"X-Linked-Etag": f'"{"0" * 64}"'})]
        scripted.script[PATH] = [reply(302, headers={"Location": other.url + "shard"})]
        assert fetched(downloader, [scripted.url + "params_shard_0.bin"], replace(SHARD, md5sum=None)) == DATA
    finally:
        other.close()


def test_a_required_digest_is_compared_beside_the_manifests(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script[PATH] = [reply(200, DATA)]
    pin = ("sha512", hashlib.sha512(DATA).hexdigest())
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"], replace(SHARD, required_digest=pin)) == DATA
    with pytest.raises(ndcache.ChecksumError, match="sha384"):
        fetched(downloader, [scripted.url + "params_shard_0.bin"], replace(SHARD, required_digest=("sha384", "0" * 96)))
    with pytest.raises(ndcache.ChecksumError, match="md5"):
        fetched(downloader, [scripted.url + "params_shard_0.bin"], replace(SHARD, required_digest=pin, md5sum="0" * 32))


def test_a_url_that_failed_is_not_tried_first_again(downloader: Downloader, scripted: ScriptedServer) -> None:
    """The source fails at the first shard; the next ones are requested from the mirror first."""
    scripted.script["/bad/params_shard_0.bin"] = [reply(503)]
    scripted.script["/good/params_shard_0.bin"] = [reply(200, DATA)]
    urls = [f"{scripted.url}{where}/params_shard_0.bin" for where in ("bad", "good")]
    for _ in range(3):
        assert fetched(downloader, urls) == DATA
    assert [request.path.split("/")[1] for request in scripted.requests] == [*["bad"] * 4, *["good"] * 3]


# --- the disk -----------------------------------------------------------------------------------------


def test_row_29_a_disk_that_fills_up_may_write_less_than_asked(
    downloader: Downloader, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 10

    def write(handle: int, data: memoryview, start: int) -> int:
        if start >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return min(room - start, len(data))

    monkeypatch.setattr(os, "pwrite", write)
    with (
        pytest.raises(ndcache.DiskFullError, match="no room") as caught,
        downloader.cache.partials.create("params_shard_0.bin") as partial,
    ):
        partial.write(b"12345678901")
    assert caught.value.errno == errno.ENOSPC
    assert files(downloader.cache.directory) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_row_29_a_file_that_could_not_be_synced_is_not_resumed(
    downloader: Downloader, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """After a failed fsync, the system may discard what it could not write."""

    def fail(handle: int) -> None:
        raise OSError(number, "lost")

    scripted.script[PATH] = [reply(200, DATA, ETAG)]
    with monkeypatch.context() as patch, pytest.raises(ndcache.CacheError):
        patch.setattr(os, "fsync", fail)
        fetched(downloader, [scripted.url + "params_shard_0.bin"])
    assert files(downloader.cache.directory) == []


def test_a_mirrors_etag_is_not_noted(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script["/bad/params_shard_0.bin"] = [reply(404)]
    scripted.script["/good/params_shard_0.bin"] = [reply(200, DATA, ETAG)]
    urls = [f"{scripted.url}{where}/params_shard_0.bin" for where in ("bad", "good")]
    for some, etag in ((urls, None), (urls[1:], '"1"')):
        assert fetched(downloader, some) == DATA
        metadata = downloader.cache.metadata("params_shard_0.bin")
        assert metadata is not None
        assert metadata.etag == etag
