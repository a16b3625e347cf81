"""`fetch` into a directory of the user's; row 95 of docs/faults.rst."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache.files import copying

from ..helpers.companions import mlc_model, write_json
from ..helpers.disks import HAS_LOOP_DEVICES, mounted_xfs, shares_blocks
from ..helpers.loads import wait_until
from ..helpers.models import assert_same, random_array, simple_model, write_model
from ..helpers.servers import FileServer, ScriptedServer, reply, then_close
from ..helpers.tensor_files import write_files

Serve = Callable[..., FileServer]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    mlc_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def contents(directory: Path) -> dict[str, bytes]:
    """Return the files of a model, without ndcache's own."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def inodes(directory: Path) -> set[int]:
    return {path.stat().st_ino for path in directory.rglob("*") if path.is_file()}


def asked(server: FileServer) -> int:
    """Return how many requests there were since the last call."""
    count = len(server.requests)
    server.requests.clear()
    return count


def test_a_model_goes_into_the_directory_only(model: Path, target: Path, cache_dir: Path, serve: Serve) -> None:
    server = serve(model)
    assert ndcache.fetch(server.url, local_dir=target) == target
    assert contents(target) == contents(model)
    assert not cache_dir.exists()
    asked(server)
    ndcache.fetch(server.url, local_dir=str(target))
    assert asked(server) == 1, "only the manifest is asked for again"
    with ndcache.load(target) as weights:
        assert weights.stats.cache_bytes == weights.manifest.nbytes


