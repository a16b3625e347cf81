"""Branches on Hugging Face that move during a load; row 43 of docs/faults.rst."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import ndcache
from ndcache.location.hub import at_commit, branch_url, commit_of, hf_endpoint
from ndcache.urls.url import Origin

from ..helpers.models import simple_model
from ..helpers.servers import Connection, FileServer, Request, ScriptedServer, reply, then_close

Serve = Callable[..., FileServer]
A, B = "a" * 40, "b" * 40
HOME = Origin("https", "huggingface.co", 443)


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
def test_row_43_a_malformed_commit_is_ignored(hub: Hub, commit: str) -> None:
    hub.says = lambda _: {"X-Repo-Commit": commit.encode().decode("latin-1")}
    ndcache.load("hf://o/m", max_workers=1)
    assert hub.asked() == ["main/tensor-cache.json", *(f"main/{name}" for name in SHARDS[:2])]


def test_row_43_a_revision_that_is_a_commit_is_kept(hub: Hub) -> None:
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


def test_row_43_an_interrupted_transfer_is_resumed_at_another_commit(
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
