"""CUDA itself, on a machine that has it: ``pytest -m cuda``."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
import ndcache.torch
from ndcache.devices.torch import opening, pinned
from ndcache.devices.torch.api import CudaApi, TorchApi
from ndcache.devices.torch.driver import DriverApi, open_api

from ...helpers import models
from ...helpers.devices import as_array, assert_tensors, relabel
from ...helpers.requirements import need_cuda, need_module

pytestmark = [pytest.mark.cuda, pytest.mark.torch]


@pytest.fixture
def torch() -> Any:
    """Return PyTorch, with memory that no other test left."""
    module = need_cuda()
    gc.collect()
    module.cuda.synchronize()
    module.cuda.empty_cache()
    return module


@pytest.fixture(params=[DriverApi, TorchApi])
def api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[CudaApi]:
    """Load through one of the two APIs."""

    def open_one(device: Any) -> CudaApi:
        opened = open_api(device) if request.param is DriverApi else TorchApi(device)
        assert type(opened) is request.param
        return opened

    monkeypatch.setattr(opening, "open_api", open_one)
    kind: type[CudaApi] = request.param
    return kind


def write_large(directory: Path, encoding: str = "raw") -> dict[str, Any]:
    """Write a model of 96 MiB with tensors of many sizes; return what NumPy loads of it."""
    sizes = [17 << 20, 1, 5 << 20, 1000, 12 << 20, 1 << 20]
    shards = [
        {f"{shard}.{n}": models.random_array((size // 4,), seed=n) for n, size in enumerate(sizes, shard)}
        for shard in range(3)
    ]
    models.write_model(directory, shards, encoding=encoding, md5=False)
    return dict(ndcache.load(directory))


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_names_of_devices(torch: Any, tmp_path: Path, encoding: str) -> None:
    expected = write_large(tmp_path, encoding)
    current = torch.device("cuda", torch.cuda.current_device())
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        with ndcache.load(tmp_path, device) as weights:
            assert_tensors(weights, expected)
            assert {tensor.device for tensor in weights.values()} == {weights.device} == {current}
            assert torch.cuda.get_device_name() in repr(weights)
    assert_tensors(dict(ndcache.stream(tmp_path, "cuda")), expected)
    assert_tensors(ndcache.torch.load(tmp_path, "cuda", decode=False), dict(ndcache.load(tmp_path, decode=False)))


@pytest.mark.usefixtures("api")
def test_another_device_than_the_current_one(torch: Any, tmp_path: Path) -> None:
    last = torch.cuda.device_count() - 1
    expected = write_large(tmp_path, "f32-to-bf16")
    before = torch.cuda.current_device()
    weights = ndcache.load(tmp_path, f"cuda:{last}", max_workers=1)
    assert torch.cuda.current_device() == before
    assert {tensor.device.index for tensor in weights.values()} == {last}
    assert_tensors(weights, expected)


def test_row_80_a_device_that_is_not_there(torch: Any, tmp_path: Path) -> None:
    models.simple_model(tmp_path)
    count = torch.cuda.device_count()
    with pytest.raises(ndcache.NoAdapterError, match=f"finds {count} device.* and so no 'cuda:{count}'"):
        ndcache.load(tmp_path, f"cuda:{count}")


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("keeps_all", [True, False])
def test_every_bfloat16_is_expanded_bit_by_bit(torch: Any, tmp_path: Path, keeps_all: bool) -> None:
    bits = np.tile(np.arange(1 << 16, dtype=np.uint16), 20)
    arrays = {"large": bits, "odd": bits[1:], "small": bits[: 1 << 16]}
    models.write_model(tmp_path, [arrays], gap=b"x")
    relabel(tmp_path, "float32", "f32-to-bf16")
    found = ndcache.load(tmp_path, "cuda") if keeps_all else dict(ndcache.stream(tmp_path, "cuda"))
    for name, stored in arrays.items():
        assert (as_array(found[name]).view(np.uint32) == stored.astype(np.uint32) << 16).all()


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_any_stream_may_use_the_tensors_at_once(torch: Any, tmp_path: Path, encoding: str) -> None:
    expected = write_large(tmp_path, encoding)
    with torch.cuda.stream(torch.cuda.Stream()):
        weights = ndcache.load(tmp_path, "cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            copies = {name: tensor.clone() for name, tensor in weights.items()}
    torch.cuda.synchronize()
    assert_tensors(copies, expected)
    for name, tensor in ndcache.stream(tmp_path, "cuda"):
        with torch.cuda.stream(torch.cuda.Stream()):
            copies[name] = tensor.clone()
    torch.cuda.synchronize()
    assert_tensors(copies, expected)


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_memory_that_is_still_in_use_is_not_written_to(torch: Any, tmp_path: Path, encoding: str) -> None:
    """PyTorch hands out freed memory while the work that was given to its stream has not been done."""
    expected = write_large(tmp_path, encoding)
    ones = [torch.ones(len(array), device="cuda") for array in expected.values()]
    torch.cuda._sleep(2_000_000_000)  # about a second
    copies = [tensor.clone() for tensor in ones]
    del ones
    weights = ndcache.load(tmp_path, "cuda")
    assert all(bool((copy == 1).all()) for copy in copies)
    assert_tensors(weights, expected)
    streamed = {}
    for name, tensor in ndcache.stream(tmp_path, "cuda"):
        torch.cuda._sleep(20_000_000)
        streamed[name] = tensor * 1
        del tensor  # its memory is the next one's
    assert_tensors(streamed, expected)


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
@pytest.mark.parametrize("verb", ["load", "stream"])
def test_row_82_no_memory_in_the_middle_on_cuda(torch: Any, tmp_path: Path, encoding: str, verb: str) -> None:
    expected = write_large(tmp_path, encoding)
    before, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (60 << 20)) / total)
    try:
        with pytest.raises(ndcache.OutOfDeviceMemoryError, match="no memory is left on 'cuda:0'") as caught:
            dict(ndcache.load(tmp_path, "cuda") if verb == "load" else ndcache.stream(tmp_path, "cuda"))
        assert caught.value.__cause__ is not None
        del caught
        gc.collect()
        assert torch.cuda.memory_allocated() == before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_tensors(ndcache.load(tmp_path, "cuda"), expected)


@pytest.mark.usefixtures("api")
def test_expanding_takes_little_more_memory(torch: Any, tmp_path: Path) -> None:
    expected = write_large(tmp_path, "f32-to-bf16")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weights = ndcache.load(tmp_path, "cuda", max_workers=2)
    assert torch.cuda.max_memory_allocated() - before <= weights.nbytes + 4 * (32 << 20)
    assert_tensors(weights, expected)


@pytest.mark.usefixtures("api")
def test_closing_weights_gives_the_memory_back(torch: Any, tmp_path: Path) -> None:
    write_large(tmp_path)
    before = torch.cuda.memory_allocated()
    weights = ndcache.load(tmp_path, "cuda")
    assert torch.cuda.memory_allocated() >= before + weights.nbytes
    weights.close()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_very_many_small_tensors(torch: Any, tmp_path: Path, encoding: str) -> None:
    arrays = {f"t{n}": models.random_array((n % 37, 5), seed=n) for n in range(3000)}
    models.write_model(tmp_path, [arrays], encoding=encoding, md5=False)
    expected = dict(ndcache.load(tmp_path))
    assert_tensors(ndcache.load(tmp_path, "cuda"), expected)
    copies = ndcache.load(tmp_path, "cuda", copy=True)
    assert_tensors(copies, expected)
    assert all(tensor.untyped_storage().nbytes() <= 1024 for tensor in copies.values())


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_into_tensors_of_the_callers(torch: Any, tmp_path: Path, encoding: str) -> None:
    expected = write_large(tmp_path, encoding)
    into = {name: torch.zeros(array.shape, device="cuda") for name, array in list(expected.items())[::2]}
    weights = ndcache.load(tmp_path, "cuda", into=into)
    assert all(weights[name] is tensor for name, tensor in into.items())
    assert_tensors(weights, expected)
    with pytest.raises(ValueError, match="is on 'cpu', but this device is 'cuda:"):
        ndcache.load(tmp_path, "cuda", into={"0.1": torch.zeros(0)})


@pytest.mark.usefixtures("api")
def test_loads_in_several_threads_at_once(torch: Any, tmp_path: Path) -> None:
    expected = write_large(tmp_path, "f32-to-bf16")
    found: list[Any] = [None] * 4

    def load(index: int) -> None:
        found[index] = ndcache.load(tmp_path, f"cuda:{index % torch.cuda.device_count()}", max_workers=3)

    threads = [threading.Thread(target=load, args=(index,)) for index in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for weights in found:
        assert_tensors(weights, expected)


def test_memory_that_the_driver_cannot_register(torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("cuMemHostRegister: CUDA_ERROR_NOT_SUPPORTED (801), operation not supported")

    pinned.free_idle_lanes()
    monkeypatch.setattr(DriverApi, "register", refuse)
    expected = write_large(tmp_path)
    assert_tensors(ndcache.load(tmp_path, "cuda"), expected)
    pinned.free_idle_lanes()


def test_pinned_memory_is_kept_and_freed(torch: Any, tmp_path: Path) -> None:
    write_large(tmp_path)
    pinned.free_idle_lanes()
    ndcache.load(tmp_path, "cuda", max_workers=3)
    (lanes,) = [lanes for lanes in pinned._idle.values() if lanes]
    assert 1 <= len(lanes) <= 5  # a pool has two spare threads
    assert all(lane.slots.tensor.is_pinned() for lane in lanes)
    kept = [lane.slots.tensor for lane in lanes]
    pinned.free_idle_lanes()
    assert not any(tensor.is_pinned() for tensor in kept)


def test_cupy_takes_the_tensors_without_a_copy(torch: Any, tmp_path: Path) -> None:
    cupy = need_module("cupy")
    models.simple_model(tmp_path, shards=1)
    tensor = ndcache.load(tmp_path, "cuda")["layer.0"]
    assert cupy.from_dlpack(tensor).data.ptr == tensor.data_ptr()


def test_jax_takes_the_tensors_without_a_copy(torch: Any, tmp_path: Path) -> None:
    jax = need_module("jax")
    models.simple_model(tmp_path, shards=1)
    tensor = ndcache.load(tmp_path, "cuda")["layer.0"]
    array = jax.dlpack.from_dlpack(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert (np.asarray(array) == as_array(tensor)).all()
