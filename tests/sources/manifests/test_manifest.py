"""Manifests on servers: their names and encodings, and the cached manifest."""

from __future__ import annotations

import gzip
import json
import threading
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ndcache

from ...helpers import models
from ...helpers.models import assert_same
from ...helpers.served_manifests import (
    GZIP,
    HTML,
    HTML_TYPE,
    NEW,
    OLD,
    QUICK,
    cached_manifests,
    manifests_asked_for,
    scripted_model,
    sri,
)
from ...helpers.servers import Connection, Request, ScriptedServer, Step, reply, then_close


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


# --- row 50: there is no manifest of the first name ---------------------------------------------------

#: How a server may answer for a missing file → the error, if it has no manifest of the other name either.
NOT_THERE: dict[str, tuple[bytes, type[ndcache.NdcacheError], str]] = {
    "404": (reply(404, b"gone"), ndcache.NotFoundError, "there is no tensor-cache.json or "),
    "410": (reply(410), ndcache.NotFoundError, "there is no tensor-cache.json or "),
    "403, a bucket": (reply(403, b"<Error><Code>AccessDenied</Code></Error>"), ndcache.AuthError, "has no such file"),
    "400": (reply(400), ndcache.ProtocolError, "status 400"),
    "402": (reply(402), ndcache.ProtocolError, "status 402"),
    "405": (reply(405), ndcache.ProtocolError, "status 405"),
    "409, a container that is not public": (reply(409), ndcache.ProtocolError, "status 409"),
    "414": (reply(414), ndcache.ProtocolError, "status 414"),
    "416": (reply(416), ndcache.ProtocolError, "status 416"),
    "451": (reply(451), ndcache.ProtocolError, "status 451"),
    "204": (reply(204, length=None), ndcache.ProtocolError, "status 204"),
    "a web page": (reply(200, HTML, HTML_TYPE), ndcache.ManifestSyntaxError, "sent a web page"),
    "a web page of no type": (reply(200, HTML), ndcache.ManifestSyntaxError, "sent a web page"),
    "a web page in text only": (reply(200, b"Sign in", HTML_TYPE), ndcache.ManifestSyntaxError, "sent a web page"),
    "a web page, upper case": (reply(200, b"\n <HTML>"), ndcache.ManifestSyntaxError, "sent a web page"),
    "a web page after a comment": (reply(200, b"<!-- x --><html>"), ndcache.ManifestSyntaxError, "sent a web page"),
    "a web page, gzip": (
        reply(200, gzip.compress(HTML), {**GZIP, **HTML_TYPE}),
        ndcache.ManifestSyntaxError,
        "sent a web page",
    ),
    "a web page, encoded in another way": (
        reply(200, b"\x0b\x02\x80", {"Content-Encoding": "br", **HTML_TYPE}),
        ndcache.ManifestSyntaxError,
        "sent a web page",
    ),
    "300": (reply(300, HTML), ndcache.ProtocolError, "status 300"),
    "302 without a target": (reply(302, HTML), ndcache.ProtocolError, "status 302"),
    "a login page": (reply(302, headers={"Location": "/login"}), ndcache.ManifestSyntaxError, "sent a web page"),
    "an error in JSON": (reply(200, b'{"error": "not found"}'), ndcache.ManifestSyntaxError, "has no 'records'"),
    "text": (reply(200, b"not found"), ndcache.ManifestSyntaxError, "not JSON"),
    "nothing": (reply(200), ndcache.ManifestSyntaxError, "not JSON"),
    "a list": (reply(200, b"[]"), ndcache.ManifestSyntaxError, "is an array"),
    "a git-lfs pointer": (
        reply(200, b"version https://git-lfs.github.com/spec/v1\n"),
        ndcache.ManifestSyntaxError,
        "git-lfs pointer",
    ),
}


@pytest.mark.parametrize("case", NOT_THERE)
def test_row_50_the_other_name_is_requested_once(model: Path, scripted: ScriptedServer, case: str) -> None:
    arrays = scripted_model(scripted, model, OLD)
    scripted.script |= {NEW: [NOT_THERE[case][0]], "/login": [reply(200, HTML, HTML_TYPE)]}
    assert_same(ndcache.load(scripted.url, retries=QUICK), arrays)
    assert manifests_asked_for(scripted) == [NEW, OLD]


@pytest.mark.once
@pytest.mark.parametrize("other", ["404", "403, a bucket", "a web page", "the same"])
@pytest.mark.parametrize("case", NOT_THERE)
def test_row_50_if_no_name_works_the_first_error_is_raised(
    scripted: ScriptedServer, cache_dir: Path, case: str, other: str
) -> None:
    answer, error, words = NOT_THERE[case]
    scripted.script = {
        NEW: [answer],
        OLD: [NOT_THERE[case if other == "the same" else other][0]],
        "/login": [reply(200, HTML, HTML_TYPE)],
    }
    with pytest.raises(error, match=words) as caught:
        ndcache.load(scripted.url, retries=QUICK)
    assert type(caught.value) is error
    assert manifests_asked_for(scripted) == [NEW, OLD]
    assert cached_manifests(cache_dir) == []


