"""Queries that identify a model, and those that only sign a request for it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

import ndcache
from ndcache import tvm
from ndcache.location import locate
from ndcache.urls.queries import identifying_query, query_digest

from ..helpers.models import assert_same, simple_model, write_model
from ..helpers.servers import Connection, Request, ScriptedServer, reply

SIGNED = [
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=k%2F20260101%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Date=1"
    "&X-Amz-Expires=900&X-Amz-SignedHeaders=host&X-Amz-Signature=abc&x-id=GetObject&X-Amz-Security-Token=t",
    "AWSAccessKeyId=AKIA&Signature=a%2Bb%3D&Expires=1700000000",
    "X-Goog-Algorithm=GOOG4-RSA-SHA256&X-Goog-Credential=c&X-Goog-Date=d&X-Goog-Expires=1&X-Goog-SignedHeaders=host"
    "&X-Goog-Signature=abc",
    "GoogleAccessId=me%40x.iam&Expires=1&Signature=abc",
    "sv=2022-11-02&ss=b&srt=co&sp=rl&se=2026-01-01T00:00:00Z&st=2025-01-01&spr=https&sip=1.2.3.4&sig=a%2Bb",
    "skoid=1&sktid=2&skt=3&ske=4&sks=b&skv=2022&sv=2022&sr=b&sdd=1&scid=c&saoid=s&suoid=u&sig=x&rscd=attachment",
    "Policy=eyJ&Signature=abc&Key-Pair-Id=K2",
    "Expires=1&Signature=abc&Key-Pair-Id=K2",
    "OSSAccessKeyId=k&Expires=1&Signature=abc&security-token=t",
    "x-oss-signature-version=OSS4-HMAC-SHA256&x-oss-credential=c&x-oss-date=d&x-oss-expires=1&x-oss-signature=abc",
    "q-sign-algorithm=sha1&q-ak=k&q-sign-time=1;2&q-key-time=1;2&q-header-list=host&q-url-param-list=&q-signature=abc",
    "auth_key=1700000000-0-0-abc",
    "hdnea=exp=1~hmac=abc",
    "token=abc&expires=1&token_path=%2Fa%2F",
    "access_token=abc",
    "URLPrefix=aHR0&Expires=1&KeyName=k&Signature=abc",
    "response-content-disposition=attachment&X-Amz-Signature=abc",
    "signature=abc",
    "SIG=abc",
]


@pytest.mark.parametrize("query", SIGNED)
def test_row_44_a_signature_is_no_part_of_the_model(query: str) -> None:
    """A signature identifies nothing, alone or beside parameters that do, wherever it stands."""
    assert identifying_query(query) == ""
    assert query_digest(query) == ""
    for mixed in (f"model=a&{query}", f"{query}&model=a", f"{query.replace('&', '&model=a&', 1)}"):
        if "model=a" in mixed:
            assert identifying_query(mixed) == "model=a"
    plain, signed = locate("https://host/m/"), locate(f"https://host/m/?{query}")
    assert signed.cache_keys == plain.cache_keys
    assert str(signed) == str(plain)
    assert signed.query  # is sent nevertheless


@pytest.mark.parametrize(
    "query",
    [
        *("model=a", "model=b", "model=", "model", "Model=a", "model=a&model=b", "model=b&model=a", "model=a%2Bb"),
        *("model=a+b", "v=1", "version=1", "versionId=abc", "generation=3", "ref=main", "path=x", "raw=true", "id=1"),
        *("file=m", "key=m", "sv=1", "sp=a", "se=1", "si=x", "policy=x", "keyname=x", "q=x", "q-model=a", "signed=1"),
        *("x-oss-process=image", "tokens=1", "tokenizer=a", "model_token=a", "expires_in=1", "download=true", "amz=1"),
    ],
)
def test_row_44_a_query_that_is_no_signature_is_part_of_the_model(query: str) -> None:
    assert identifying_query(query) == query


def test_row_44_the_order_of_parameters_does_not_matter() -> None:
    """Parameters with different names have no order; those with the same name keep theirs."""
    assert identifying_query("b=2&a=1") == identifying_query("a=1&b=2&") == identifying_query("&a=1&&b=2")
    assert identifying_query("a=2&b=3&a=1") == "a=2&a=1&b=3" != identifying_query("a=1&b=3&a=2")
    keys = {locate(f"https://host/m/?{query}").cache_keys for query in ("b=2&a=1", "a=1&b=2", "a=1&sig=x&b=2")}
    assert len(keys) == 1


def test_row_44_the_documented_parameters_are_signatures() -> None:
    """All parameters that docs/urls.rst lists count as signatures."""
    text = (Path(__file__).parents[2] / "docs" / "urls.rst").read_text("utf-8")
    rows = re.findall(r"^   \* - .+\n     - (.+(?:\n       .+)*)", text.partition("Signatures")[2], re.MULTILINE)
    assert len(rows) > 8
    for row in rows:
        names = [name.replace("*", "Date") for name in re.findall("``([^`]+)``", row)]
        assert identifying_query("&".join(f"{name}=1" for name in names)) == "", row


@pytest.fixture
def by_query(tmp_path: Path, scripted: ScriptedServer) -> ScriptedServer:
    """Serve the model that the query's ``model`` names; all other parameters mean nothing."""

    def answer(connection: Connection, request: Request) -> None:
        chosen = dict(parse_qsl(urlsplit(request.target).query)).get("model", "a")
        file = tmp_path / chosen / request.path[1:]
        connection.send(reply(200, file.read_bytes(), {"ETag": '"1"'}) if file.is_file() else reply(404))

    for seed, name in enumerate("ab"):
        arrays = simple_model(tmp_path / name, shards=1, shard_bytes=64)
        if seed:
            write_model(tmp_path / name, [{key: value + 1 for key, value in arrays.items()}])
    for name in ("tensor-cache.json", "params_shard_0.bin", "config.json"):
        scripted.script[f"/{name}"] = [answer]
    for name in "ab":
        (tmp_path / name / "config.json").write_text(json.dumps(name))
    return scripted


