"""Loads into buffers of the caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ndcache
from ndcache.devices.gpu.upload import GpuUpload

from ...helpers import models
from ...helpers.devices import BufferWatch, stop
from ...helpers.servers import FileServer

#: WebGPU's usage flags.
COPY_SRC, COPY_DST, STORAGE = 4, 8, 128


def old(nbytes: int) -> bytes:
    """Return the content of a buffer before a load."""
    return bytes(13 + 37 * index & 0xFF for index in range(nbytes))


@pytest.fixture
def make(gpu: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that makes a buffer with the content `old`."""
    made = []

    def make_buffer(nbytes: int, usage: int = STORAGE | COPY_SRC | COPY_DST) -> Any:
        made.append(gpu.create_buffer(size=nbytes, usage=usage))
        if usage & COPY_DST and nbytes >= 4:
            gpu.queue.write_buffer(made[-1], 0, old(nbytes & -4))
        return made[-1]

    yield make_buffer
    for buffer in made:
        buffer.destroy()


def content(gpu: Any, buffer: Any) -> bytes:
    return bytes(gpu.queue.read_buffer(buffer))


@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
@pytest.mark.parametrize("decode", [True, False])
def test_tensors_go_to_buffers_ranges_and_gpu_tensors(
    gpu: Any, tmp_path: Path, make: Callable[..., Any], encoding: str, decode: bool
) -> None:
    names = [f"t{n}" for n in range(9)]
    arrays = {name: models.random_array((n, 5), "float16" if n == 4 else "float32", n) for n, name in enumerate(names)}
    shards = [{name: arrays[name] for name in part} for part in (names[:4], names[4:5], names[5:])]
    models.write_model(tmp_path, shards, encoding=encoding, gap=b"x")
    expected = {name: array.copy() for name, array in ndcache.load(tmp_path, decode=decode).items()}
    with ndcache.load(tmp_path, gpu, names="t8", decode=decode) as first:
        whole, shared, tensor = make(200), make(1000), first["t8"]
        into = {"t8": tensor, "t0": make(4), "t4": (shared, 100), "t1": (shared, 0), "t6": whole, "t2": (shared, 600)}
        with ndcache.load(tmp_path, gpu, into=into, decode=decode) as weights:
            assert list(weights) == names
            assert all(weights[name] is memory for name, memory in into.items())
            assert weights.nbytes == sum(array.nbytes for array in expected.values())
            for name in names:
                if name not in into:
                    assert np.asarray(weights[name]).tobytes() == expected[name].tobytes()
        # The buffers live on when the weights are closed.
        assert tensor.numpy().tobytes() == expected["t8"].tobytes()
        data = expected["t6"].tobytes()
        assert content(gpu, whole) == data + old(200)[len(data) :]
        image = bytearray(old(1000))
        for name, offset in (("t4", 100), ("t1", 0), ("t2", 600)):
            image[offset : offset + expected[name].nbytes] = expected[name].tobytes()
        assert content(gpu, shared) == image
    streamed = dict(ndcache.stream(tmp_path, gpu, into={"t6": whole}, names="t6", decode=decode))
    assert streamed == {"t6": whole}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.tuples(st.integers(0, 21), st.integers(0, 3)), min_size=1, max_size=6), gap=st.integers(0, 3))
def test_bytes_beside_tensors_of_any_size_stay(
    gpu: Any, tmp_path: Path, make: Callable[..., Any], sizes: list[tuple[int, int]], gap: int
) -> None:
    """Place tensors of `uint8` in one buffer, each at a multiple of 4 and some words apart."""
    arrays = {f"t{n}": models.random_array((size,), "uint8", n) for n, (size, _) in enumerate(sizes)}
    models.write_model(tmp_path, [arrays], gap=b"x" * gap)
    offsets, end = {}, 0
    for name, (size, words) in zip(arrays, sizes, strict=True):
        offsets[name] = end + 4 * words
        end = (offsets[name] + size + 3) // 4 * 4
    buffer = make(end + 8)
    with ndcache.load(tmp_path, gpu, into={name: (buffer, offset) for name, offset in offsets.items()}):
        image = bytearray(old(end + 8))
        for name, offset in offsets.items():
            image[offset : offset + arrays[name].nbytes] = arrays[name].tobytes()
        assert content(gpu, buffer) == image


