"""Companion files and safetensors files: several processes at once, and fetches that are killed."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache.files.folder import Folder
from ndcache.store.digest_index import DigestIndex
from ndcache.store.layered import open_layered

from ..helpers import kills
from ..helpers.companions import mlc_model
from ..helpers.hub import HubServer
from ..helpers.kills import CountingServer, left_behind, model_directory
from ..helpers.models import random_array, write_model
from ..helpers.processes import Zygote
from ..helpers.servers import Request
from ..helpers.tensor_files import write_files
from .children import MIB, Serve, wait_until

FILE = "model.safetensors"


def write_safetensors(folder: Path, files: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Write a model of 2 MiB, with a configuration."""
    arrays = {f"layer.{n}": random_array((MIB // 8,), seed=seed + n) for n in range(4)}
    write_files(folder, arrays, files)
    (folder / "config.json").write_text("{}")
    return arrays


def asked(server: CountingServer, name: str) -> list[Request]:
    return [request for request in server.requests if request.path == f"/{name}"]


def assert_same_files(directory: Path, model: Path) -> None:
    assert kills.digests(directory) == kills.digests(model)
    assert left_behind(directory) == []


@pytest.mark.parametrize("kind", ["MLC", "safetensors"])
def test_several_processes_bring_companion_files_without_harm(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path, tmp_path: Path, kind: str
) -> None:
    """Each file is published by a rename, so two that fetch the same one do not disturb each other."""
    mlc_model(model) if kind == "MLC" else write_safetensors(model, 2)
    server = counting(model)
    for options in ({}, {"force": True}, {"local_dir": tmp_path / "mine"}):
        children = [zygote.start(ndcache.fetch, server.url, cache_dir=cache_dir, **options) for _ in range(4)]
        (directory,) = {child.result() for child in children}
        assert_same_files(directory, model)
        assert ndcache.verify(directory).ok


def test_row_25_a_fetch_that_is_killed_at_a_companion_file_goes_on(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path
) -> None:
    mlc_model(model)
    server = counting(model)
    server.holds["/tokenizer.json"] = (10,)
    directory = model_directory(cache_dir, server.url)
    child = zygote.start(ndcache.fetch, server.url, cache_dir=cache_dir)
    wait_until(lambda: asked(server, "tokenizer.json") and len(list(directory.glob("*.bin"))) == 3)
    assert not child.kill()
    assert not (directory / "tokenizer.json").exists()
    server.requests.clear()
    zygote.start(ndcache.fetch, server.url, cache_dir=cache_dir).result()
    assert server.shard_requests() == []
    assert asked(server, "mlc-chat-config.json")[0].headers["if-none-match"], "it was there already"
    assert len(asked(server, "tokenizer.json")) == 1
    assert kills.digests(directory) == kills.digests(model)
    assert left_behind(directory, of_shards=True) == []


def test_row_95_a_manifest_whose_note_another_process_is_about_to_write(
    model: Path, counting: Serve, tmp_path: Path
) -> None:
    """Between the rename of a file and the note about it, it looks like one that ndcache did not put there."""
    mlc_model(model)
    server, target = counting(model), tmp_path / "mine"
    ndcache.fetch(server.url, local_dir=target)
    shutil.rmtree(target / ".ndcache" / "validators")
    directory, name = open_layered(target, server.url, None), "tensor-cache.json"
    directory.check_manifest(name, kills.digests(model)[name], MIB)
    with pytest.raises(ndcache.UnsafeCacheError, match="another file with the name"):
        directory.check_manifest(name, "0" * 64, MIB)


@pytest.mark.parametrize("local", [False, True], ids=["into the cache", "into a directory"])
@pytest.mark.parametrize("files", [1, 2])
def test_row_25_a_killed_fetch_of_a_safetensors_file_is_resumed(
    model: Path, counting: Serve, zygote: Zygote, cache_dir: Path, tmp_path: Path, files: int, local: bool
) -> None:
    write_safetensors(model, files)
    server = counting(model)
    name = FILE if files == 1 else "model-00002-of-00002.safetensors"
    size = (model / name).stat().st_size
    ndcache.read_manifest(server.url, cache_dir=cache_dir)  # so that the next body of this file is the whole file
    options: dict[str, Any] = {"local_dir": tmp_path / "mine"} if local else {}
    directory = options.get("local_dir", model_directory(cache_dir, server.url))
    server.holds[f"/{name}"] = (size // 2,)
    child = zygote.start(kills.fetch, server.url, cache_dir=cache_dir, max_workers=1, **options)
    wait_until(lambda: received(directory, name) == size // 2)
    assert not child.kill()
    server.requests.clear()
    zygote.start(kills.fetch, server.url, cache_dir=cache_dir, **options).result()
    asked_for = [request.headers.get("range") for request in asked(server, name)]
    assert asked_for[-1] == f"bytes={size // 2}-{size - 1}"
    assert_same_files(directory, model)


def received(directory: Path, name: str) -> int:
    """Return how many bytes of a file lie in its partial files."""
    total = 0
    for path in (directory / ".ndcache" / "parts").glob(f"{name}*"):
        if path.suffix != ".json":
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def add_digests(folder: Path, model: str) -> None:
    index = DigestIndex(Folder(folder), Folder(folder, ("default",)), "https://host/model/")
    for number in range(100):
        index.add(model, [ndcache.Shard(f"{number}.bin", 7, None, f"{number:064}", "raw-shard", ())])


def test_several_processes_add_to_the_index_of_digests(zygote: Zygote, tmp_path: Path) -> None:
    """Each appends its lines with one write, so none is lost or torn."""
    children = [zygote.start(add_digests, tmp_path, f"model{number}") for number in range(4)]
    for child in children:
        child.result()
    lines = [line for line in (tmp_path / ".default.digests").read_text().splitlines() if line]
    assert sorted(line.split(" ")[4:] for line in lines) == sorted(
        [f"model{model}", f"{number}.bin"] for model in range(4) for number in range(100)
    )


def test_a_digest_that_a_download_has_told_is_added_to_the_index(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "served", [{"x": random_array((100,))}], md5=False)
    server = HubServer(tmp_path / "served")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    try:
        ndcache.load("hf://owner/model").close()
    finally:
        server.close()
    shard = tmp_path / "served" / "params_shard_0.bin"
    assert kills.sha256(shard) in (cache_dir / ".default.digests").read_text()
