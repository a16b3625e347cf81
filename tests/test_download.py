"""One shard from a server into the cache: what is published, what is not, and how often is asked."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from servers import Connection, Request, ScriptedServer, reply, then_close, then_reset, then_stall

import ndcache
from ndcache.cache import ArtifactCache
from ndcache.download import Downloader
from ndcache.retry import RetryPolicy
from ndcache.stats import LoadStats
from ndcache.stop import Stop
from ndcache.transport import Transport

DATA = os.urandom(100_000)
PATH = "/params_shard_0.bin"
SHARD = ndcache.Shard(
    data_path="params_shard_0.bin",
    nbytes=len(DATA),
    md5sum=hashlib.md5(DATA).hexdigest(),
    sha256sum=None,
    format="raw-shard",
    records=(),
)


@pytest.fixture
def downloader(tmp_path: Path) -> Iterator[Downloader]:
    transport = Transport(timeout=(5.0, 0.5))
    yield Downloader(
        transport,
        RetryPolicy(retries=3, backoff=0.001),
        Stop(),
        LoadStats(),
        ArtifactCache(tmp_path / "model", "http://host/"),
    )
    transport.close()


def fetched(downloader: Downloader, urls: list[str], shard: ndcache.Shard = SHARD) -> bytes:
    with downloader.shard(shard, urls, "claim") as file:
        return file.read()


def files(directory: Path) -> list[str]:
    """Everything that a reader of the directory could take for a shard, and every part."""
    found = [path for path in directory.rglob("*") if path.is_file()]
    return sorted(
        str(path.relative_to(directory))
        for path in found
        if path.parent.name != "validators" and path.suffix != ".json"
    )


def test_the_right_bytes_are_published(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script[PATH] = [reply(200, DATA, {"ETag": '"1"'})]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    assert files(downloader.cache.directory) == ["params_shard_0.bin"]
    validator = downloader.cache.validator("params_shard_0.bin")
    assert validator is not None
    assert (validator.md5, validator.etag, validator.nbytes) == (SHARD.md5sum, '"1"', SHARD.nbytes)
    assert downloader.cache.is_known(SHARD, "claim") is True
    assert (downloader.stats.network_bytes, downloader.stats.requests, downloader.stats.retries) == (100_000, 1, 0)


def test_without_a_length_the_bytes_are_counted(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script[PATH] = [then_close(reply(200, DATA, length=None))]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA


OTHER = bytes(reversed(DATA))


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
        (then_reset(reply(200, DATA[:9], length=len(DATA))), ndcache.ConnectError, 4),
        (then_stall(reply(200, DATA[:9], length=len(DATA))), ndcache.StallError, 4),
        (reply(500, b"oops"), ndcache.ServerError, 4),
        (reply(429, b"", {"Retry-After": "0"}), ndcache.RateLimitedError, 4),
        (reply(429, b"", {"Retry-After": "4000"}), ndcache.RateLimitedError, 1),
        (reply(200, DATA + b"x"), ndcache.SizeMismatchError, 2),
        (then_close(reply(200, DATA + b"x", length=None)), ndcache.SizeMismatchError, 2),
        (reply(200, DATA[:-1]), ndcache.SizeMismatchError, 2),
        (reply(200, OTHER), ndcache.ChecksumError, 2),
        (reply(206, DATA, {"Content-Range": "bytes 0-99999/100000"}), ndcache.ProtocolError, 2),
        (reply(416), ndcache.ProtocolError, 2),
        (reply(304, length=None), ndcache.ProtocolError, 2),
        (reply(200, DATA, {"Content-Encoding": "gzip"}), ndcache.ProtocolError, 2),
        (reply(404, b"gone"), ndcache.NotFoundError, 1),
        (reply(401), ndcache.AuthError, 1),
        (reply(403), ndcache.AuthError, 1),
    ],
)
def test_what_is_not_published(
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
def test_row_3_the_message_says_what_came_instead(
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
    with pytest.raises(ndcache.SizeMismatchError, match="more than there should be"):
        fetched(downloader, [scripted.url + "params_shard_0.bin"])
    # Of each of the two tries, at most one byte more than there should be was taken.
    assert downloader.stats.network_bytes <= 2 * (SHARD.nbytes + 1)


@pytest.mark.parametrize(
    "first", [reply(500), then_close(reply(200, DATA[:9], length=len(DATA))), then_reset(b""), reply(200, OTHER)]
)
def test_a_second_try_may_succeed(downloader: Downloader, scripted: ScriptedServer, first: Any) -> None:
    scripted.script[PATH] = [first, reply(200, DATA)]
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == DATA
    assert downloader.stats.retries == 1
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


def test_the_digest_in_the_message(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script[PATH] = [reply(200, OTHER)]
    with pytest.raises(ndcache.ChecksumError) as caught:
        fetched(downloader, [scripted.url + "params_shard_0.bin"])
    actual = hashlib.md5(OTHER).hexdigest()
    assert (caught.value.expected, caught.value.received) == (SHARD.md5sum, actual)
    assert actual in str(caught.value)
    assert str(SHARD.md5sum) in str(caught.value)


def test_sha256_goes_before_md5(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script[PATH] = [reply(200, DATA)]
    shard = replace(SHARD, sha256sum=hashlib.sha256(DATA).hexdigest(), md5sum="0" * 32)
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"], shard) == DATA
    with pytest.raises(ndcache.ChecksumError, match="sha256"):
        fetched(downloader, [scripted.url + "params_shard_0.bin"], replace(shard, sha256sum="0" * 64))


def test_without_digests_sizes_are_checked(downloader: Downloader, scripted: ScriptedServer) -> None:
    scripted.script[PATH] = [reply(200, OTHER), reply(200, b"short")]
    downloader = replace(downloader, digests=False)
    assert fetched(downloader, [scripted.url + "params_shard_0.bin"]) == OTHER
    with pytest.raises(ndcache.SizeMismatchError):
        fetched(downloader, [scripted.url + "params_shard_0.bin"])


class FullDisk:
    """A file on a disk with room for a few more bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, data: memoryview) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(self.room, len(data))
        self.room -= taken
        return taken


def test_row_29_a_disk_that_fills_up_takes_a_part_first(downloader: Downloader) -> None:
    with (
        pytest.raises(ndcache.DiskFullError, match="no room") as caught,
        downloader.cache.part("params_shard_0.bin") as part,
    ):
        part.file.close()
        part.file = FullDisk(room=10)  # type: ignore[assignment]
        part.write(b"12345678901")
    assert caught.value.errno == errno.ENOSPC
    assert files(downloader.cache.directory) == []
