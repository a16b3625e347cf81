"""Hugging Face: revisions, the login, endpoints that hold the same models, and branches that move."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

import ndcache
from ndcache import tvm
from ndcache.location.hub import Login, at_commit, branch_url, commit_of, hf_endpoint, token_path
from ndcache.location.locate import locate
from ndcache.urls.url import Origin

from ..helpers.models import assert_same, simple_model
from ..helpers.servers import Connection, FileServer, Request, ScriptedServer, reply, then_close

Serve = Callable[..., FileServer]
A, B = "a" * 40, "b" * 40
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
def test_row_43_revisions_and_folders(source: str, revision: str, folder: str) -> None:
    location = locate(source, {})
    assert location.base == f"https://huggingface.co/o/n/resolve/{revision}/{folder}"
    assert not location.query


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
def test_row_43_where_the_token_is(environ: dict[str, str], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_row_43_which_token(content: str, environ: dict[str, str], token: str | None, tmp_path: Path) -> None:
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


def test_row_43_one_model_at_all_endpoints(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
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


# --- branches -----------------------------------------------------------------------------------------


class Hub:
    """A repository whose branch ``main`` points to a commit of `server`; each commit is a directory."""

    def __init__(self, server: ScriptedServer, root: Path) -> None:
        self.server, self.root, self.main = server, root, A
        self.says: Callable[[str], dict[str, str]] = lambda commit: {"X-Repo-Commit": commit}
        self.moves_to: str | None = None
        for commit in (A, B):
            names = sorted(path.name for path in (root / commit).iterdir())
            for revision in (commit, "main"):
                for name in names:
                    server.script[f"/o/m/resolve/{revision}/{name}"] = [self.answer]

    def answer(self, connection: Connection, request: Request) -> None:
        _, _, _, _, revision, name = request.path.split("/")
        commit = self.main if revision == "main" else revision
        data = (self.root / commit / name).read_bytes()
        headers = {"ETag": f'"{hash(data)}"', **self.says(commit)}
        if request.headers.get("if-none-match") == headers["ETag"]:
            connection.send(reply(304, b"", headers, length=None))
        else:
            connection.send(reply(200, data, headers))
        if name.endswith(".json") and self.moves_to is not None:
            self.main = self.moves_to

    def asked(self) -> list[str]:
        paths = [request.path.removeprefix("/o/m/resolve/") for request in self.server.requests]
        self.server.requests.clear()
        return sorted(paths, key=lambda path: not path.endswith(".json"))


@pytest.fixture
def hub(tmp_path: Path, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> Hub:
    for seed, commit in enumerate((A, B)):
        simple_model(tmp_path / commit, shards=2 + seed, shard_bytes=64 << seed)
    monkeypatch.setenv("HF_ENDPOINT", scripted.url)
    return Hub(scripted, tmp_path)


SHARDS = ["params_shard_0.bin", "params_shard_1.bin", "params_shard_2.bin"]


def test_row_43_a_branch_that_moves_during_the_load(hub: Hub) -> None:
    hub.moves_to = B
    assert len(ndcache.load("hf://o/m", max_workers=1)) == 2
    assert hub.asked() == ["main/tensor-cache.json", *(f"{A}/{name}" for name in SHARDS[:2])]
    assert len(ndcache.load("hf://o/m", max_workers=1)) == 3  # the next load follows the branch
    assert hub.asked() == ["main/tensor-cache.json", *(f"{B}/{name}" for name in SHARDS)]
    assert len(ndcache.load("hf://o/m")) == 3
    assert hub.asked() == ["main/tensor-cache.json"]
    assert len(ndcache.load("hf://o/m", offline=True)) == 3


def test_row_43_a_manifest_that_has_not_changed_tells_the_commit_too(hub: Hub) -> None:
    directory = ndcache.fetch("hf://o/m")
    hub.asked()
    for name in SHARDS[:2]:
        (directory / name).unlink()
    hub.moves_to = B
    assert len(ndcache.load("hf://o/m", max_workers=1)) == 2
    assert hub.asked() == ["main/tensor-cache.json", *(f"{A}/{name}" for name in SHARDS[:2])]


@pytest.mark.parametrize(
    "commit", ["", "main", "a" * 39, "A" * 40, "a" * 41, "../" + "a" * 37, "a" * 39 + "/", "\x1b" * 40, "٣" * 40]
)
def test_row_43_a_commit_that_is_none_is_left_alone(hub: Hub, commit: str) -> None:
    hub.says = lambda _: {"X-Repo-Commit": commit.encode().decode("latin-1")}
    ndcache.load("hf://o/m", max_workers=1)
    assert hub.asked() == ["main/tensor-cache.json", *(f"main/{name}" for name in SHARDS[:2])]


def test_row_43_a_commit_that_was_asked_for(hub: Hub) -> None:
    hub.says = lambda _: {"X-Repo-Commit": B}
    ndcache.load(f"hf://o/m@{A}", max_workers=1)
    assert hub.asked() == [f"{A}/tensor-cache.json", *(f"{A}/{name}" for name in SHARDS[:2])]


def test_row_43_other_servers_have_no_commits(hub: Hub, tmp_path: Path) -> None:
    hub.server.script["/m/tensor-cache.json"] = [
        reply(200, (tmp_path / A / "tensor-cache.json").read_bytes(), {"X-Repo-Commit": A})
    ]
    for name in SHARDS[:2]:
        hub.server.script[f"/m/{name}"] = [reply(200, (tmp_path / A / name).read_bytes())]
    ndcache.load(hub.server.url + "m/")
    assert all(request.path.startswith("/m/") for request in hub.server.requests)


def test_row_43_only_the_endpoint_says_what_commit_it_is(hub: Hub, serve: Serve, tmp_path: Path) -> None:
    storage = ScriptedServer()
    storage.script["/x"] = [reply(200, (tmp_path / A / "tensor-cache.json").read_bytes(), {"X-Repo-Commit": B})]
    hub.server.script["/o/m/resolve/main/tensor-cache.json"] = [
        reply(302, b"", {"Location": storage.url + "x", "X-Repo-Commit": A})
    ]
    ndcache.load("hf://o/m", max_workers=1)
    storage.close()
    assert hub.asked() == ["main/tensor-cache.json", *(f"{A}/{name}" for name in SHARDS[:2])]


def test_row_43_a_transfer_goes_on_at_another_commit(
    tmp_path: Path, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that changes other files does not restart the transfer, as the ETag of this one is the same."""
    simple_model(tmp_path / "www", shards=1, shard_bytes=1 << 16)
    manifest, data = ((tmp_path / "www" / name).read_bytes() for name in ("tensor-cache.json", SHARDS[0]))
    monkeypatch.setenv("HF_ENDPOINT", scripted.url)
    etag, half = {"ETag": '"same"'}, len(data) // 2
    rest = {**etag, "Content-Range": f"bytes {half}-{len(data) - 1}/{len(data)}"}
    scripted.script = {
        "/o/m/resolve/main/tensor-cache.json": [reply(200, manifest, {"X-Repo-Commit": commit}) for commit in (A, B)],
        f"/o/m/resolve/{A}/{SHARDS[0]}": [then_close(reply(200, data, etag)[:-half])],
        f"/o/m/resolve/{B}/{SHARDS[0]}": [reply(206, data[half:], rest)],
    }
    with pytest.raises(ndcache.TruncatedError):
        ndcache.fetch("hf://o/m", retries=0)
    weights = ndcache.load("hf://o/m", retries=0)
    assert weights["layer.0"].tobytes() == data
    assert weights.stats.resumed_bytes == half
    last = scripted.requests[-1]
    assert (last.headers["range"], last.headers["if-range"]) == (f"bytes={half}-{len(data) - 1}", '"same"')