def test_row_44_two_queries_of_one_address_are_two_models(by_query: ScriptedServer, tmp_path: Path) -> None:
    a, b = (f"{by_query.url}?model={name}" for name in "ab")
    arrays = {name: dict(ndcache.load(tmp_path / name)) for name in "ab"}
    assert_same(ndcache.load(a), arrays["a"])
    assert ndcache.is_cached(a)
    assert not ndcache.is_cached(b)
    with pytest.raises(ndcache.OfflineError):
        ndcache.load(b, offline=True)
    with pytest.raises(ndcache.NotFoundError):
        ndcache.verify(b)
    assert ndcache.delete(b) == 0
    assert_same(ndcache.load(b), arrays["b"])
    for url, name in ((a, "a"), (b, "b"), (f"{b}&sig=secret", "b")):
        assert_same(ndcache.load(url, offline=True), arrays[name])
        by_query.requests.clear()
        assert_same(ndcache.load(url), arrays[name])
        assert [request.path for request in by_query.requests] == ["/tensor-cache.json"]
        assert ndcache.verify(url).ok
    assert ndcache.delete(a) > 0
    assert not ndcache.is_cached(a)
    assert ndcache.is_cached(f"{b}&X-Amz-Date=1")
    assert not ndcache.is_cached(by_query.url)


def test_row_44_a_mirror_that_differs_in_its_query_does_not_resume_the_other(
    by_query: ScriptedServer, tmp_path: Path
) -> None:
    """A partial file of one is never completed from the other, whatever ETags they have."""
    shard = (tmp_path / "b" / "params_shard_0.bin").read_bytes()
    right = by_query.script["/params_shard_0.bin"][0]

    def cut(connection: Connection, request: Request) -> None:
        if "model=b" in request.target:
            connection.send(reply(200, shard, {"ETag": '"1"'})[:-32])
            connection.close()
        else:
            assert "range" not in request.headers
            right(connection, request)  # type: ignore[operator]

    by_query.script["/params_shard_0.bin"] = [cut]
    with pytest.raises(ndcache.TruncatedError) as caught:
        ndcache.load(f"{by_query.url}?model=b", mirrors=[f"{by_query.url}?model=a"], retries=0)
    (other,) = caught.value.others
    assert isinstance(other, ndcache.ChecksumError)


def test_row_44_listings_tell_models_with_different_queries_apart(by_query: ScriptedServer, cache_dir: Path) -> None:
    for query in ("model=a", "model=b", "model=b&token=secret", ""):
        ndcache.fetch(f"{by_query.url}?{query}")
    notes = [json.loads(path.read_text())["source"] for path in sorted(cache_dir.rglob("source.json"))]
    assert len(notes) == len(set(notes)) == 3
    assert all(note.startswith(by_query.url) for note in notes)
    assert not any("model" in note or "secret" in note for note in notes)


def test_row_44_single_files_with_different_queries_are_different(by_query: ScriptedServer) -> None:
    with tvm.ArtifactCache() as cache:
        for name in "aba":
            assert cache.fetch_with_cache(f"{by_query.url}config.json?model={name}", "json") == name
        assert cache.has_all_keys([f"{by_query.url}config.json?model=b&Signature=x&Expires=1"])
        assert not cache.has_all_keys([f"{by_query.url}config.json"])
        cache.delete_in_cache(f"{by_query.url}config.json?model=b")
        assert cache.has_all_keys([f"{by_query.url}config.json?model=a"])
        ndcache.fetch(f"{by_query.url}?model=b")
        assert cache.has_all_keys([f"{by_query.url}params_shard_0.bin?model=b"])
