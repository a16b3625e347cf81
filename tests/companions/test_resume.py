"""A companion file that breaks off goes on where it was; row 25 of docs/faults.rst."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.companions.lock import as_sri

from ..helpers.companions import CHAT_CONFIG, write_json
from ..helpers.loads import QUICK, partial_files
from ..helpers.models import random_array, simple_model
from ..helpers.servers import Request, ScriptedServer, Step, reply, then_close

NAME, HALF = "tokenizer.model", 50_000
DATA = random_array((2 * HALF,), "uint8", 1).tobytes()
OTHER = random_array((2 * HALF + 7,), "uint8", 2).tobytes()


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def whole(data: bytes) -> bytes:
    return reply(200, data, {"ETag": etag(data)})


def half(data: bytes) -> Step:
    return then_close(reply(200, data[:HALF], {"ETag": etag(data)}, length=len(data)))


def rest(data: bytes, first: int = HALF) -> bytes:
    headers = {"ETag": etag(data), "Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
    return reply(206, data[first:], headers)


@pytest.fixture
def server(scripted: ScriptedServer, tmp_path: Path) -> ScriptedServer:
    model = tmp_path / "model"
    simple_model(model)
    write_json(model / "mlc-chat-config.json", {**CHAT_CONFIG, "tokenizer_files": [NAME]})
    scripted.script = {f"/{path.name}": [whole(path.read_bytes())] for path in model.iterdir()}
    return scripted


def ranges(requests: list[Request]) -> list[tuple[str | None, str | None]]:
    """Return the range and its condition of each request for the file."""
    mine = [request for request in requests if request.path == f"/{NAME}"]
    return [(request.headers.get("range"), request.headers.get("if-range")) for request in mine]


PLAIN, REST = (None, None), (f"bytes={HALF}-", etag(DATA))


@pytest.mark.parametrize(
    ("steps", "expected", "asked"),
    [
        ([half(DATA), rest(DATA)], DATA, [PLAIN, REST]),
        ([half(DATA), whole(OTHER)], OTHER, [PLAIN, REST]),
        ([half(DATA), whole(DATA)], DATA, [PLAIN, REST]),
        ([half(DATA), rest(OTHER), whole(OTHER)], OTHER, [PLAIN, REST, PLAIN]),
        ([half(DATA), rest(DATA, HALF + 1), whole(DATA)], DATA, [PLAIN, REST, PLAIN]),
        ([half(DATA), reply(416), whole(DATA)], DATA, [PLAIN, REST, PLAIN]),
        ([then_close(reply(200, DATA[:HALF], length=len(DATA))), whole(DATA)], DATA, [PLAIN, PLAIN]),
    ],
    ids=["rest", "changed", "no ranges", "range of another version", "another range", "416", "no ETag"],
)
def test_a_companion_that_breaks_off_goes_on(
    server: ScriptedServer, steps: list[bytes], expected: bytes, asked: list[tuple[str | None, str | None]]
) -> None:
    server.script[f"/{NAME}"] = list(steps)
    directory = ndcache.fetch(server.url, retries=QUICK)
    assert (directory / NAME).read_bytes() == expected
    assert ranges(server.requests) == asked
    assert ndcache.verify(server.url).checked[NAME] == "sha256"
    assert partial_files(directory) == []


@pytest.mark.parametrize("by", ["the next load", "a fetch", "a fetch into a directory"])
def test_row_25_another_load_goes_on_with_a_companion(server: ScriptedServer, tmp_path: Path, by: str) -> None:
    server.script[f"/{NAME}"] = [half(DATA), rest(DATA)]
    options: dict[str, Any] = {"local_dir": tmp_path / "mine"} if by == "a fetch into a directory" else {}
    with pytest.raises(ndcache.TransferError):
        ndcache.fetch(server.url, retries=0, **options)
    if by == "the next load":
        ndcache.load(server.url).close()
    directory = ndcache.fetch(server.url, **options)
    assert (directory / NAME).read_bytes() == DATA
    assert ranges(server.requests) == [PLAIN, REST]
    assert partial_files(directory) == []


def test_wrong_bytes_are_not_continued(server: ScriptedServer) -> None:
    server.script[f"/{NAME}"] = [half(OTHER[: 2 * HALF]), rest(OTHER[: 2 * HALF]), whole(DATA)]
    directory = ndcache.fetch(
        server.url,
        retries=ndcache.RetryPolicy(retries=2, backoff=0.001),
        integrity={NAME: as_sri("sha256", hashlib.sha256(DATA).hexdigest())},
    )
    assert (directory / NAME).read_bytes() == DATA
    assert [first for first, _ in ranges(server.requests)] == [None, f"bytes={HALF}-", None]
