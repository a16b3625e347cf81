"""Hugging Face: revisions, the login, and endpoints that hold the same models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

import ndcache
from ndcache import tvm
from ndcache.location import locate
from ndcache.location.hub import Login, token_path
from ndcache.urls.url import Origin

from ..helpers.hub import HubServer
from ..helpers.models import assert_same, simple_model
from ..helpers.servers import FileServer, ScriptedServer, reply

Serve = Callable[..., FileServer]
HOME = Origin("https", "huggingface.co", 443)


# --- revisions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "revision", "folder"),
    [
        ("hf://o/n@refs/pr/1", "refs%2Fpr%2F1", ""),
        ("hf://o/n@refs/pr/12/", "refs%2Fpr%2F12", ""),
        ("hf://o/n@refs/pr/1/sub/folder", "refs%2Fpr%2F1", "sub/folder/"),
        ("hf://o/n@refs/pr/1/x.json", "refs%2Fpr%2F1", ""),
        ("hf://o/n@refs%2Fpr%2F1/sub", "refs%2Fpr%2F1", "sub/"),
        ("hf://o/n@refs/convert/parquet/sub", "refs%2Fconvert%2Fparquet", "sub/"),
        ("hf://o/n@refs/heads/main/sub", "refs%2Fheads%2Fmain", "sub/"),
        ("hf://o/n@refs/tags/v1", "refs%2Ftags%2Fv1", ""),
        ("hf://o/n@feature%2Fx/sub", "feature%2Fx", "sub/"),
        # folders of a branch named refs, and of another one
        ("hf://o/n@refs", "refs", ""),
        ("hf://o/n@refs/pr", "refs", "pr/"),
        ("hf://o/n@refs/pr/x1", "refs", "pr/x1/"),
        ("hf://o/n@refs/other/1", "refs", "other/1/"),
        ("hf://o/n@main/refs/pr/1", "main", "refs/pr/1/"),
        ("hf://o/n/refs/pr/1", "main", "refs/pr/1/"),
        ("https://huggingface.co/o/n/tree/refs/pr/1", "refs%2Fpr%2F1", ""),
        ("https://huggingface.co/o/n/tree/refs/pr/1/sub/", "refs%2Fpr%2F1", "sub/"),
        ("https://huggingface.co/o/n/tree/refs%2Fpr%2F1/sub", "refs%2Fpr%2F1", "sub/"),
        ("https://huggingface.co/o/n/blob/refs%2Fpr%2F1/sub/x.json", "refs%2Fpr%2F1", "sub/"),
        ("https://huggingface.co/o/n/blob/refs/pr/1/sub/x.json", "refs%2Fpr%2F1", "sub/"),
        ("https://huggingface.co/o/n/resolve/refs/pr/1/sub/x.json?download=true", "refs%2Fpr%2F1", "sub/"),
        ("https://www.huggingface.co/o/n/tree/main/refs/pr/1", "main", "refs/pr/1/"),
    ],
)
def test_row_43_a_revision_with_slashes_and_a_folder_are_told_apart(source: str, revision: str, folder: str) -> None:
    location = locate(source, {})
    assert location.base == f"https://huggingface.co/o/n/resolve/{revision}/{folder}"
    assert not location.query


@pytest.mark.parametrize(
    ("source", "revision", "base"),
    [
        ("hf://o/n", "v1", "v1/"),
        ("hf://o/n@v1/sub", "v1", "v1/sub/"),
        ("hf://o/n@refs%2Fpr%2F1", "refs/pr/1", "refs%2Fpr%2F1/"),
        ("hf://o/n/sub", "feature/x", "feature%2Fx/sub/"),
        ("https://huggingface.co/o/n", "v1", "v1/"),
        ("https://hf.co/o/n/tree/v1/sub", "v1", "v1/sub/"),
    ],
)
def test_the_revision_of_a_repository_may_be_an_option(source: str, revision: str, base: str) -> None:
    assert locate(source, {}, revision=revision).base == f"https://huggingface.co/o/n/resolve/{base}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://o/n@main", "the source names the revision 'main', and the option another one, 'v1'"),
        ("https://huggingface.co/o/n/tree/main", "the source names the revision 'main'"),
        (
            "https://user:secret@host/model/",
            "revision is for repositories on Hugging Face .*, and not for https://host/",
        ),
        ("s3://bucket/model", "revision is for repositories on Hugging Face .*, and not for s3://bucket/model"),
        (".", "revision is for repositories on Hugging Face"),
    ],
)
@pytest.mark.parametrize("verb", [ndcache.fetch, ndcache.is_cached, ndcache.delete])
def test_row_114_a_revision_that_does_not_fit_is_refused(
    verb: Callable[..., object], source: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        verb(source, revision="v1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["fetch_file", "find_file", "delete_file"])
def test_single_files_are_of_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    simple_model(tmp_path / "www")
    hub = HubServer(tmp_path / "www", lfs=())
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    try:
        with ndcache.Loader(revision="v1") as at_v1, ndcache.Loader() as at_main:
            file = at_v1.fetch_file("hf://owner/model/tensor-cache.json")
            assert at_main.find_file("hf://owner/model/tensor-cache.json") is None
            getattr(at_v1, name)("hf://owner/model/tensor-cache.json")
            assert file.exists() == (name != "delete_file")
            with pytest.raises(ValueError, match="another one, 'v1'"):
                getattr(at_v1, name)("hf://owner/model@main/tensor-cache.json")
    finally:
        hub.close()


def test_row_43_a_pull_request_is_loaded(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = simple_model(tmp_path / "www" / "o" / "m" / "resolve" / "refs" / "pr" / "1")
    server = serve(tmp_path / "www")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    assert_same(ndcache.load("hf://o/m@refs/pr/1"), arrays)
    assert server.requests[0].path == "/o/m/resolve/refs%2Fpr%2F1/tensor-cache.json"
    assert ndcache.is_cached(f"{server.url}o/m/tree/refs/pr/1")


# --- the login ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"HF_TOKEN_PATH": "/a/b", "HF_HOME": "/c", "XDG_CACHE_HOME": "/d"}, "/a/b"),
        ({"HF_HOME": "/c", "XDG_CACHE_HOME": "/d"}, "/c/token"),
        ({"HF_TOKEN_PATH": "", "HF_HOME": "", "XDG_CACHE_HOME": "/d"}, "/d/huggingface/token"),
        ({}, "/home/.cache/huggingface/token"),
        ({"HF_HOME": "~/c"}, "/home/c/token"),
        ({"HF_HOME": "$SOMEWHERE/c"}, "/there/c/token"),
    ],
)
def test_row_43_the_file_with_the_login_is_found_as_the_variables_say(
    environ: dict[str, str], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home")
    monkeypatch.setenv("USERPROFILE", "/home")
    monkeypatch.setenv("SOMEWHERE", "/there")
    assert Path(token_path(environ)) == Path(path)


@pytest.mark.parametrize(
    ("content", "environ", "token"),
    [
        ("hf_file", {}, "hf_file"),
        ("  hf_file\r\n", {}, "hf_file"),
        ("", {}, None),
        (" \n", {}, None),
        ("hf_file", {"HF_TOKEN": "hf_variable"}, "hf_variable"),
        ("hf_file", {"HF_TOKEN": " hf_variable\n"}, "hf_variable"),
        ("hf_file", {"HF_TOKEN": " "}, "hf_file"),
        ("hf_file", {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, None),
        ("hf_file", {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "True", "HF_TOKEN": "hf_variable"}, None),
        ("hf_file", {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}, "hf_file"),
    ],
)
def test_row_43_the_login_is_read_and_given_to_the_endpoint_only(
    content: str, environ: dict[str, str], token: str | None, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(content)
    login = Login({"HF_HOME": str(tmp_path), **environ})
    assert login.token(HOME) == token
    assert login.token(HOME._replace(host="huggingface.co.evil.test")) is None
    assert login.token(HOME._replace(scheme="http")) is None
    assert login.token(HOME._replace(port=444)) is None


def _fifo(path: Path) -> None:
    os.mkfifo(path)


NO_TOKENS: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: None,
    "a directory": lambda path: path.mkdir(),
    "a pipe": _fifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a circle": lambda path: path.symlink_to(path),
    "unreadable, by root as well": lambda path: path.symlink_to("/proc/self/mem"),
}


@pytest.mark.parametrize("kind", NO_TOKENS)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="files of POSIX")
def test_row_43_files_that_hold_no_token(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    NO_TOKENS[kind](path)
    assert Login({"HF_TOKEN_PATH": str(path)}).token(HOME) is None


UNSENDABLE = [
    b"hf\na",
    b"hf_\x00\xff\xfe\x80",
    "hf_ü".encode(),
    "hf_–x".encode(),
    b"hf a",
    b"hf\ta",
    b"x" * 100_000,
    bytes(range(256)) * 4096,
]


@pytest.mark.parametrize("content", UNSENDABLE, ids=range(len(UNSENDABLE)))
def test_row_43_a_token_that_cannot_be_sent(
    content: bytes, tmp_path: Path, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", scripted.url)
    (tmp_path / "token").write_bytes(content)
    simple_model(tmp_path / "local")
    for name, value in {"HF_TOKEN_PATH": str(tmp_path / "token"), "HF_TOKEN": content.decode("latin-1")}.items():
        if "\0" in value:
            continue
        monkeypatch.setenv(name, value)
        with pytest.raises(ndcache.AuthError) as caught:
            ndcache.load("hf://o/m", retries=5)
        assert (value if name == "HF_TOKEN_PATH" else "HF_TOKEN") in str(caught.value)
        assert caught.value.attempts in (None, 1)
        assert value == str(tmp_path / "token") or value not in str(caught.value)
        ndcache.load(tmp_path / "local")  # the token does not matter here
    assert not scripted.connections


@pytest.fixture
def gated(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    """Serve an endpoint that wants the token in a login file."""
    simple_model(tmp_path / "www" / "o" / "m" / "resolve" / "main")
    server = serve(tmp_path / "www")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("hf_secret\n")
    return server


def test_row_43_the_login_is_used_at_the_endpoint_only(tmp_path: Path, gated: FileServer, serve: Serve) -> None:
    ndcache.load("hf://o/m")
    assert {request.headers.get("authorization") for request in gated.requests} == {"Bearer hf_secret"}
    other = serve(gated.directory)
    ndcache.load(f"{other.url}o/m/resolve/main/")
    assert {request.headers.get("authorization") for request in other.requests} == {None}


def test_row_43_the_login_goes_along_to_no_redirect(
    gated: FileServer, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "/o/m/resolve/main/params_shard_0.bin"
    shard = (gated.directory / name[1:]).read_bytes()
    manifest = (gated.directory / "o/m/resolve/main/tensor-cache.json").read_bytes()
    monkeypatch.setenv("HF_ENDPOINT", scripted.url)
    scripted.script = {
        "/o/m/resolve/main/tensor-cache.json": [reply(200, manifest)],
        name: [reply(302, b"", {"Location": gated.url + name[1:]})],
    }
    weights = ndcache.load("hf://o/m", names="layer.0")
    assert weights["layer.0"].tobytes() == shard
    assert [request.headers.get("authorization") for request in scripted.requests] == ["Bearer hf_secret"] * 2
    assert [request.headers.get("authorization") for request in gated.requests] == [None]


@pytest.mark.parametrize("given", ["auth", "header", "URL"])
def test_row_43_the_callers_credentials_go_before_the_login(
    gated: FileServer, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    with requests.Session() as session:
        if given == "auth":
            session.auth = ("user", "password")
        elif given == "header":
            session.headers["Authorization"] = "Bearer mine"
        else:
            monkeypatch.setenv("HF_ENDPOINT", gated.url.replace("//", "//user:password@"))
        ndcache.load("hf://o/m", session=session)
    sent = {request.headers.get("authorization") for request in gated.requests}
    assert sent == {"Bearer mine" if given == "header" else "Basic dXNlcjpwYXNzd29yZA=="}


def test_row_43_a_mirror_on_hugging_face_has_the_login(gated: FileServer, scripted: ScriptedServer) -> None:
    """It gets nothing from the caller's session, which is for the source."""
    manifest = (gated.directory / "o/m/resolve/main/tensor-cache.json").read_bytes()
    scripted.script["/tensor-cache.json"] = [reply(200, manifest)]
    with requests.Session() as session:
        session.auth = ("user", "password")
        ndcache.load(scripted.url, mirrors=["hf://o/m"], session=session)
    assert {request.headers.get("authorization") for request in gated.requests} == {"Bearer hf_secret"}
    assert {request.headers.get("authorization") for request in scripted.requests} == {"Basic dXNlcjpwYXNzd29yZA=="}