def test_tensors_that_are_staged_in_several_parts(
    gpu: Any, tmp_path: Path, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ndcache.devices.gpu.upload._BATCH_BYTES", 8192)
    arrays = {"large": models.random_array((30_001,), "float16"), "odd": models.random_array((8191 * 3,), "uint8")}
    for encoding in ("raw", "f32-to-bf16"):
        arrays["encoded"] = models.random_array((5001,), seed=1)
        models.write_model(tmp_path, [arrays], encoding=encoding, gap=b"x")
        expected = {name: array.tobytes() for name, array in ndcache.load(tmp_path).items()}
        buffers = {name: (make(len(data) // 4 * 4 + 40), 16) for name, data in expected.items()}
        ndcache.load(tmp_path, gpu, into=buffers).close()
        for name, (buffer, _) in buffers.items():
            data = expected[name]
            assert content(gpu, buffer) == old(16) + data + old(buffer.size)[16 + len(data) :]


def test_no_buffer_is_made_for_the_tensors(
    gpu: Any, tmp_path: Path, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = models.simple_model(tmp_path, shards=3)
    into = {name: make(array.nbytes) for name, array in arrays.items()}
    watch = BufferWatch(gpu, monkeypatch)
    weights = ndcache.load(tmp_path, gpu, into=into)
    usage = [buffer.usage for buffer in watch.made if buffer.size > 4]
    assert usage  # staging memory
    assert not any(flags & STORAGE for flags in usage)
    assert watch.alive == 0
    weights.close()
    assert not set(into.values()) & set(watch.destroyed)
    assert content(gpu, into["layer.1"]) == arrays["layer.1"].tobytes()


def test_without_the_usage_storage_buffers_can_be_written_too(
    gpu: Any, tmp_path: Path, make: Callable[..., Any]
) -> None:
    arrays = models.simple_model(tmp_path, shards=1)
    buffer = make(1 << 16, COPY_DST | COPY_SRC)
    ndcache.load(tmp_path, gpu, into={"layer.0": buffer})
    assert content(gpu, buffer) == arrays["layer.0"].tobytes()


# --- memory that does not fit


def test_row_83_memory_that_does_not_fit_is_refused_before_any_shard_is_requested(
    gpu: Any, tmp_path: Path, make: Callable[..., Any], serve: Callable[..., FileServer]
) -> None:
    arrays = {"four": models.random_array((4, 3)), "odd": models.random_array((7,), "uint8")}
    models.write_model(tmp_path / "model", [arrays])
    models.write_model(tmp_path / "other", [{"four": np.zeros((3, 4), np.float32), "odd": np.zeros(7, np.int8)}])
    server = serve(tmp_path / "model")
    other = gpu.adapter.request_device_sync()
    mapped = gpu.create_buffer(size=48, usage=STORAGE | COPY_DST, mapped_at_creation=True)
    destroyed = gpu.create_buffer(size=48, usage=STORAGE | COPY_DST)
    destroyed.destroy()
    earlier = ndcache.load(tmp_path / "other", gpu)
    closed = ndcache.load(tmp_path / "model", gpu, names="four")
    four = closed["four"]
    closed.close()
    shared = make(96)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"four": make(44)}, ValueError, r"into\['four'\] has 44 bytes, but the tensor has 48$"),
        ({"four": (make(48), 4)}, ValueError, "has 44 bytes, but the tensor has 48$"),
        ({"four": (make(48), 400)}, ValueError, "has 0 bytes, but the tensor has 48$"),
        ({"odd": make(7)}, ValueError, r"has 7 bytes, but the tensor has 7 \(copied as 8\)"),
        ({"odd": make(8, STORAGE | COPY_DST)}, ValueError, "lacks the usage COPY_SRC, which keeps the bytes after"),
        ({"four": make(48, STORAGE | COPY_SRC)}, ValueError, "lacks the usage COPY_DST"),
        ({"four": (make(96), 6)}, ValueError, "begins at byte 6, which is no multiple of 4"),
        ({"four": (make(96), -4)}, ValueError, "begins at byte -4"),
        ({"four": mapped}, ValueError, r"into\['four'\] is mapped"),
        ({"four": destroyed}, ValueError, r"into\['four'\] cannot be used: .*(?s:.)*destroyed"),
        ({"four": other.create_buffer(size=48, usage=STORAGE | COPY_DST)}, ValueError, "belongs to another device"),
        ({"four": earlier["four"]}, ValueError, r"has the shape \(3, 4\), but the tensor has \(4, 3\)"),
        ({"odd": earlier["odd"]}, ValueError, "has the dtype int8, but the tensor has uint8"),
        ({"four": four}, ValueError, "belongs to weights that are closed"),
        ({"four": np.zeros((4, 3), np.float32)}, ValueError, "is a ndarray, but this device loads into GPU buffers"),
        ({"four": (shared, "0")}, TypeError, "is a tuple, but this device loads into"),
        ({"four": (shared, True)}, TypeError, "is a tuple"),
        ({"four": (shared, 0, 48)}, TypeError, "is a tuple"),
        ({"four": (0, shared)}, TypeError, "is a tuple"),
        ({"four": None}, TypeError, "is a NoneType"),
        ({"four": (shared, 0), "odd": (shared, 44)}, ValueError, r"into\['four'\] and into\['odd'\] overlap"),
        ({"four": shared, "odd": shared}, ValueError, "overlap"),
    ]
    for into, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            ndcache.load(server.url, gpu, into=into)
        assert getattr(caught.value, "undefined", None) == tuple(into)
    with pytest.raises(ValueError, match="belongs to another device"):
        ndcache.load(server.url, "gpu", into={"four": make(48)})
    with pytest.raises(ValueError, match="is a GPUBuffer, but this device loads into NumPy arrays"):
        ndcache.load(server.url, into={"four": make(48)})
    assert server.shard_requests() == []
    assert content(gpu, shared) == old(96)
    earlier.close()
    mapped.destroy()


def test_row_83_memory_of_a_gpu_is_no_memory_for_arrays(gpu: Any, tmp_path: Path, make: Callable[..., Any]) -> None:
    models.write_model(tmp_path, [{"four": models.random_array((3, 4))}])
    with ndcache.load(tmp_path, gpu) as weights:
        for memory in (weights["four"], make(48), (make(48), 0)):
            into: Any = {"four": memory}
            with pytest.raises(ValueError, match="but this device loads into NumPy arrays"):
                ndcache.load(tmp_path, into=into)


def test_row_83_one_destroyed_buffer_of_many_is_found(gpu: Any, tmp_path: Path, make: Callable[..., Any]) -> None:
    arrays = {f"t{n}": models.random_array((4,), seed=n) for n in range(100)}
    models.write_model(tmp_path, [arrays])
    into = {name: make(16) for name in arrays}
    ndcache.load(tmp_path, gpu, into=into)
    into["t70"].destroy()
    with pytest.raises(ValueError, match=r"into\['t70'\] cannot be used"):
        ndcache.load(tmp_path, gpu, into=into)


def test_row_38_a_lost_device_is_an_error_before_anything_is_fetched(
    gpu: Any, tmp_path: Path, serve: Callable[..., FileServer]
) -> None:
    models.simple_model(tmp_path, shards=1)
    server = serve(tmp_path)
    lost = gpu.adapter.request_device_sync()
    buffer = lost.create_buffer(size=1 << 16, usage=STORAGE | COPY_DST)
    lost.destroy()
    with pytest.raises(ndcache.DeviceError, match="lost"):
        ndcache.load(server.url, lost, into={"layer.0": buffer})
    assert server.shard_requests() == []


def test_limits_do_not_count_for_memory_of_the_callers(gpu: Any, tmp_path: Path) -> None:
    array = models.random_array((1 << 15,), "uint8")
    models.write_model(tmp_path, [{"t": array}])
    limited = gpu.adapter.request_device_sync(required_limits={"max-storage-buffer-binding-size": 1 << 14})
    buffer = limited.create_buffer(size=1 << 15, usage=STORAGE | COPY_SRC | COPY_DST)
    with pytest.raises(ndcache.DeviceError, match="can bind at once"):
        ndcache.load(tmp_path, limited)
    ndcache.load(tmp_path, limited, into={"t": buffer})
    assert content(limited, buffer) == array.tobytes()


# --- loads that fail


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", ["cancel", "Ctrl-C", "wgpu"])
def test_row_84_a_load_that_fails_names_what_is_undefined(
    gpu: Any, tmp_path: Path, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    import wgpu

    arrays = models.simple_model(tmp_path, shards=6)
    into = {name: make(array.nbytes) for name, array in arrays.items()}
    cancel = threading.Event()
    original = GpuUpload.place
    placed = 0

    def place(*arguments: Any) -> Any:
        nonlocal placed
        placed += 1
        if placed == 4:
            if how == "wgpu":
                raise ndcache.DeviceError("it failed") from wgpu.GPUError("it failed")
            stop(how, cancel)
        return original(*arguments)

    monkeypatch.setattr(GpuUpload, "place", place)
    kinds = {"cancel": ndcache.CancelledError, "Ctrl-C": KeyboardInterrupt, "wgpu": ndcache.DeviceError}
    watch = BufferWatch(gpu, monkeypatch)
    with pytest.raises(kinds[how]) as caught:
        ndcache.load(tmp_path, gpu, into=into, cancel=cancel)
    undefined = getattr(caught.value, "undefined", ())
    assert set(undefined) >= {"layer.4", "layer.5"}
    if how == "wgpu":
        assert undefined == tuple(arrays)
    else:
        assert not {"layer.0", "layer.1", "layer.2"} & set(undefined)
    for name in set(arrays) - set(undefined):
        assert content(gpu, into[name]) == arrays[name].tobytes()
    assert not set(into.values()) & set(watch.destroyed)
    ndcache.load(tmp_path, gpu, into=into)
    assert all(content(gpu, into[name]) == array.tobytes() for name, array in arrays.items())
