"""The path of CUDA, with a CUDA of ours: pieces, cut records, shared memory, errors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
import ndcache.torch
from ndcache.devices import open_device
from ndcache.devices.segments import Segment, cut_shard
from ndcache.devices.torch import cuda, opening, pinned
from ndcache.devices.torch.cuda import CudaDevice
from ndcache.devices.torch.memory import Allocator
from ndcache.devices.torch.other import OtherDevice
from ndcache.devices.torch.pinned import free_idle_lanes, return_lane, take_lane
from ndcache.format.numpy_dtypes import DTYPES
from ndcache.stats import LoadStats
from ndcache.workers.pool import WorkerPool

from ...helpers import models
from ...helpers.cuda import FakeApi, use_fake_cuda, watch_allocations
from ...helpers.devices import SHAPES, as_array, assert_tensors
from ...helpers.requirements import need_module
from ...helpers.servers import FileServer

pytestmark = pytest.mark.torch


@pytest.fixture
def torch() -> Any:
    return need_module("torch")


@pytest.fixture
def api(torch: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """Return a CUDA that loads onto ``torch.device("cpu")`` use; after the test, nothing may be left in it."""
    use_fake_cuda(monkeypatch, made := FakeApi(torch.device("cpu")))
    yield made
    free_idle_lanes()
    assert (made.registered, made.events, made.streams) == ({}, {}, {0: []})


def write_mixed(directory: Path, encoding: str, gap: bytes) -> dict[str, Any]:
    """Write a model with tensors of all dtypes and of many sizes; return what NumPy loads of it."""
    arrays = [
        {f"{shard} {dtype} {shape}": models.random_array(shape, dtype, shard) for dtype in DTYPES for shape in SHAPES}
        | {f"{shard} large": models.random_array((3, 1 << 18), "float32", shard)}
        for shard in range(3)
    ]
    models.write_model(directory, arrays, encoding=encoding, gap=gap)
    return dict(ndcache.load(directory))


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
@pytest.mark.parametrize("gap", [b"", b"x"])
@pytest.mark.parametrize("shares", [True, False])
def test_small_and_large_tensors(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, gap: bytes, shares: bool
) -> None:
    monkeypatch.setattr("ndcache.devices.torch.memory._MOST_SMALL", 100 if shares else 1000)
    expected = write_mixed(tmp_path, encoding, gap)
    weights = ndcache.torch.load(tmp_path)
    assert_tensors(weights, expected)
    for copy in (True, False):
        assert_tensors(dict(ndcache.torch.stream(tmp_path, copy=copy)), expected)
    assert_tensors(ndcache.torch.load(tmp_path, decode=False), dict(ndcache.load(tmp_path, decode=False)))
    for name, tensor in weights.items():
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % (16 if tensor.numel() else 1) == 0, name
    own = [tensor for tensor in weights.values() if tensor.untyped_storage().nbytes() == tensor.nbytes]
    assert len(own) < 100 if shares else len(own) == len(weights)  # 84 are empty, 3 are large
    copies = ndcache.torch.load(tmp_path, copy=True)
    assert_tensors(copies, expected)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in copies.values())


@pytest.mark.parametrize("piece", [2, 7, 4096, 1 << 20])
def test_pieces_of_any_size(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    for module in (pinned, cuda):
        monkeypatch.setattr(module, "PIECE_BYTES", piece)
    free_idle_lanes()
    arrays = {f"t{n}": models.random_array((n, 13), "float16", n) for n in range(9)}
    models.write_model(tmp_path, [arrays], gap=b"xyz")
    assert_tensors(ndcache.torch.load(tmp_path), arrays)
    assert api.copied == sum(array.nbytes for array in arrays.values())


def test_a_few_tensors_of_a_shard_are_read_without_the_others(api: FakeApi, tmp_path: Path) -> None:
    arrays = {f"t{n}": models.random_array((1 << 16,), seed=n) for n in range(20)}
    models.write_model(tmp_path, [arrays])
    chosen = {name: arrays[name] for name in ("t3", "t4", "t17")}
    assert_tensors(ndcache.torch.load(tmp_path, names=list(chosen)), chosen)
    assert api.copied == 3 << 18


@contextmanager
def opened(directory: Path, *, keeps_all: bool, segment_bytes: int) -> Iterator[tuple[Any, list[Segment]]]:
    """Open an upload of a model in segments of this size."""
    shards = ndcache.read_manifest(directory).shards
    segments = [each for shard in shards for each in cut_shard(shard, segment_bytes, cuts_records=True)]
    device = open_device(need_module("torch").device("cpu"))
    with WorkerPool(2) as pool:
        pool.start()
        made = device.open_upload(
            segments,
            pool=pool,
            stats=LoadStats(),
            decode=True,
            copy=False,
            memory_limit=1 << 30,
            keeps_all=keeps_all,
            into={},
        )
        with made:
            yield made, segments
    device.discard({})


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
@pytest.mark.parametrize("keeps_all", [True, False])
def test_records_that_are_cut(tmp_path: Path, encoding: str, keeps_all: bool) -> None:
    arrays = {
        "before": models.random_array((5,)),
        "large": models.random_array((30_000, 3), seed=1),
        "after": models.random_array((7,), "uint8"),
        "other": models.random_array((50_001,), "float32", seed=2),
    }
    models.write_model(tmp_path, [arrays], encoding=encoding, gap=b"x")
    expected = dict(ndcache.load(tmp_path))
    tensors = {}
    with opened(tmp_path, keeps_all=keeps_all, segment_bytes=20_000) as (made, segments):
        assert sum(segment.part is not None for segment in segments) > 10
        staged: list[Any] = [None] * len(segments)

        def stage(first: int) -> None:
            for index in range(first, len(segments), 3):
                with open(tmp_path / "params_shard_0.bin", "rb") as file:
                    staged[index] = made.stage(file, segments[index])

        threads = [threading.Thread(target=stage, args=(first,)) for first in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for segment, each in zip(segments, staged, strict=True):
            for record, tensor in made.place(each, segment):
                if not keeps_all:
                    assert as_array(tensor).tobytes() == expected[record.name].tobytes()
                tensors[record.name] = tensor
        made.finish()
        assert made._allocator._cut == {}
    assert_tensors(tensors, expected)


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_one_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setattr("ndcache.devices.segments._MIN_SEGMENT_BYTES", 1)
    monkeypatch.setattr(CudaDevice, "segment_bytes", 20_000)
    arrays = {f"t{n}": models.random_array((n * 997, 3), seed=n) for n in range(20)}
    models.write_model(tmp_path, [arrays], encoding=encoding, gap=b"x")
    expected = dict(ndcache.load(tmp_path))
    assert_tensors(ndcache.torch.load(tmp_path), expected)
    assert_tensors(dict(ndcache.torch.stream(tmp_path)), expected)


def test_tensors_of_a_stream_are_complete_when_they_come(api: FakeApi, tmp_path: Path) -> None:
    models.write_model(
        tmp_path, [{f"t{n}": models.random_array((999,), seed=n)} for n in range(9)], encoding="f32-to-bf16"
    )
    expected = dict(ndcache.load(tmp_path))
    for name, tensor in ndcache.torch.stream(tmp_path):
        assert (tensor.numpy() == expected[name]).all()
    assert api.reserved == []
    ndcache.torch.load(tmp_path)
    assert api.reserved == [999 * 4] * 9


def test_bfloat16_takes_no_memory_beside_its_tensors(
    torch: Any, api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [{f"t{n}": models.random_array((500 + n,), seed=n)} for n in range(10)]
    models.write_model(tmp_path, shards, encoding="f32-to-bf16")
    expected, sizes = dict(ndcache.load(tmp_path)), list[int]()
    watch_allocations(monkeypatch, lambda: sizes.append(0))
    assert_tensors(ndcache.torch.load(tmp_path, max_workers=3), expected)
    assert len(sizes) == 10
    with torch.inference_mode():
        assert_tensors(ndcache.torch.load(tmp_path), expected)
    assert api.copied == 2 * sum(array.nbytes // 2 for array in expected.values())


@pytest.mark.parametrize("call", [ndcache.torch.load, ndcache.torch.stream])
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_memory_is_allocated_on_the_caller_s_stream(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], encoding: str
) -> None:
    models.write_model(tmp_path, [{f"t{n}": models.random_array((99,), seed=n)} for n in range(9)], encoding=encoding)
    streams: list[int] = []
    watch_allocations(monkeypatch, lambda: streams.append(api.caller_stream()))
    with api.active():
        stream = api.new_stream()
    with api.on(stream):
        assert_tensors(dict(call(tmp_path)), dict(ndcache.load(tmp_path)))
    api.free_stream(stream)
    assert len(streams) >= 9
    assert set(streams) == {stream}


# --- pinned memory


@pytest.mark.parametrize("method", ["new_stream", "new_event"])
def test_pinned_memory_is_freed_if_a_reader_cannot_be_made(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    models.simple_model(tmp_path)

    def refuse(*_: Any) -> Any:
        raise RuntimeError("cuStreamCreate: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(FakeApi, method, refuse)
        with pytest.raises(ndcache.OutOfDeviceMemoryError, match="cuStreamCreate"):
            ndcache.torch.load(tmp_path)
    assert (api.registered, api.streams) == ({}, {0: []})


def test_pinned_memory_is_kept_for_later_loads(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.simple_model(tmp_path, shards=8)
    ndcache.torch.load(tmp_path, max_workers=3)
    first = dict(api.registered)
    assert 1 <= len(first) <= 5  # a pool has two spare threads
    for _ in range(3):
        ndcache.torch.load(tmp_path, max_workers=1)
    assert api.registered == first
    monkeypatch.setattr(pinned, "_MOST_IDLE", 0)
    ndcache.torch.load(tmp_path, max_workers=3)
    assert api.registered.items() <= first.items()


def test_each_device_keeps_pinned_memory(torch: Any, api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_MOST_IDLE", 1)
    other = FakeApi(torch.device("cpu:1"))
    for each in (api, other):
        with each.active():
            for lane in [take_lane(each), take_lane(each)]:
                return_lane(lane)
    assert (len(api.registered), len(other.registered)) == (1, 1)
    free_idle_lanes()
    assert other.registered == {}


def test_a_forked_child_has_no_pinned_memory(api: FakeApi, tmp_path: Path) -> None:
    models.simple_model(tmp_path)
    ndcache.torch.load(tmp_path)
    assert sum(map(len, pinned._idle.values())) >= 1
    child = os.fork()
    if child == 0:
        os._exit(sum(map(len, pinned._idle.values())))
    assert os.waitpid(child, 0)[1] == 0
    assert api.registered


def test_memory_that_cannot_be_registered_is_pinned_by_pytorch(
    torch: Any, api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.can_register = False
    empty, pinned_bytes = torch.empty, []

    def fake_empty(*arguments: Any, pin_memory: bool = False, **options: Any) -> Any:
        if pin_memory:
            pinned_bytes.append(arguments[0])
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", fake_empty)
    arrays = models.simple_model(tmp_path)
    assert_tensors(ndcache.torch.load(tmp_path), arrays)
    assert pinned_bytes
    assert set(pinned_bytes) == {2 * pinned.PIECE_BYTES}


# --- errors


@pytest.mark.parametrize("call", [ndcache.torch.load, lambda source: dict(ndcache.torch.stream(source))])
@pytest.mark.parametrize(("encoding", "method", "successes"), [("raw", "_empty", 9), ("f32-to-bf16", "_empty", 0)])
def test_row_82_no_memory_in_the_middle(
    torch: Any,
    api: FakeApi,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., Mapping[str, Any]],
    encoding: str,
    method: str,
    successes: int,
) -> None:
    models.write_model(tmp_path, [{f"t{n}": models.random_array((99,), seed=n)} for n in range(20)], encoding=encoding)
    original, left = getattr(Allocator, method), [successes]

    def allocate(allocator: Allocator, argument: Any) -> Any:
        if not left[0]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 396 bytes.\nand much more")
        left[0] -= 1
        return original(allocator, argument)

    monkeypatch.setattr(Allocator, method, allocate)
    alive = watch_allocations(monkeypatch)
    with pytest.raises(ndcache.OutOfDeviceMemoryError, match=r"on 'cpu': CUDA out of memory\. Tried") as caught:
        call(tmp_path)
    assert alive() <= 1  # although the traceback is still there; a stream's last tensor is the caller's
    assert "load fewer (names=)" in str(caught.value)
    assert "much more" not in str(caught.value)
    left[0] = 1000
    assert_tensors(call(tmp_path), dict(ndcache.load(tmp_path)))
    assert all(not copies for copies in api.streams.values())


def test_row_82_a_load_that_lacks_memory_makes_no_request_for_shards(
    torch: Any, api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., FileServer]
) -> None:
    models.simple_model(tmp_path)

    def refuse(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Allocator, "_empty", refuse)
    server = serve(tmp_path)
    with pytest.raises(ndcache.OutOfDeviceMemoryError):
        ndcache.torch.load(server.url)
    assert server.shard_requests() == []
    assert api.registered == {}


def test_a_device_that_fails_is_an_error(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.simple_model(tmp_path, shards=6)
    original, left = FakeApi.copy, [3]

    def copy(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("cuMemcpyHtoDAsync: CUDA_ERROR_ILLEGAL_ADDRESS (700), an illegal address")
        original(*arguments)

    monkeypatch.setattr(FakeApi, "copy", copy)
    with pytest.raises(ndcache.DeviceError, match="'cpu' failed: cuMemcpyHtoDAsync") as caught:
        ndcache.torch.load(tmp_path)
    assert type(caught.value) is ndcache.DeviceError
    assert all(not copies for copies in api.streams.values())


def test_a_file_that_shrinks_is_an_error(api: FakeApi, tmp_path: Path) -> None:
    models.write_model(tmp_path, [{"t": models.random_array((5000,))}])
    with opened(tmp_path, keeps_all=True, segment_bytes=1 << 20) as (made, (segment,)):
        path = tmp_path / "params_shard_0.bin"
        with open(path, "rb") as file:
            os.truncate(path, 5)
            with pytest.raises(ndcache.SizeMismatchError):
                made.stage(file, segment)
    assert len(api.registered) <= 1


@pytest.mark.parametrize("path", ["cpu", "other", "cuda"])
def test_into_takes_tensors_on_the_device(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    api = FakeApi(torch.device("cpu"))
    if path == "cuda":
        use_fake_cuda(monkeypatch, api)
    elif path == "other":
        monkeypatch.setattr(opening, "TorchCpuDevice", OtherDevice)
    models.write_model(
        tmp_path,
        [{f"t{n}": models.random_array((n, 9), "float32" if n % 2 else "float16", n) for n in range(8)}],
        encoding="f32-to-bf16",
        gap=b"x",
    )
    expected = dict(ndcache.load(tmp_path))
    into = {
        name: torch.full(expected[name].shape, 7, dtype=getattr(torch, expected[name].dtype.name))
        for name in ("t2", "t3", "t7")
    }
    into["t3"] = torch.nn.Parameter(into["t3"])
    for call in (ndcache.torch.load, lambda *arguments, **options: dict(ndcache.torch.stream(*arguments, **options))):
        weights = call(tmp_path, into=into)
        assert all(weights[name] is tensor for name, tensor in into.items())
        assert_tensors({name: tensor.detach() for name, tensor in weights.items()}, expected)
    if path == "cuda":
        assert sum(api.reserved) == sum(array.nbytes for name, array in expected.items() if name not in into)
        free_idle_lanes()


@pytest.mark.parametrize("path", ["cpu", "other", "cuda"])
def test_autograd_knows_what_into_overwrites(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    if path == "cuda":
        use_fake_cuda(monkeypatch, FakeApi(torch.device("cpu")))
    elif path == "other":
        monkeypatch.setattr(opening, "TorchCpuDevice", OtherDevice)
    models.write_model(tmp_path, [{"t": models.random_array((4, 6)), "u": models.random_array((4, 6), seed=1)}])
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    with torch.inference_mode():
        other = torch.ones(4, 6)
    loss = (parameter * parameter).sum()
    original = torch.autograd.graph.increment_version

    def increment(tensor: Any) -> None:
        assert not tensor.is_inference()  # PyTorch 2.3 would raise an error
        original(tensor)

    monkeypatch.setattr(torch.autograd.graph, "increment_version", increment)
    weights = ndcache.torch.load(tmp_path, into={"t": parameter, "u": other})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert other.numpy().tobytes() == dict(ndcache.load(tmp_path))["u"].tobytes()
    assert weights["u"] is other
    free_idle_lanes()


@pytest.mark.parametrize("path", ["cpu", "other", "cuda"])
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_modes_of_the_caller_do_not_matter(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, encoding: str
) -> None:
    expected = write_mixed(tmp_path, encoding, b"x")
    if path == "cuda":
        use_fake_cuda(monkeypatch, FakeApi(torch.device("cpu")))
    elif path == "other":
        monkeypatch.setattr(opening, "TorchCpuDevice", OtherDevice)
    name = "0 float32 (5, 7)"
    monkeypatch.setattr("ndcache.devices.torch.memory._MOST_SMALL", 100)
    torch.set_default_dtype(torch.float64)
    try:
        for mode in (torch.device("meta"), torch.inference_mode(), torch.no_grad()):
            with mode:
                into = {name: torch.zeros(expected[name].shape, dtype=torch.float32, device="cpu")}
                assert_tensors(dict(ndcache.torch.stream(tmp_path, into=into)), expected)
                weights = ndcache.torch.load(tmp_path, into=into)
            assert_tensors(weights, expected)
            assert weights[name] is into[name]
    finally:
        torch.set_default_dtype(torch.float32)
    free_idle_lanes()


@pytest.mark.parametrize("fake", [True, False])
def test_into_that_does_not_fit(torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: bool) -> None:
    if fake:
        use_fake_cuda(monkeypatch, FakeApi(torch.device("cpu")))
    models.write_model(tmp_path, [{"t": models.random_array((4, 6))}])
    for memory, kind, text in (
        (torch.zeros(6, 4), ValueError, "has the shape"),
        (torch.zeros(4, 6, dtype=torch.float16), ValueError, "has the dtype float16"),
        (torch.zeros(6, 4).t(), ValueError, "is not contiguous"),
        (torch.zeros(4, 6, device="meta"), ValueError, "is on 'meta', but this device is 'cpu'"),
        (np.zeros((4, 6), np.float32), ValueError, "is a ndarray, but this device loads into tensors of PyTorch"),
        (None, TypeError, "is a NoneType"),
    ):
        with pytest.raises(kind, match=f"into\\['t'\\] {text}"):
            ndcache.torch.load(tmp_path, into={"t": memory})
    shared = torch.zeros(5, 6)
    models.write_model(tmp_path, [{"t": models.random_array((4, 6)), "u": models.random_array((4, 6))}])
    with pytest.raises(ValueError, match="overlap"):
        ndcache.torch.load(tmp_path, into={"t": shared[:4], "u": shared[1:]})


@pytest.mark.parametrize(
    ("workers", "cores", "expected"), [(8, 16, 12), (4, 16, 6), (1, 16, 1), (16, 32, 16), (8, 2, 8)]
)
def test_how_many_workers_read(monkeypatch: pytest.MonkeyPatch, workers: int, cores: int, expected: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    device: Any = object.__new__(CudaDevice)
    assert device.readers(workers) == expected


@pytest.mark.parametrize("verify", ["download", "always"])
def test_more_workers_read_than_would_fetch(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: Any
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    models.write_model(tmp_path, [{f"t{n}": models.random_array((1 << 10,), seed=n)} for n in range(6)])
    readers, together = (3, threading.Barrier(3)) if verify == "download" else (2, threading.Barrier(2))
    record, threads = api.record, set[int]()

    def record_together(event: int, stream: int) -> None:
        threads.add(threading.get_ident())
        together.wait(30)
        record(event, stream)

    monkeypatch.setattr(api, "record", record_together)
    ndcache.torch.load(tmp_path, max_workers=2, verify=verify)
    assert len(threads) == readers


def test_threads_that_only_read_start_after_tensors_are_allocated(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.write_model(tmp_path, [{"t": models.random_array((1 << 10,))}])
    before, seen = set(threading.enumerate()), []
    allocate = Allocator.allocate

    def watched(self: Allocator, segment: Segment) -> Any:
        seen.append(set(threading.enumerate()) - before)
        return allocate(self, segment)

    monkeypatch.setattr(Allocator, "allocate", watched)
    ndcache.torch.load(tmp_path)
    assert seen == [set()]
