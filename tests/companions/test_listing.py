"""Companion files by pattern, where the server lists the files; and which of a listing are companions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ndcache
from ndcache.companions.rules import is_usual

from ..helpers.companions import mlc_model
from ..helpers.hub import COMMIT, HubServer
from ..helpers.tensor_files import write_files


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    served = tmp_path / "served"
    mlc_model(served)
    (served / "docs").mkdir()
    for name in ("README.md", "docs/more.md", "docs/x y.md", "model.py", "other.bin"):
        (served / name).write_text(name)
    server = HubServer(served)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


@pytest.mark.parametrize(
    ("patterns", "added"),
    [
        (["*.md"], ["README.md", "docs/more.md", "docs/x y.md"]),
        (["docs/*"], ["docs/more.md", "docs/x y.md"]),
        (["*"], ["README.md", "docs/more.md", "docs/x y.md"]),
        (["*.py"], ["model.py"]),
    ],
    ids=str,
)
def test_patterns_choose_from_the_listing(hub: HubServer, patterns: list[str], added: list[str]) -> None:
    """Code and other weights come only by their name or suffix."""

    def files() -> set[str]:
        found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
        return {name for name in found if not name.startswith(".ndcache/")}

    directory = ndcache.fetch("hf://owner/model")
    usual = files()
    hub.asked()
    ndcache.fetch("hf://owner/model", include=patterns)
    assert files() - usual == set(added)
    assert f"/api/models/owner/model/revision/{COMMIT}" in hub.asked(), "at the commit of the manifest"
    ndcache.fetch("hf://owner/model", include=patterns)
    assert hub.asked() == ["tensor-cache.json"]


def test_a_pattern_that_matches_nothing(hub: HubServer) -> None:
    with pytest.raises(ndcache.NotFoundError, match=r"'\*\.jinja' matches no file"):
        ndcache.fetch("hf://owner/model", include=["*.jinja"])
    with pytest.raises(
        ndcache.UnsafePathError, match=r"'other\*' matches only files that may hold code .* 'other\.bin'"
    ):
        ndcache.fetch("hf://owner/model", include=["other*"])
    assert ndcache.is_cached("hf://owner/model")


def test_the_digest_of_a_listing_or_a_redirect_is_compared(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    hub.storage.directory = tmp_path / "other"
    for path in hub.directory.glob("*.*"):
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "other" / "tokenizer.json").write_bytes((hub.directory / "tokenizer.json").read_bytes()[::-1])
    with pytest.raises(ndcache.ChecksumError, match="sha256") as caught:
        ndcache.fetch("hf://owner/model", retries=0)
    assert caught.value.shard == "tokenizer.json"


@pytest.mark.parametrize(
    ("name", "is_companion"),
    [
        *((name, True) for name in ("config.json", "merges.txt", "tokenizer.model", "chat_template.jinja")),
        *((name, False) for name in ("onnx/config.json", "model.py", "pytorch_model.bin", "README.md", "x.pkl")),
        *((name, False) for name in ("ndarray-cache-b16.json", "tensor-cache.json", "fp16.safetensors.index.json")),
    ],
)
def test_companions_of_a_safetensors_repository(name: str, is_companion: bool) -> None:
    assert is_usual(name) is is_companion


def test_the_manifest_of_another_model_in_the_repository_is_no_companion(hub: HubServer, tmp_path: Path) -> None:
    """It would hide the model that was fetched, and in the cache the other model would lose its shards."""
    arrays = {name: np.arange(4, dtype=np.float32) for name in ("a", "b")}
    write_files(hub.directory, arrays, 2)
    shard = "hf://owner/model/model-00001-of-00002.safetensors"
    with ndcache.load("hf://owner/model"):
        pass
    with ndcache.load(shard) as weights:
        assert list(weights) == ["a"]
    assert ndcache.is_cached("hf://owner/model"), "the cache still has the shards of the other model"
    directory = ndcache.fetch(shard, local_dir=tmp_path / "mine")
    assert list(ndcache.load(directory)) == ["a"]
    assert ndcache.verify(directory).ok
    copied = ndcache.fetch(directory / "model-00001-of-00002.safetensors", local_dir=tmp_path / "copy")
    assert list(ndcache.load(copied)) == ["a"]