@pytest.mark.parametrize("offline", [False, True])
def test_what_the_cache_has_is_copied(
    model: Path, target: Path, cache_dir: Path, serve: Serve, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(model)
    cached = ndcache.fetch(server.url)
    (cached / "params_shard_1.bin").unlink() if not offline else None
    before = inodes(cache_dir)
    asked(server)
    ndcache.fetch(server.url, local_dir=target, offline=offline)
    assert contents(target) == contents(model)
    assert asked(server) == (0 if offline else 2), "the manifest, and the shard that the cache lacks"
    assert inodes(cache_dir) == before
    assert not inodes(target) & before, "a hard link would let an edit reach the cache"
    (target / "mlc-chat-config.json").write_text("edited")
    assert ndcache.verify(server.url).ok


def test_blocks_are_shared_if_the_file_system_says_so(
    model: Path, target: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file systems of most machines cannot, so the system's answer is a stand-in's."""
    cloned: list[int] = []

    def clone(handle: int, request: int, source: int) -> int:
        assert request == 0x40049409
        data = os.pread(source, 1 << 20, 0)
        cloned.append(os.pwrite(handle, data, 0))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    monkeypatch.setattr(copying, "_PIECE_BYTES", 0)  # nothing can be copied
    server = serve(model)
    ndcache.fetch(server.url)
    ndcache.fetch(server.url, local_dir=target)
    assert contents(target) == contents(model)
    assert len(cloned) == len(contents(model))


if HAS_LOOP_DEVICES:

    @pytest.mark.once
    def test_blocks_are_shared_on_xfs(
        model: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = serve(model)
        with mounted_xfs(tmp_path / "disk") as disk:
            cached = ndcache.fetch(server.url, cache_dir=disk / "cache")
            with monkeypatch.context() as patch:
                patch.setattr(copying, "_PIECE_BYTES", 0)  # nothing can be copied
                target = ndcache.fetch(server.url, cache_dir=disk / "cache", local_dir=disk / "target")
            assert contents(target) == contents(model)
            assert all(shares_blocks(path) for path in target.glob("*.bin"))
            with open(target / "params_shard_0.bin", "r+b") as file:
                file.write(b"edited")
            assert contents(cached) == contents(model), "a block that is written is no longer shared"


def test_an_interrupted_download_is_resumed(model: Path, target: Path, scripted: ScriptedServer) -> None:
    data = (model / "params_shard_0.bin").read_bytes()
    half, etag = len(data) // 2, {"ETag": '"one"'}
    for name, body in contents(model).items():
        scripted.script[f"/{name}"] = [reply(200, body)]
    rest = {**etag, "Content-Range": f"bytes {half}-{len(data) - 1}/{len(data)}"}
    scripted.script["/params_shard_0.bin"] = [then_close(reply(200, data, etag)[:-half]), reply(206, data[half:], rest)]
    with pytest.raises(ndcache.TruncatedError):
        ndcache.fetch(scripted.url, local_dir=target, retries=0)
    ndcache.fetch(scripted.url, local_dir=target)
    assert contents(target) == contents(model)
    ranges = [request.headers.get("range") for request in scripted.requests_for("/params_shard_0.bin")]
    assert ranges == [None, f"bytes={half}-{len(data) - 1}"]


def test_helper_processes_fill_the_directory(model: Path, target: Path, cache_dir: Path, serve: Serve) -> None:
    ndcache.fetch(serve(model, rate=1 << 20).url, local_dir=target, processes=2)
    assert contents(target) == contents(model)
    assert list(cache_dir.rglob("*.bin*")) == []


def test_a_local_model_is_copied_and_brought_up_to_date(model: Path, target: Path) -> None:
    assert ndcache.fetch(model, local_dir=target) == target
    assert contents(target) == contents(model)
    before = inodes(target)
    ndcache.fetch(model, local_dir=target)
    assert inodes(target) == before
    arrays = simple_model(model, shards=1, shard_bytes=1 << 12)
    write_json(model / "tokenizer.json", {})
    ndcache.fetch(model, local_dir=target)
    assert (target / "tokenizer.json").read_text() == "{}"
    with ndcache.load(target) as weights:
        assert_same(weights, arrays)
    assert ndcache.fetch(model, local_dir=model) == model


def test_a_local_model_of_links_is_copied(model: Path, target: Path, tmp_path: Path) -> None:
    """The folders of huggingface_hub's cache have links to files elsewhere."""
    links = tmp_path / "links"
    links.mkdir()
    for path in model.iterdir():
        (links / path.name).symlink_to(path)
    ndcache.fetch(links, local_dir=target)
    assert contents(target) == contents(model)
    assert not any(path.is_symlink() for path in target.iterdir())


@pytest.mark.parametrize("files", [1, 2])
def test_a_local_model_in_safetensors_files_is_copied_with_its_companions(
    tmp_path: Path, target: Path, files: int
) -> None:
    model = tmp_path / "safetensors"
    arrays = {name: np.full(3, ord(name), np.float32) for name in "ab"}
    written = write_files(model, arrays, files)
    texts = {"config.json", "vocab.txt", "spiece.model", "chat_template.jinja"}
    (model / "onnx").mkdir()
    for name in (*texts, "model.py", "weights.pkl", "README.md", "onnx/config.json", "onnx/more.md"):
        (model / name).write_text(name)
    index = {"model.safetensors.index.json"} if files > 1 else set()
    assert set(contents(ndcache.fetch(model, local_dir=target))) == {*written, *index, *texts}
    with ndcache.load(target) as weights:
        assert_same(weights, arrays)
    more = ndcache.fetch(model, local_dir=tmp_path / "more", include=["*.md", "model.py"], exclude="vocab.txt")
    assert set(contents(more)) == {*written, *index, *texts, "README.md", "model.py"} - {"vocab.txt"}
    assert (more / "onnx" / "more.md").exists()
    for missing in ("absent.json", "*.absent"):
        with pytest.raises(ndcache.NotFoundError, match="absent"):
            ndcache.fetch(model, local_dir=tmp_path / "more", include=missing)


@pytest.mark.parametrize(
    ("listed", "error"),
    [("absent.json", ndcache.NotFoundError), ("../secret", ndcache.UnsafePathError), ("a.py", ndcache.UnsafePathError)],
)
def test_row_93_a_local_model_that_lists_what_is_missing_or_must_not_be_copied(
    model: Path, target: Path, listed: str, error: type[ndcache.NdcacheError]
) -> None:
    write_json(model / "mlc-chat-config.json", {"tokenizer_files": [listed]})
    for name in ("../secret", "a.py"):
        (model / name).write_text("secret")
    with pytest.raises(error) as caught:
        ndcache.fetch(model, local_dir=target)
    assert caught.value.shard == listed
    assert set(contents(target)) == {path.name for path in model.glob("*.bin")} | {"tensor-cache.json"}
    ndcache.fetch(model, local_dir=target, exclude=listed)


def a_file(target: Path) -> None:
    target.write_text("mine")


def another_model(target: Path) -> None:
    simple_model(target, shards=2, shard_bytes=1 << 12)


def half_another_model(target: Path) -> None:
    another_model(target)
    (target / "tensor-cache.json").unlink()


def another_model_of_ndcache(target: Path) -> None:
    other = target.parent / "other"
    simple_model(other, shards=1)
    ndcache.fetch(other, local_dir=target)


def a_configuration(target: Path) -> None:
    target.mkdir()
    (target / "mlc-chat-config.json").write_text("mine")


def a_link(target: Path) -> None:
    target.mkdir()
    (target.parent / "mine").write_text("mine")
    (target / "params_shard_1.bin").symlink_to(target.parent / "mine")


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (a_file, ndcache.CacheUnavailableError, "is a file, not a directory"),
        (another_model, ndcache.UnsafeCacheError, "another file with the name tensor-cache.json"),
        (half_another_model, ndcache.UnsafeCacheError, "another file with the name params_shard_[01].bin"),
        (another_model_of_ndcache, ndcache.UnsafeCacheError, "has another model"),
        (a_configuration, ndcache.UnsafeCacheError, "another file with the name mlc-chat-config.json"),
        (a_link, ndcache.UnsafeCacheError, "another file with the name params_shard_1.bin"),
    ],
)
@pytest.mark.parametrize("is_cached", [False, True])
def test_row_95_a_directory_that_has_something_else(
    model: Path,
    target: Path,
    serve: Serve,
    prepare: Callable[[Path], None],
    error: type[ndcache.NdcacheError],
    message: str,
    is_cached: bool,
) -> None:
    server = serve(model)
    if is_cached:
        ndcache.fetch(server.url)
    prepare(target)
    before: dict[str, Any] = {"": target.read_bytes()} if target.is_file() else contents(target)
    with pytest.raises(error, match=message):
        ndcache.fetch(server.url, local_dir=target)
    after = {"": target.read_bytes()} if target.is_file() else contents(target)
    assert {name: after.get(name) for name in before} == before, "nothing of it is lost"