@pytest.mark.parametrize(
    ("url", "name", "moved"),
    [
        ("https://h/o/m/resolve/main/a/b?c", "https://h/o/m/resolve/main", f"https://h/o/m/resolve/{A}/a/b?c"),
        (
            "https://h/x/y/o/m/resolve/refs%2Fpr%2F1/a",
            "https://h/x/y/o/m/resolve/refs%2Fpr%2F1",
            f"https://h/x/y/o/m/resolve/{A}/a",
        ),
        (
            "https://h/o/m/resolve/main/o/m/resolve/x/a",
            "https://h/o/m/resolve/main",
            f"https://h/o/m/resolve/{A}/o/m/resolve/x/a",
        ),
        (f"https://h/o/m/resolve/{B}/a", None, f"https://h/o/m/resolve/{A}/a"),
        ("https://h/m/a", None, "https://h/m/a"),
        ("https://h/m?/o/m/resolve/main/a", None, "https://h/m?/o/m/resolve/main/a"),
    ],
)
def test_urls_of_a_branch(url: str, name: str | None, moved: str) -> None:
    assert branch_url(url) == name
    assert at_commit(url, A) == moved


def test_commits_in_headers() -> None:
    assert commit_of({"X-Repo-Commit": f" {A} "}) == A
    assert commit_of({}) is None
    assert hf_endpoint({}).origin == HOME
