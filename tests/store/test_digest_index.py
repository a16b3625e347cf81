"""The index of digests, whose lines are only hints."""

from __future__ import annotations

from pathlib import Path

import pytest

from ndcache.files.folder import Folder
from ndcache.format.manifest import Shard
from ndcache.store import digest_index
from ndcache.store.digest_index import DigestIndex, Place

MD5, SHA256 = "0" * 32, "1" * 64


def index(tmp_path: Path, identity: str = "https://host/model/") -> DigestIndex:
    return DigestIndex(Folder(tmp_path), Folder(tmp_path, ("default",)), identity)


def shard(name: str, md5: str | None = MD5, sha256: str | None = None, nbytes: int = 7) -> Shard:
    return Shard(name, nbytes, md5, sha256, "raw-shard", ())


def test_an_md5_counts_for_one_server_and_a_sha256_for_all(tmp_path: Path) -> None:
    index(tmp_path).add("one", [shard("a b/ü.bin", MD5, SHA256), shard("other.bin", "2" * 32)])
    place = Place("one", "a b/ü.bin")
    assert index(tmp_path, "https://host:443/another/").find([shard("x.bin")]) == {"x.bin": (place,)}
    assert index(tmp_path, "http://host/model/").find([shard("x.bin")]) == {}
    assert index(tmp_path, "s3://bucket/").find([shard("x.bin", None, SHA256)]) == {"x.bin": (place,)}
    assert index(tmp_path).find([shard("x.bin", nbytes=8)]) == {}


def test_the_latest_places_come_first_and_lines_are_written_once(tmp_path: Path) -> None:
    for model in ("one", "two", "three", "four", "four"):
        index(tmp_path).add(model, [shard("a.bin")])
    assert [place.model for place in index(tmp_path).find([shard("x.bin")])["x.bin"]] == ["four", "three", "two"]
    assert (tmp_path / ".default.digests").read_text().split().count("four") == 1


@pytest.mark.parametrize(
    "line",
    [
        f"md5 {MD5} 7 https://host:443 ../model a.bin",
        f"md5 {MD5} 7 https://host:443 . a.bin",
        f"md5 {MD5} 7 https://host:443 model ../a.bin",
        f"md5 {MD5} 7 https://host:443 model /etc/passwd",
        f"md5 {MD5} 7 https://host:443 model .ndcache/source.json",
        f"md5 {MD5} 7 https://host",
        "\x00\xff" * 50,
    ],
)
def test_lines_that_lead_elsewhere_or_are_torn_are_skipped(tmp_path: Path, line: str) -> None:
    index(tmp_path).add("one", [shard("a.bin")])
    path = tmp_path / ".default.digests"
    path.write_bytes(path.read_bytes() + line.encode("latin-1"))
    index(tmp_path).add("two", [shard("a.bin")])
    assert [place.model for place in index(tmp_path).find([shard("x.bin")])["x.bin"]] == ["two", "one"]


def test_a_long_index_loses_models_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_index, "_MAX_BYTES", 1000)
    (tmp_path / "default/here").mkdir(parents=True)
    index(tmp_path).add("here", [shard("a.bin")])
    for number in range(40):
        index(tmp_path).add(f"gone{number}", [shard("a.bin")])
    path = tmp_path / ".default.digests"
    assert path.stat().st_size < 2000
    assert "here a.bin" in path.read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".default.digests", "default"]


def test_a_cache_that_cannot_be_written_has_no_index(tmp_path: Path) -> None:
    (tmp_path / ".default.digests").mkdir()
    index(tmp_path).add("one", [shard("a.bin")])
    assert index(tmp_path).find([shard("a.bin")]) == {}