def test_row_50_a_refusal_beside_missing_names_is_told(scripted: ScriptedServer) -> None:
    """`save_file` makes files that only their owner may read."""
    scripted.script = {"/model.safetensors": [reply(403)]}
    words = r"no model\.safetensors\.index\.json either; the server refuses access to model\.safetensors \(status 403\)"
    with pytest.raises(ndcache.NotFoundError, match=words) as caught:
        ndcache.load(scripted.url, retries=QUICK)
    assert "credentials" in str(caught.value)


FINAL: dict[str, tuple[bytes | Step, type[ndcache.NdcacheError], int]] = {
    "401": (reply(401), ndcache.AuthError, 1),
    "429, later than the limit": (reply(429, headers={"Retry-After": "4000"}), ndcache.RateLimitedError, 1),
    "500": (reply(500), ndcache.ServerError, 4),
    "503": (reply(503), ndcache.ServerError, 4),
    "a connection that breaks": (then_close(b""), ndcache.ConnectError, 4),
    "a manifest that is cut": (
        then_close(reply(200, b'{"records": [', length=1000)),
        ndcache.TruncatedError,
        4,
    ),
    "a manifest with a mistake": (reply(200, b'{"records": [}'), ndcache.ManifestSyntaxError, 1),
    "a manifest that contradicts itself": (
        reply(200, b'{"records": [{"dataPath": "x", "nbytes": -1, "records": []}]}'),
        ndcache.ManifestLayoutError,
        1,
    ),
}


@pytest.mark.parametrize("case", FINAL)
def test_row_50_a_failure_that_is_not_about_the_name_is_final(
    model: Path, scripted: ScriptedServer, cache_dir: Path, case: str
) -> None:
    scripted_model(scripted, model, OLD)
    answer, error, tries = FINAL[case]
    scripted.script[NEW] = [answer]
    with pytest.raises(error) as caught:
        ndcache.load(scripted.url, retries=QUICK)
    assert type(caught.value) is error
    assert manifests_asked_for(scripted) == [NEW] * tries
    assert cached_manifests(cache_dir) == []


@pytest.mark.parametrize("status", [401, 500])
def test_row_50_a_failure_at_the_other_name_is_raised(scripted: ScriptedServer, status: int) -> None:
    scripted.script = {NEW: [reply(403)], OLD: [reply(status)]}
    with pytest.raises(ndcache.TransferError, match=f"status {status}"):
        ndcache.load(scripted.url, retries=QUICK)


@pytest.mark.parametrize("case", ["404", "403, a bucket", "400", "a web page"])
def test_row_50_only_the_manifest_in_the_url_is_requested(scripted: ScriptedServer, case: str) -> None:
    answer, error, _ = NOT_THERE[case]
    scripted.script = {NEW: [answer]}
    with pytest.raises(error, match=r"tensor-cache\.json"):
        ndcache.load(scripted.url + "tensor-cache.json", retries=QUICK)
    assert manifests_asked_for(scripted) == [NEW]


@pytest.mark.once
@pytest.mark.parametrize("case", NOT_THERE)
@pytest.mark.parametrize("names", [(OLD, NEW), (NEW, OLD)], ids=["to the newer", "to the older"])
def test_row_50_a_renamed_manifest_of_a_cached_model_is_found(
    model: Path, scripted: ScriptedServer, cache_dir: Path, case: str, names: tuple[str, str]
) -> None:
    before, after = names
    scripted_model(scripted, model, before)
    ndcache.fetch(scripted.url)
    arrays = scripted_model(scripted, model, after, seed=1)
    scripted.script |= {before: [NOT_THERE[case][0]], "/login": [reply(200, HTML, HTML_TYPE)]}
    scripted.requests.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(ndcache.load(scripted.url), arrays)
    assert manifests_asked_for(scripted) == [before, after]
    assert [path.name for path in ndcache.fetch(scripted.url).glob("*.json")] == [after.lstrip("/")]


@pytest.mark.once
@pytest.mark.parametrize("case", NOT_THERE)
def test_row_50_the_cached_manifest_is_used_if_no_name_works(model: Path, scripted: ScriptedServer, case: str) -> None:
    arrays = scripted_model(scripted, model, NEW)
    ndcache.fetch(scripted.url)
    scripted.requests.clear()
    scripted.script |= {NEW: [NOT_THERE[case][0]], OLD: [NOT_THERE[case][0]], "/login": [reply(200, HTML)]}
    with pytest.warns(RuntimeWarning, match="using the cached manifest"):
        assert_same(ndcache.load(scripted.url), arrays)
    assert manifests_asked_for(scripted) == [NEW, OLD]


