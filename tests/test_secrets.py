"""Shown texts: no password of a mistyped URL, and no character from a server that controls a terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache import tvm
from ndcache.cli import doctor
from ndcache.errors import NdcacheError, redact
from ndcache.urls.redact import printable

from .helpers.models import simple_model
from .helpers.servers import FileServer, ScriptedServer, reply, then_close

SECRET = "s3cr3t"

MISTYPED = [
    "http;//user:{}@host/x",
    "http//user:{}@host/x",
    "http//{}@host/x",
    "http:user:{}@host/x",
    "http:/user:{}@host/x",
    "http:\\\\user:{}@host/x",
    "http.//user:{}@host/x",
    "http:://user:{}@host/x",
    "http : //user:{}@host/x",
    "HTTPS;//USER:{}@HOST/x",
    "htps://user:{}@host/x",
    "ht tp://user:{}@host/x",
    "https:///user:{}/x",
    "https:///user:{}@host/x",
    "https:///{}@host/x",
    "https://user:{}/with/slash@host/x",
    "https://user:with?{}@host/x",
    "https://user:with#{}@host/x",
    "https://user:1234/{}@host/x",
    "https://user:1234#{}@host/x",
    "https://user:with@{}@host/x",
    "https://user:with {}@host/x",
    "https:// user:{}@host/x",
    "https://user:{}@ho st/x",
    "https://user:{}@host:port/x",
    "https://user:{}@[::1/x",
    "https://user:{}%40host/x",
    "https://user:{}@",
    "user:{}@host/x",
    "user:{}@host",
    "user:{}%40host/x",
    "user:with/{}@host/x",
    "//user:{}@host/x",
    "~user:{}@host/x",
    "user:{}@host/" + "x" * 300,
    "hf://user:{}@owner/name",
    "hf://user:{}/name",
    "hf:/user:{}@owner/name",
    "s3://user:{}@bucket/x",
    "file://user:{}@host/x",
    "file://user:{}@\ufb01\u2100/x",
    "http://user:{}@127.0.0.1:9/x?sig={}#{}",
]

Attempt = Callable[[str, pytest.MonkeyPatch], Any]


def _as_endpoint(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", text)
    ndcache.load("hf://owner/name", retries=0)


def _as_proxy(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", text)
    ndcache.load("http://host.invalid/x", retries=0)


def _as_file(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tvm.ArtifactCache(retries=0) as cache:
        cache.add_to_cache(text)


ATTEMPTS: dict[str, Attempt] = {
    "source": lambda text, _: ndcache.load(text, retries=0),
    "path": lambda text, _: ndcache.load(Path(text), retries=0),
    "mirror": lambda text, _: ndcache.load("http://127.0.0.1:9/", mirrors=[text], retries=0),
    "endpoint": _as_endpoint,
    "proxy": _as_proxy,
    "file": _as_file,
    "is_cached": lambda text, _: ndcache.is_cached(text),
    "verify": lambda text, _: ndcache.verify(text),
    "delete": lambda text, _: ndcache.delete(text),
}


def everything(error: BaseException) -> str:
    """Return all that could be shown of an error, its causes and its context."""
    found, waiting = ["".join(traceback.format_exception(error))], [error]
    while waiting:
        current = waiting.pop()
        found += [str(current), repr(current), str(vars(current))]
        waiting += filter(None, (current.__cause__, current.__context__, *getattr(current, "others", ())))
    return "\n".join(found)


def failure_of(attempt: Attempt, text: str, monkeypatch: pytest.MonkeyPatch) -> Exception | None:
    try:
        attempt(text, monkeypatch)
    except Exception as error:
        return error
    return None


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


@pytest.mark.parametrize("way", ATTEMPTS)
def test_row_42_a_mistyped_url_shows_no_password(
    way: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for template in MISTYPED:
        text = template.replace("{}", SECRET)
        assert SECRET not in redact(text), template
        assert redact(redact(text)) == redact(text)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            error = failure_of(ATTEMPTS[way], text, monkeypatch)
        if error is None:
            assert way in ("is_cached", "delete"), template  # these may find nothing
        else:
            assert isinstance(error, (ValueError, NdcacheError)), template
            assert SECRET not in everything(error), template
        assert not any(SECRET in str(item.message) for item in warned), template
    assert SECRET not in log.text


def test_row_42_doctor_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for template in MISTYPED:
        for name in ("HTTP_PROXY", "all_proxy", "HF_ENDPOINT"):
            monkeypatch.setenv(name, template.replace("{}", SECRET))
        assert SECRET not in str(doctor._environment_facts()), template


@pytest.mark.parametrize("text", [":", "/", "@", "a:", "[:", "a/", "%40", "://", ";", "?", "\x1b"])
def test_row_42_long_texts_are_redacted_quickly(text: str) -> None:
    for start in ("", "http://", "http:", "hf://", "user:", "C:/"):
        redact(start + text * 20_000)
        redact(start + text * 20_000 + "!")


@pytest.mark.once
@pytest.mark.parametrize("arguments", [["load"], ["--verbose", "load"], ["rm"], ["verify"]])
def test_row_42_the_command_line_shows_no_password(arguments: list[str], tmp_path: Path) -> None:
    templates = MISTYPED if arguments == ["rm"] else MISTYPED[::8]  # rm takes many arguments
    sources = [template.replace("{}", SECRET) for template in templates]
    for given in [sources] if arguments == ["rm"] else [[source] for source in sources]:
        done = subprocess.run(
            [sys.executable, "-m", "ndcache", *arguments, *given],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(ndcache.__file__).parents[1])},
        )
        assert done.returncode == 1 or arguments == ["rm"], done
        assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "text",
    [
        *("/srv/a@b/c", "a/b:c/d", "owner/name@v1", "owner/name@refs/pr/1", "hf://owner/name@v1/a", "C:/models/x@y"),
        *("https://host/a@b/c:d", "https://host:8443/a/b", "https://host/ü b/", "https://host:99999/a", "http:/host/a"),
        *("localhost:8000/model", "host/model", "~user/model", "./a@b", "C:\\models\\x", "a b/c", "", "https:///model"),
    ],
)
def test_texts_without_secrets_are_shown(text: str) -> None:
    assert redact(text) == text


# --- what a server sends ------------------------------------------------------------------------------

#: Characters of the sets C0 and C1, DEL, escape sequences, and characters that reverse or hide text, or end a line.
RAW = "\x1b[31m\x07\x7f\x9b2J\u202e\u2066\u200b\u2028\x0c"
#: Those of them that a header can have.
RAW_HEADER = "\x1b[31m\x07\x7f\x9b2J\x0c"
SHARD = {"dataPath": "a.bin", "format": "raw-shard", "nbytes": 4}
RECORD = {"name": "a", "shape": [1], "dtype": "float32", "format": "raw", "byteOffset": 0, "nbytes": 4}


def manifest(
    shard: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    others: dict[str, Any] | None = None,
) -> bytes:
    """Return a response with a manifest that has some odd values."""
    return reply(
        200,
        json.dumps(
            {
                "metadata": {},
                "records": [{**SHARD, "records": [{**RECORD, **(record or {})}], **(shard or {})}],
                **(others or {}),
            }
        ).encode(),
    )


def head(text: str) -> Any:
    return then_close(f"{text}\r\n\r\n".encode("latin-1"))


FAULTS: dict[str, Any] = {
    "reason": head(f"HTTP/1.1 404 {RAW_HEADER}"),
    "server error": head(f"HTTP/1.1 500 {RAW_HEADER}"),
    "status": head(f"HTTP/1.1 {RAW_HEADER} OK"),
    "status line": head(f"{RAW_HEADER}"),
    "status that is a number": head(f"HTTP/1.1 299 {RAW_HEADER}"),
    "content-encoding": head(f"HTTP/1.1 200 OK\r\nContent-Encoding: {RAW_HEADER}"),
    "content-length": head(f"HTTP/1.1 200 OK\r\nContent-Length: {RAW_HEADER}"),
    "transfer-encoding": head(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{RAW_HEADER}\r\n"),
    "content-type": head(f"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Type: {RAW_HEADER}\r\n\r\n<html"),
    "retry-after": head(f"HTTP/1.1 429 {RAW_HEADER}\r\nRetry-After: {RAW_HEADER}"),
    "no header": head(f"HTTP/1.1 200 OK\r\n{RAW_HEADER}\r\n"),
    "www-authenticate": head(f"HTTP/1.1 401 {RAW_HEADER}\r\nWWW-Authenticate: {RAW_HEADER}"),
    "etag": head(f"HTTP/1.1 200 OK\r\nETag: {RAW_HEADER}\r\nContent-Length: 1\r\n\r\nx"),
    "location": head(f"HTTP/1.1 302 Found\r\nLocation: /{RAW_HEADER}"),
    "location's scheme": head(f"HTTP/1.1 302 Found\r\nLocation: {RAW_HEADER}://host/"),
    "location's host": head(f"HTTP/1.1 302 Found\r\nLocation: http://{RAW_HEADER}/"),
    "location in UTF-8": head("HTTP/1.1 302 Found\r\nLocation: /" + RAW.encode().decode("latin-1")),
    "x-repo-commit": head(f"HTTP/1.1 404 Not Found\r\nX-Repo-Commit: {RAW_HEADER}"),
    "not JSON": reply(200, RAW.encode()),
    "not UTF-8": reply(200, b"\x9b\x1b" + RAW.encode()),
    "a key": manifest(others={RAW: 1, "records": RAW}),
    "a key twice": reply(200, f'{{"{RAW[14:]}": 1, "{RAW[14:]}": 1}}'.encode()),
    "path": manifest({"dataPath": f"a{RAW}"}),
    "path that may be": manifest({"dataPath": "a\u2028\u2029.bin"}),
    "shard format": manifest({"format": RAW}),
    "md5": manifest({"md5sum": RAW}),
    "name": manifest(record={"name": RAW, "nbytes": 8}),
    "dtype": manifest(record={"dtype": RAW}),
    "format": manifest(record={"format": RAW}),
    "number": manifest(record={"nbytes": RAW}),
    "name that is right": manifest(record={"name": RAW}),
}


def is_clean(text: str) -> bool:
    return all(line.isprintable() for line in text.replace("\n", "").replace("\t", "").split("\n"))


@pytest.mark.parametrize("fault", FAULTS)
def test_row_42_control_characters_of_a_server_are_not_shown(
    fault: str, scripted: ScriptedServer, log: pytest.LogCaptureFixture
) -> None:
    scripted.script["/tensor-cache.json"] = [FAULTS[fault]]
    with (
        warnings.catch_warnings(record=True) as warned,
        pytest.raises(NdcacheError) as caught,
    ):
        warnings.simplefilter("always")
        ndcache.load(scripted.url, retries=1)
    text = "".join(traceback.format_exception(caught.value))
    assert is_clean(text), ascii(text)
    error: BaseException | None = caught.value
    while error is not None:
        assert is_clean(str(error)), ascii(str(error))
        error = error.__cause__
    assert all(is_clean(record.getMessage()) for record in log.records), [ascii(r.getMessage()) for r in log.records]
    assert all(is_clean(str(item.message)) for item in warned)


@pytest.mark.once
def test_row_42_the_command_line_shows_no_control_characters(
    tmp_path: Path, serve: Callable[[Path], FileServer], monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    """This holds for tensor names, metadata, cached files and their notes; in JSON output they are escaped."""
    simple_model(tmp_path / "www", shards=1, shard_bytes=16)
    file = tmp_path / "www" / "tensor-cache.json"
    content = json.loads(file.read_text())
    content["records"][0]["records"][0]["name"] = RAW
    content["metadata"] = {RAW: RAW}
    file.write_text(json.dumps(content))
    url = serve(tmp_path / "www").url
    directory = ndcache.fetch(url)
    planted = directory.with_name(f"planted{RAW}") / ".ndcache"
    planted.mkdir(parents=True)
    (planted / "source.json").write_text(json.dumps({"source": RAW}))
    (cache_dir / f"scope{RAW}").mkdir()
    calls = [
        *(["load", url], ["inspect", url], ["inspect", "--json", url], ["ls"], ["ls", "--json"], ["verify", url]),
        *(
            ["load", url, "--names", "nothing", "--verbose"],
            ["ls", "--scope", RAW],
            ["rm", str(planted.parent)],
            ["doctor"],
        ),
    ]
    for call in calls:
        done = subprocess.run(
            [sys.executable, "-m", "ndcache", *call],
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(ndcache.__file__).parents[1]), "PYTHONIOENCODING": "utf-8"},
        )
        assert is_clean(done.stdout + done.stderr), (call, ascii(done.stdout + done.stderr))


def test_row_42_control_characters_are_not_logged() -> None:
    stream = io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger("ndcache")
    logger.addHandler(handler)
    try:
        logger.warning("of %s: %r", RAW, 1)
    finally:
        logger.removeHandler(handler)
    assert is_clean(stream.getvalue())
    assert ": 1" in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 例", "plain ü 例"),
        ("a\r\nb\u2028c", "a b c"),
        ("\x1b[0m", "\\x1b[0m"),
        ("\u202e", "\\u202e"),
        ("\udc80", "\\udc80"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