def test_row_95_another_model_that_comes_at_the_same_time(
    model: Path, target: Path, tmp_path: Path, serve: Serve
) -> None:
    simple_model(tmp_path / "other")
    server, other = serve(tmp_path / "other"), serve(model)
    server.gated_manifest = True
    server.gate.clear()
    with ThreadPoolExecutor() as threads:
        late = threads.submit(ndcache.fetch, server.url, local_dir=target)
        wait_until(lambda: bool(server.requests))  # it has found the directory empty
        ndcache.fetch(other.url, local_dir=target)
        server.gate.set()
        with pytest.raises(ndcache.UnsafeCacheError, match="has another model"):
            late.result()
    assert contents(target) == contents(model)


def test_row_95_errors_name_the_option_that_chooses_another_directory(
    model: Path, tmp_path: Path, serve: Serve
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ndcache.CacheUnavailableError, match=r"Choose another one: local_dir, --local-dir"):
        ndcache.fetch(serve(model).url, local_dir=tmp_path / "file" / "below")


def test_an_empty_text_is_not_the_working_directory(model: Path) -> None:
    with pytest.raises(ValueError, match="local_dir is empty"):
        ndcache.fetch(model, local_dir="")


def test_shards_are_complete_even_if_few_tensors_are_wanted(target: Path, tmp_path: Path, serve: Serve) -> None:
    """The cache keeps ranges of them in partial files, which no other program reads."""
    arrays = {f"t{i}": random_array((2 << 20,), "uint8", i) for i in range(3)}
    write_model(tmp_path / "large", [arrays], md5=False)
    server = serve(tmp_path / "large")
    (shard,) = (tmp_path / "large").glob("*.bin")
    plan = ndcache.fetch(server.url, names=["t1"], local_dir=target, dry_run=True)
    assert {file.name: file.to_fetch for file in plan.files}[shard.name] == shard.stat().st_size
    ndcache.fetch(server.url, names={"t1": slice(0, 5)}, local_dir=target)
    assert (target / shard.name).read_bytes() == shard.read_bytes()
    assert_same(ndcache.load(target), arrays)