# --- endpoints ----------------------------------------------------------------------------------------


def test_row_43_another_endpoint_serves_the_same_model(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = simple_model(tmp_path / "www" / "sub" / "o" / "m" / "resolve" / "main")
    first, second = serve(tmp_path / "www" / "sub"), serve(tmp_path / "www")
    monkeypatch.setenv("HF_ENDPOINT", first.url)
    directory = ndcache.fetch(f"{first.url}o/m/tree/main")
    monkeypatch.setenv("HF_ENDPOINT", f"{second.url}sub")
    for source in (
        "hf://o/m",
        f"{second.url}sub/o/m",
        f"{second.url}sub/o/m/resolve/main/",
        "https://huggingface.co/o/m",
    ):
        assert ndcache.is_cached(source), source
        assert_same(ndcache.load(source, offline=True), arrays)
        assert ndcache.verify(source).ok
    assert not ndcache.is_cached(f"{first.url}o/m")  # this is not the endpoint any more
    weights = ndcache.load("hf://o/m")
    assert weights.stats.network_bytes == 0
    assert [request.path for request in second.requests] == ["/sub/o/m/resolve/main/tensor-cache.json"]
    with tvm.ArtifactCache() as cache:
        assert cache.has_all_keys(
            [f"{second.url}sub/o/m/resolve/main/params_shard_0.bin", "hf://o/m/params_shard_1.bin"]
        )
    monkeypatch.delenv("HF_ENDPOINT")
    assert ndcache.is_cached("hf://o/m")
    assert ndcache.delete("https://huggingface.co/o/m/tree/main") > 0
    assert not directory.exists()


def test_row_43_models_that_an_earlier_version_cached_are_found(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions had a directory for each endpoint."""
    arrays = simple_model(tmp_path / "www" / "o" / "m" / "resolve" / "main")
    server = serve(tmp_path / "www")
    former = ndcache.fetch(f"{server.url}o/m/resolve/main/")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    weights = ndcache.load("hf://o/m")
    assert_same(weights, arrays)
    assert weights.stats.network_bytes == 0
    assert ndcache.fetch("hf://o/m") == former
    assert ndcache.delete("hf://o/m") > 0
    assert not ndcache.is_cached("hf://o/m")
    assert not former.exists()


@pytest.mark.parametrize(
    "text", ["mirror.test", "ftp://mirror.test", "http://", "https://h/?x", "https://h/#x", "http://h\\@x"]
)
def test_row_43_an_endpoint_that_cannot_be_used(text: str) -> None:
    for source in ("hf://o/m", "https://host/x"):
        with pytest.raises(ValueError, match="HF_ENDPOINT"):
            locate(source, {"HF_ENDPOINT": text})


def test_an_endpoint_with_a_password(scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", scripted.url.replace("//", "//user:secret@"))
    with pytest.raises(ndcache.NotFoundError) as caught:
        ndcache.load("hf://o/m")
    assert "secret" not in str(caught.value)
    assert scripted.requests[0].headers["authorization"].startswith("Basic ")
