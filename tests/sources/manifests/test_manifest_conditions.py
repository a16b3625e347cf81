"""Conditional requests for manifests: ETags and dates that can be sent back, and those that cannot."""

from __future__ import annotations

import json
import time
import warnings
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

import ndcache

from ...helpers.models import assert_same
from ...helpers.served_manifests import (
    NEW,
    scripted_model,
)
from ...helpers.servers import Connection, Request, ScriptedServer, Step, reply, then_close


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


UNSENDABLE = {
    "folded": b'ETag: "abc\r\n def"\r\n',
    "a bare carriage return": b'ETag: "ab\rc"\r\n',
    "20 KB": b'ETag: "' + b"a" * 20_000 + b'"\r\n',
    "300 characters": b'ETag: "' + b"a" * 300 + b'"\r\n',
    "NUL": b'ETag: "a\0b"\r\n',
    "Latin-1": b'ETag: "\xe9"\r\n',
    "a control character": b'ETag: "a\x7fb"\r\n',
    "empty": b"ETag: \r\n",
    "empty quotes": b'ETag: ""\r\n',
    "a star": b"ETag: *\r\n",
    "two": b'ETag: "a", "b"\r\n',
    "a date with a carriage return": b"Last-Modified: Mon\rday\r\n",
    "a date that is none": b"Last-Modified: yesterday\r\n",
    "a date of no day": b"Last-Modified: Mon, 99 Jan 2024 00:00:00 GMT\r\n",
    "a date to come": b"Last-Modified: Fri, 01 Jan 2100 00:00:00 GMT\r\n",
}


def versions(scripted: ScriptedServer, model: Path, first: bytes) -> dict[str, Any]:
    """Load a first version, whose manifest has these header lines, and let the server have a second one."""
    scripted_model(scripted, model, NEW)
    body = (model / "tensor-cache.json").read_bytes()
    scripted.script[NEW] = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s" % (len(body), first, body)]
    ndcache.load(scripted.url, retries=0)
    scripted.requests.clear()
    return scripted_model(scripted, model, NEW, seed=1)


def _note(directory: Path, name: str) -> Path:
    """Return the path of the note about a cached file."""
    (note,) = (path for path in (directory / ".ndcache" / "validators").iterdir() if name in path.name)
    return note


@pytest.fixture
def no_warning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("case", UNSENDABLE)
def test_row_53_an_etag_or_date_that_cannot_be_sent_is_dropped(
    model: Path, scripted: ScriptedServer, case: str
) -> None:
    arrays = versions(scripted, model, UNSENDABLE[case])
    assert_same(ndcache.load(scripted.url, retries=0), arrays)
    (request,) = scripted.requests_for(NEW)
    assert not {"if-none-match", "if-modified-since"} & request.headers.keys()


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize(
    "bad",
    [
        {"etag": '"abc\r\n def"'},
        {"etag": '"' + "a" * 20_000 + '"'},
        {"etag": "*"},
        {"etag": '"\u00e9"'},
        {"etag": 1},
        {"etag": None, "last_modified": "Mon\rday"},
        {"etag": None, "last_modified": "Fri, 01 Jan 2100 00:00:00 GMT"},
    ],
)
def test_row_53_an_etag_in_an_old_note_is_checked(model: Path, scripted: ScriptedServer, bad: dict[str, Any]) -> None:
    arrays = versions(scripted, model, b'ETag: "good"\r\n')
    note = _note(Path(ndcache.fetch(scripted.url, offline=True)), "tensor-cache.json")
    note.write_text(json.dumps(json.loads(note.read_text()) | bad))
    assert_same(ndcache.load(scripted.url, retries=0), arrays)
    assert len(scripted.requests_for(NEW)) == 1


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("status", [400, 405, 412, 416, 417, 428, 431])
def test_row_53_a_condition_that_the_server_refuses_is_dropped(
    model: Path, scripted: ScriptedServer, status: int
) -> None:
    arrays = versions(scripted, model, b'ETag: "1"\r\n')
    good = scripted.script[NEW]
    scripted.script[NEW] = [*good, reply(status), *good]
    assert_same(ndcache.load(scripted.url, retries=0), arrays)
    conditions = [request.headers.get("if-none-match") for request in scripted.requests_for(NEW)]
    assert conditions == ['"1"', None]


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize(
    ("first", "answer"),
    [
        pytest.param(b'ETag: "1"\r\n', {"ETag": '"2"'}, id="another ETag"),
        pytest.param(b"", {"ETag": '"1"'}, id="not asked for"),
        pytest.param(b"", {}, id="not asked for, and of nothing"),
    ],
)
def test_row_53_a_304_about_another_version_is_ignored(
    model: Path, scripted: ScriptedServer, first: bytes, answer: dict[str, str]
) -> None:
    arrays = versions(scripted, model, first)
    good = scripted.script[NEW]
    scripted.script[NEW] = [
        *good,
        reply(304, headers=answer, length=None),
        *good,
    ]
    assert_same(ndcache.load(scripted.url, retries=0), arrays)
    assert [request.headers.get("cache-control") for request in scripted.requests_for(NEW)] == [None, "no-cache"]