@pytest.mark.parametrize("case", ["404", "403, a bucket", "400", "a web page"])
def test_row_50_a_manifest_with_a_required_digest_may_come_from_a_mirror(
    model: Path, scripted: ScriptedServer, case: str
) -> None:
    arrays = scripted_model(scripted, model, OLD)
    manifest = (model / OLD.lstrip("/")).read_bytes()
    scripted.script = {f"/mirror{path}": steps for path, steps in scripted.script.items()}
    scripted.script |= {f"/home{name}": [NOT_THERE[case][0]] for name in (NEW, OLD)}
    integrity = {OLD.lstrip("/"): sri(manifest)}
    weights = ndcache.load(scripted.url + "home/", mirrors=[scripted.url + "mirror/"], integrity=integrity)
    assert_same(weights, arrays)
    assert manifests_asked_for(scripted) == ["/home" + OLD, "/mirror" + OLD]  # only the name with the digest


def test_row_50_a_web_page_is_not_called_a_checksum_error(scripted: ScriptedServer) -> None:
    scripted.script[NEW] = [reply(200, HTML)]
    with pytest.raises(ndcache.ManifestSyntaxError, match="sent a web page"):
        ndcache.load(scripted.url, integrity={"tensor-cache.json": sri(b"")}, retries=QUICK)
    assert manifests_asked_for(scripted) == [NEW]


# --- row 51: encodings --------------------------------------------------------------------------------


def bare_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


ENCODED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "upper case": ("GZIP", gzip.compress),
    "with identity": ("identity, gzip", gzip.compress),
    "members": ("gzip", lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:])),
    "an empty member": ("gzip", lambda data: gzip.compress(data) + gzip.compress(b"")),
    "padded": ("gzip", lambda data: gzip.compress(data) + bytes(100)),
    "deflate": ("deflate", zlib.compress),
    "bare deflate": ("deflate", bare_deflate),
}


@pytest.mark.parametrize("framing", ["length", "none", "chunked"])
@pytest.mark.parametrize("case", ENCODED)
def test_row_51_an_encoded_manifest_is_decoded(model: Path, scripted: ScriptedServer, case: str, framing: str) -> None:
    arrays = scripted_model(scripted, model, NEW)
    manifest = (model / "tensor-cache.json").read_bytes()
    encoding, encode = ENCODED[case]
    body, headers = encode(manifest), {"Content-Encoding": encoding, "ETag": '"encoded"'}
    if framing == "chunked":
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        answer: bytes | Step = reply(200, chunks, {**headers, "Transfer-Encoding": "chunked"}, length=None)
    else:
        answer = (
            reply(200, body, headers) if framing == "length" else then_close(reply(200, body, headers, length=None))
        )
    scripted.script[NEW] = [answer, reply(304, headers=headers, length=None)]
    integrity = {"tensor-cache.json": sri(manifest)}
    assert_same(ndcache.load(scripted.url, integrity=integrity), arrays)
    assert (ndcache.fetch(scripted.url) / "tensor-cache.json").read_bytes() == manifest
    conditions = [request.headers.get("if-none-match") for request in scripted.requests_for(NEW)]
    assert conditions == [None, headers["ETag"]]


@pytest.mark.parametrize(
    ("encoding", "encode", "error", "tries"),
    [
        pytest.param("gzip", lambda data: gzip.compress(data)[:-1], ndcache.TruncatedError, 4, id="cut"),
        pytest.param("gzip", lambda data: gzip.compress(data)[:60], ndcache.TruncatedError, 4, id="cut early"),
        pytest.param("gzip", lambda data: b"", ndcache.TruncatedError, 4, id="empty"),
        pytest.param(
            "gzip", lambda data: gzip.compress(data) + b"\x1f\x8b\x08", ndcache.TruncatedError, 4, id="member"
        ),
        pytest.param("deflate", lambda data: zlib.compress(data)[:-1], ndcache.TruncatedError, 4, id="deflate, cut"),
        pytest.param("gzip", lambda data: data, ndcache.ProtocolError, 2, id="not encoded"),
        pytest.param("gzip", lambda data: gzip.compress(data)[:-8] + bytes(8), ndcache.ProtocolError, 2, id="checksum"),
        pytest.param("br", lambda data: data, ndcache.ProtocolError, 2, id="br"),
        pytest.param("zstd", lambda data: data, ndcache.ProtocolError, 2, id="zstd"),
        pytest.param("gzip, gzip", lambda data: data, ndcache.ProtocolError, 2, id="twice"),
        pytest.param("aws-chunked\x1b[2J", lambda data: data, ndcache.ProtocolError, 2, id="control characters"),
    ],
)
def test_row_51_a_damaged_or_unknown_encoding_is_an_error(
    model: Path, scripted: ScriptedServer, encoding: str, encode: Any, error: type[ndcache.NdcacheError], tries: int
) -> None:
    arrays = scripted_model(scripted, model, NEW)
    good = scripted.script[NEW]
    bad = reply(200, encode((model / "tensor-cache.json").read_bytes()), {"Content-Encoding": encoding})
    scripted.script[NEW] = [bad]
    with pytest.raises(error) as caught:
        ndcache.load(scripted.url, retries=QUICK)
    assert type(caught.value) is error
    assert str(caught.value).isprintable()
    assert manifests_asked_for(scripted) == [NEW] * tries
    scripted.script[NEW] = [*[bad] * (tries + 1), *good]  # another attempt may succeed
    assert_same(ndcache.load(scripted.url, retries=QUICK), arrays)


