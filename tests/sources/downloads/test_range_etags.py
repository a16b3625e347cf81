"""Servers whose ranges do not tell their version: the file comes as one stream, and no versions are mixed."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache.sources.downloads import download

from ...helpers.servers import Connection, Request, ScriptedServer, reply

SIZE = 1 << 20
#: The ETag of ranges, if they have one.
ETAGS = {"none": None, "weak": 'W/"1"', "another": '"1-range"', "unreadable": '"1', "of each range": '"1-{first}"'}


class Server:
    """Serve one shard: whole bodies with a strong ETag, the first ones truncated; ranges with the ETag `of_ranges`."""

    def __init__(self, scripted: ScriptedServer, data: bytes, of_ranges: str | None, breaks: int) -> None:
        self.data, self.of_ranges, self.breaks = data, of_ranges, breaks
        self.scripted = scripted
        scripted.script["/a.bin"] = [self.answer]

    def answer(self, connection: Connection, request: Request) -> None:
        data, asked = self.data, request.headers.get("range")
        if asked is None:
            self.breaks -= 1
            connection.send(
                reply(200, data if self.breaks < 0 else data[: SIZE // 2], {"ETag": '"1"'}, length=len(data))
            )
            return
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        if self.of_ranges is not None:
            headers["ETag"] = self.of_ranges.format(first=first)
        connection.send(reply(206, bytes(last + 1 - first), headers))  # of another version: zeros

    @property
    def whole(self) -> int:
        """Return how often the whole file was requested."""
        return sum("range" not in request.headers for request in self.scripted.requests_for("/a.bin"))


def manifest(data: bytes, tensors: int = 1, *, md5: bool = True) -> bytes:
    size = len(data) // tensors
    records = [
        {"name": f"t{i}", "shape": [size], "dtype": "uint8", "format": "raw", "byteOffset": i * size, "nbytes": size}
        for i in range(tensors)
    ]
    shard: dict[str, Any] = {"dataPath": "a.bin", "format": "raw-shard", "nbytes": len(data), "records": records}
    if md5:
        shard["md5sum"] = hashlib.md5(data).hexdigest()
    return json.dumps({"records": [shard]}).encode()


@pytest.mark.parametrize("breaks", [1, 3])
@pytest.mark.parametrize("case", ETAGS)
def test_row_52_a_truncated_transfer_starts_over(scripted: ScriptedServer, case: str, breaks: int) -> None:
    data = os.urandom(SIZE)
    server = Server(scripted, data, ETAGS[case], breaks)
    scripted.script["/tensor-cache.json"] = [reply(200, manifest(data, md5=False))]
    policy = ndcache.RetryPolicy(retries=3, backoff=0.001)
    assert np.asarray(ndcache.load(scripted.url, retries=policy)["t0"]).tobytes() == data
    assert server.whole == breaks + 1
    assert len(scripted.requests_for("/a.bin")) <= breaks + 2  # one range, and no other one after it


@pytest.mark.parametrize("case", ["none", "weak", "unreadable"])
@pytest.mark.parametrize("breaks", [0, 2])
def test_row_52_a_large_shard_comes_as_one_stream(
    monkeypatch: pytest.MonkeyPatch, scripted: ScriptedServer, case: str, breaks: int
) -> None:
    monkeypatch.setattr(download, "RANGE_THRESHOLD", SIZE // 2)
    monkeypatch.setattr(download, "RANGE_BYTES", (SIZE // 8, SIZE // 8))
    data = os.urandom(SIZE)
    server = Server(scripted, data, ETAGS[case], breaks)
    scripted.script["/tensor-cache.json"] = [reply(200, manifest(data))]
    policy = ndcache.RetryPolicy(retries=3, backoff=0.001)
    assert np.asarray(ndcache.load(scripted.url, retries=policy)["t0"]).tobytes() == data
    assert server.whole == breaks + 1
    assert len(scripted.requests_for("/a.bin")) == breaks + 2


@pytest.mark.parametrize("case", ["none", "weak", "unreadable"])
@pytest.mark.parametrize("breaks", [0, 2])
def test_row_52_a_shard_comes_whole_for_a_few_tensors(scripted: ScriptedServer, case: str, breaks: int) -> None:
    data = os.urandom(8 * SIZE)
    server = Server(scripted, data, ETAGS[case], breaks)
    scripted.script["/tensor-cache.json"] = [reply(200, manifest(data, 64))]
    policy = ndcache.RetryPolicy(retries=3, backoff=0.001)
    weights = ndcache.load(scripted.url, names="t60", retries=policy)
    assert np.asarray(weights["t60"]).tobytes() == data[60 * SIZE // 8 : 61 * SIZE // 8]
    assert server.whole == breaks + 1


def test_row_52_servers_behind_one_name_may_disagree_on_the_etag(scripted: ScriptedServer) -> None:
    """Each has an ETag of its own for the same file: only a new ETag counts as a change."""
    data = os.urandom(SIZE)
    answers = 0

    def answer(connection: Connection, request: Request) -> None:
        nonlocal answers
        answers += 1
        etag, end = f'"{answers % 2}"', len(data) if answers > 4 else SIZE // 2
        connection.send(reply(200, data[:end], {"ETag": etag}, length=len(data)))

    scripted.script = {"/tensor-cache.json": [reply(200, manifest(data))], "/a.bin": [answer]}
    policy = ndcache.RetryPolicy(retries=6, backoff=0.001)
    assert np.asarray(ndcache.load(scripted.url, retries=policy)["t0"]).tobytes() == data


@pytest.mark.parametrize("breaks", [0, 2])
@pytest.mark.parametrize("tensors", [["t4", "t60"], None], ids=["a few tensors", "in ranges"])
def test_row_52_each_range_may_have_an_etag_of_its_own(
    monkeypatch: pytest.MonkeyPatch, scripted: ScriptedServer, tensors: list[str] | None, breaks: int
) -> None:
    """When the transfer starts over, the first range has its old ETag: the file has not changed."""
    monkeypatch.setattr(download, "RANGE_THRESHOLD", SIZE // 2)
    data = os.urandom(8 * SIZE)
    server = Server(scripted, data, ETAGS["of each range"], breaks)
    scripted.script["/tensor-cache.json"] = [reply(200, manifest(data, 64))]
    if tensors is None:
        monkeypatch.setattr(download, "RANGE_BYTES", (SIZE, SIZE))
    policy = ndcache.RetryPolicy(retries=3, backoff=0.001)
    weights = ndcache.load(scripted.url, names=tensors, retries=policy)
    assert np.asarray(weights["t60"]).tobytes() == data[60 * SIZE // 8 : 61 * SIZE // 8]
    assert server.whole == breaks + 1


@pytest.mark.parametrize("answer", [reply(412), reply(431), reply(304, headers={"ETag": '"2"'}, length=None)])
def test_row_53_a_shards_condition_is_dropped_if_the_server_fails_at_it(
    scripted: ScriptedServer, answer: bytes
) -> None:
    """When a manifest without digests changes, the server is asked whether its shards have."""
    data = os.urandom(1000)
    whole = reply(200, data, {"ETag": '"1"'})
    scripted.script = {
        "/tensor-cache.json": [reply(200, manifest(data, md5=False)), reply(200, manifest(data, md5=False) + b" ")],
        "/a.bin": [whole, answer, whole],
    }
    for _ in range(2):
        assert np.asarray(ndcache.load(scripted.url, retries=0)["t0"]).tobytes() == data
    conditions = [request.headers.get("if-none-match") for request in scripted.requests_for("/a.bin")]
    assert conditions == [None, '"1"', None]
