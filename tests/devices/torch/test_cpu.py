"""Torch tensors on the CPU: views of private maps, which take writes that never reach the file."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
import ndcache.torch
from ndcache.devices import cpu as cpu_module
from ndcache.format.numpy_dtypes import DTYPES

from ...helpers import models
from ...helpers.devices import SHAPES, assert_tensors, relabel
from ...helpers.requirements import need_module
from ...helpers.servers import FileServer

pytestmark = pytest.mark.torch


@pytest.fixture
def torch() -> Any:
    return need_module("torch")


def write_all(directory: Path, gap: bytes = b"", encoding: str = "raw") -> dict[str, np.ndarray[Any, Any]]:
    """Write a model with every dtype in every shape, and a shard without bytes."""
    arrays = {
        f"{dtype} {shape}": models.random_array(shape, dtype, seed=n)
        for n, shape in enumerate(SHAPES)
        for dtype in DTYPES
    }
    items = list(arrays.items())
    empty = {"alone": np.empty((0, 4), np.float32)}
    models.write_model(directory, [dict(items[::2]), dict(items[1::2]), empty], gap=gap, encoding=encoding)
    return dict(items[::2]) | dict(items[1::2]) | empty


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.bin")}


def stored(torch: Any, tensor: Any) -> bytes:
    """Return the bytes of a tensor."""
    return bytes(tensor.flatten().view(torch.uint8).numpy()) if tensor.numel() else b""


def invert(torch: Any, tensor: Any) -> None:
    """Change every byte of a tensor in place."""
    if tensor.numel():
        tensor.view(-1).view(torch.uint8).bitwise_not_()


@pytest.mark.parametrize("gap", [b"", b"x", b"xyz"], ids=["packed", "1 off", "3 off"])
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
@pytest.mark.parametrize("decode", [True, False])
def test_row_81_what_is_written_to_tensors_never_reaches_the_files(
    torch: Any, tmp_path: Path, gap: bytes, encoding: str, decode: bool
) -> None:
    write_all(tmp_path, gap, encoding)
    before = digests(tmp_path)
    weights = ndcache.torch.load(tmp_path, decode=decode)
    for tensor in weights.values():
        kept = stored(torch, tensor)
        invert(torch, tensor)
        assert stored(torch, tensor) == bytes(255 - byte for byte in kept)
    assert digests(tmp_path) == before
    again = ndcache.torch.load(tmp_path, decode=decode)
    for name, tensor in weights.items():  # no tensor shares its memory with that of another load, or its neighbour
        invert(torch, tensor)
        assert stored(torch, tensor) == stored(torch, again[name]), name


def test_row_81_what_is_written_to_tensors_never_reaches_the_cache(
    torch: Any, tmp_path: Path, serve: Callable[..., FileServer]
) -> None:
    arrays = write_all(tmp_path / "model")
    server = serve(tmp_path / "model")
    for _ in range(2):  # downloaded, and cached
        with ndcache.torch.load(server.url) as weights:
            assert_tensors(weights, arrays)
            for tensor in weights.values():
                invert(torch, tensor)
    directory = ndcache.fetch(server.url)
    assert digests(directory) == digests(tmp_path / "model")
    assert ndcache.verify(server.url).ok


def test_raw_tensors_are_views_of_maps(torch: Any, tmp_path: Path) -> None:
    models.simple_model(tmp_path, shards=1, shard_bytes=1 << 20)
    weights = ndcache.torch.load(tmp_path)
    maps = Path("/proc/self/maps")
    if maps.exists():
        (line,) = [line for line in maps.read_text().splitlines() if line.endswith("params_shard_0.bin")]
        assert line.split()[1] == "rw-p"
        first, end = (int(number, 16) for number in line.split()[0].split("-"))
        assert first <= weights["layer.0"].data_ptr() < end
    assert weights["layer.0"].untyped_storage().nbytes() == 1 << 20


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list maps")
def test_a_file_is_unmapped_with_the_last_tensor_of_it(torch: Any, tmp_path: Path) -> None:
    def is_mapped() -> bool:
        return "params_shard_0.bin" in Path("/proc/self/maps").read_text()

    models.simple_model(tmp_path, shards=1, shard_bytes=1 << 20)
    gc.disable()  # the last reference is enough
    try:
        for load in (ndcache.torch.load, ndcache.torch.stream):
            tensor = dict(load(tmp_path))["layer.0"]
            part = tensor[5:]
            del tensor
            assert is_mapped()
            assert part.sum().isfinite()
            del part
            assert not is_mapped()
    finally:
        gc.enable()


def test_each_tensor_has_a_storage_of_its_own(torch: Any, tmp_path: Path) -> None:
    arrays = {f"t{n}": models.random_array((5,), seed=n) for n in range(3)}
    models.write_model(tmp_path, [arrays])
    for tensor in ndcache.torch.load(tmp_path).values():
        assert tensor.storage_offset() == 0
        assert tensor.untyped_storage().nbytes() == 20


@pytest.mark.parametrize("gap", [b"", b"x"])
def test_tensors_are_aligned(torch: Any, tmp_path: Path, gap: bytes) -> None:
    write_all(tmp_path, gap)
    for name, tensor in ndcache.torch.load(tmp_path).items():
        assert tensor.data_ptr() % tensor.element_size() == 0, name
        assert tensor.is_contiguous()


@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
@pytest.mark.parametrize("decode", [True, False])
def test_copies_do_not_need_the_file(torch: Any, tmp_path: Path, encoding: str, decode: bool) -> None:
    write_all(tmp_path, encoding=encoding)
    expected = {name: stored(torch, each) for name, each in ndcache.torch.load(tmp_path, decode=decode).items()}
    weights = ndcache.torch.load(tmp_path, copy=True, decode=decode)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) not in maps.read_text()
    for path in tmp_path.glob("*.bin"):
        path.write_bytes(b"")
    for name, tensor in weights.items():
        assert stored(torch, tensor) == expected[name], name


def test_files_that_cannot_be_mapped_are_read(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no maps here")

    monkeypatch.setattr(cpu_module, "map_file", refuse)
    arrays = write_all(tmp_path)
    before = digests(tmp_path)
    with caplog.at_level(logging.DEBUG, "ndcache"):
        weights = ndcache.torch.load(tmp_path)
    assert "no maps here" in caplog.text
    assert_tensors(weights, arrays)
    for tensor in weights.values():
        invert(torch, tensor)
    assert digests(tmp_path) == before


def test_every_bfloat16_is_expanded_bit_by_bit(torch: Any, tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    models.write_model(tmp_path, [{"t": bits.view("<u2")}])
    relabel(tmp_path, "float32", "f32-to-bf16")
    tensor = ndcache.torch.load(tmp_path)["t"]
    assert tensor.dtype == torch.float32
    assert (tensor.numpy().view(np.uint32) == bits.astype(np.uint32) << 16).all()


def test_tensors_work_with_autograd(torch: Any, tmp_path: Path) -> None:
    models.simple_model(tmp_path, shards=1, shard_bytes=64)
    tensor = ndcache.torch.load(tmp_path)["layer.0"].requires_grad_()
    (tensor * 2).sum().backward()
    assert (tensor.grad == 2).all()


def test_a_stream_gives_the_same(torch: Any, tmp_path: Path) -> None:
    arrays = write_all(tmp_path)
    assert_tensors(dict(ndcache.torch.stream(tmp_path)), arrays)
    names = ["uint32 (3,)", "bool ()"]
    assert set(dict(ndcache.torch.stream(tmp_path, names=names))) == set(names)