@pytest.mark.parametrize("answer", [reply(500), reply(501), reply(403), then_close(reply(200, b"{", length=9))])
def test_row_53_the_load_after_a_failure_sends_no_condition(
    model: Path, scripted: ScriptedServer, answer: bytes | Step
) -> None:
    """Or a server that fails at each condition would keep the cached manifest in use for ever."""
    arrays = versions(scripted, model, b'ETag: "1"\r\n')
    good = scripted.script[NEW][0]

    def answer_by_condition(connection: Connection, request: Request) -> None:
        step = answer if "if-none-match" in request.headers else good
        step(connection, request) if callable(step) else connection.send(step)

    scripted.script[NEW] = [answer_by_condition]
    with pytest.warns(RuntimeWarning, match="using the cached manifest"):
        ndcache.load(scripted.url, retries=0)
    assert_same(ndcache.load(scripted.url, retries=0), arrays)


@pytest.mark.parametrize(
    ("etag", "answer"),
    [
        ('"1"', '"1"'),
        ('"1"', None),
        ('W/"1"', 'W/"1"'),
        ('W/"1"', '"1"'),
        ('"1"', 'W/"1"'),
        ("5f-61a", "5f-61a"),
        ('"' + "a" * 256 + '"', None),
    ],
)
@pytest.mark.usefixtures("no_warning")
def test_an_etag_that_can_be_sent_is_sent(model: Path, scripted: ScriptedServer, etag: str, answer: str | None) -> None:
    arrays = scripted_model(scripted, model, NEW)
    body = (model / "tensor-cache.json").read_bytes()
    headers = {} if answer is None else {"ETag": answer}
    scripted.script[NEW] = [reply(200, body, {"ETag": etag}), reply(304, headers=headers, length=None)]
    for _ in range(2):
        assert_same(ndcache.load(scripted.url), arrays)
    assert [request.headers.get("if-none-match") for request in scripted.requests_for(NEW)] == [None, etag]


@pytest.mark.parametrize(("age", "is_sent"), [(3600, True), (1, True), (0, False), (-1, False), (-3600, False)])
def test_row_53_a_date_is_sent_if_the_file_cannot_change_in_that_second(
    model: Path, scripted: ScriptedServer, age: int, is_sent: bool
) -> None:
    """A file that changes twice in one second has the same date twice."""
    arrays = scripted_model(scripted, model, NEW)
    now = time.time()
    headers = {"Date": formatdate(now, usegmt=True), "Last-Modified": formatdate(now - age, usegmt=True)}
    scripted.script[NEW] = [reply(200, (model / "tensor-cache.json").read_bytes(), headers)]
    for _ in range(2):
        assert_same(ndcache.load(scripted.url), arrays)
    sent = [request.headers.get("if-modified-since") for request in scripted.requests_for(NEW)]
    assert sent == [None, headers["Last-Modified"] if is_sent else None]