@pytest.mark.once
def test_row_51_a_compressed_bomb_is_refused(scripted: ScriptedServer) -> None:
    bomb = gzip.compress(bytes(1 << 30))
    scripted.script[NEW] = [reply(200, bomb, GZIP)]
    tracemalloc.start()
    try:
        with pytest.raises(ndcache.ManifestLimitError, match="64 MiB"):
            ndcache.load(scripted.url)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()
    assert manifests_asked_for(scripted) == [NEW]


@pytest.mark.once
def test_row_51_the_largest_manifest_may_be_compressed(scripted: ScriptedServer) -> None:
    body = b'{"records": []}'
    scripted.script[NEW] = [reply(200, gzip.compress(body + b" " * ((64 << 20) - len(body))), GZIP)]
    assert len(ndcache.load(scripted.url)) == 0


def test_row_51_shards_are_never_decoded(model: Path, scripted: ScriptedServer) -> None:
    scripted_model(scripted, model, NEW)
    for name in ("tensor-cache.json", "params_shard_0.bin"):
        scripted.script[f"/{name}"] = [reply(200, gzip.compress((model / name).read_bytes()), GZIP)]
    with pytest.raises(ndcache.ProtocolError, match="'gzip' although none was asked for") as caught:
        ndcache.load(scripted.url, retries=0)
    assert caught.value.shard == "params_shard_0.bin"


@pytest.mark.parametrize("where", ["server", "directory"])
def test_row_51_a_byte_order_mark_is_skipped(model: Path, scripted: ScriptedServer, where: str) -> None:
    arrays = scripted_model(scripted, model, NEW)
    manifest = b"\xef\xbb\xbf" + (model / "tensor-cache.json").read_bytes()
    (model / "tensor-cache.json").write_bytes(manifest)
    scripted.script[NEW] = [reply(200, manifest)]
    source = model if where == "directory" else scripted.url
    integrity = {"tensor-cache.json": sri(manifest)}
    assert_same(ndcache.load(source, integrity=integrity), arrays)
    if where == "server":
        assert_same(ndcache.load(source, offline=True), arrays)  # from the cache


@pytest.mark.parametrize(
    ("encode", "words"),
    [
        (lambda text: text.encode("utf-16"), "UTF-16"),
        (lambda text: text.encode("utf-16-le"), "UTF-16"),
        (lambda text: text.encode("utf-32-be"), "UTF-16 or UTF-32"),
        (lambda text: gzip.compress(text.encode()), "compressed with gzip"),
        (lambda text: b"\x28\xb5\x2f\xfd" + text.encode(), "compressed with zstd"),
    ],
)
def test_row_51_a_file_of_another_kind_is_named_in_the_error(model: Path, encode: Any, words: str) -> None:
    text = json.dumps(models.write_model(model, []))
    (model / "tensor-cache.json").write_bytes(encode(text))
    with pytest.raises(ndcache.ManifestSyntaxError, match=words):
        ndcache.load(model)


# --- row 36: cancellation while parsing ---------------------------------------------------------------


def test_row_36_cancelling_ends_the_parsing_of_a_manifest(scripted: ScriptedServer) -> None:
    """The event is set when the whole manifest has been sent, so that only parsing is left."""
    cancel = threading.Event()
    records = b",".join(
        b'{"name":"%d","shape":[1],"dtype":"int8","format":"raw","byteOffset":%d,"nbytes":1}' % (i, i)
        for i in range(200_000)
    )
    head = b'{"records":[{"dataPath":"a.bin","format":"raw-shard","nbytes":200000,"records":['

    def give(connection: Connection, request: Request) -> None:
        connection.send(reply(200, head + records + b"]}]}"))
        cancel.set()
        connection.stall()

    scripted.script[NEW] = [give]
    with pytest.raises(ndcache.CancelledError):
        ndcache.read_manifest(scripted.url, cancel=cancel)
