"""The suite that every device must pass. To test another one, inherit from `DeviceConformance`."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import ndcache
from ndcache.devices import open_device
from ndcache.devices.base import Device, Upload
from ndcache.devices.cpu import CpuDevice, CpuUpload
from ndcache.devices.gpu.upload import GpuUpload
from ndcache.devices.segments import Segment
from ndcache.devices.torch import opening
from ndcache.devices.torch.api import TorchApi
from ndcache.devices.torch.cpu import TorchCpuUpload
from ndcache.devices.torch.other import OtherDevice, OtherUpload
from ndcache.devices.torch.pinned import free_idle_lanes
from ndcache.devices.torch.upload import CudaUpload
from ndcache.format.numpy_dtypes import DTYPES
from ndcache.stats import LoadStats
from ndcache.workers.pool import WorkerPool

from ..helpers import models
from ..helpers.cuda import FakeApi, use_fake_cuda, watch_allocations
from ..helpers.devices import SHAPES, BufferWatch, assert_tensors, relabel, stop
from ..helpers.requirements import need_module

#: Bytes that no device holds in one buffer.
TOO_LARGE = 1 << 50


@contextmanager
def upload_to(device: Device[Any], manifest: ndcache.Manifest, **options: Any) -> Iterator[Upload[Any, Any]]:
    """Open an upload of all shards, with threads for it."""
    with WorkerPool(2, has_serial_thread=device.needs_serial_thread) as pool:
        pool.start()
        upload = device.open_upload(
            [whole(shard) for shard in manifest.shards],
            pool=pool,
            stats=LoadStats(),
            **{"decode": True, "copy": False, "memory_limit": 1 << 20, "keeps_all": True, "into": {}, **options},
        )
        with upload:
            yield upload


def stage(upload: Upload[Any, Any], directory: Path, shard: ndcache.Shard) -> Any:
    with open(directory / shard.data_path, "rb") as file:
        return upload.stage(file, whole(shard))


def whole(shard: ndcache.Shard) -> Segment:
    return Segment(shard, shard.records, shard.nbytes)


class DeviceConformance:
    """Tests that every device must pass. Subclasses say which device, how it allocates, and whether it has limits."""

    upload_type: type[Upload[Any, Any]]

    @pytest.fixture
    def device(self, request: pytest.FixtureRequest) -> Any:
        """Return the ``device`` option."""
        raise NotImplementedError

    @pytest.fixture
    def alive(self, device: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
        """Return a function that counts the live allocations of tensors and uploads."""
        raise NotImplementedError

    def over_the_limits(self) -> AbstractContextManager[Any]:
        """Return a context that expects `TOO_LARGE` to be refused, if the device has limits."""
        raise NotImplementedError

    # --- tensors

    @pytest.mark.parametrize("dtype", list(DTYPES))
    @pytest.mark.parametrize("gap", [b"", b"x"], ids=["packed", "unaligned"])
    def test_every_dtype_and_shape(self, device: Any, tmp_path: Path, dtype: str, gap: bytes) -> None:
        arrays = {f"t{n}": models.random_array(shape, dtype, seed=n) for n, shape in enumerate(SHAPES)}
        models.write_model(tmp_path, [arrays], gap=gap)
        with ndcache.load(tmp_path, device) as weights:
            assert_tensors(weights, arrays)
            assert weights.nbytes == sum(array.nbytes for array in arrays.values())

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("gap", [b"", b"x", b"xyz"], ids=["packed", "1 off", "3 off"])
    def test_bfloat16_is_expanded(self, device: Any, tmp_path: Path, shape: tuple[int, ...], gap: bytes) -> None:
        bits = np.array(np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16))
        bits.reshape(-1)[:6] = [0x7F80, 0xFF80, 0x7FC1, 0x8000, 0x0001, 0x7F7F][: bits.size]
        models.write_model(tmp_path, [{"t": bits.view(ml_dtypes.bfloat16)}], gap=gap)
        relabel(tmp_path, "float32", "f32-to-bf16")
        with ndcache.load(tmp_path, device) as weights:
            expanded = (bits.reshape(-1).astype(np.uint32) << 16).view(np.float32).reshape(shape)
            assert_tensors(weights, {"t": expanded})
        with ndcache.load(tmp_path, device, decode=False) as weights:
            assert_tensors(weights, {"t": bits.view(ml_dtypes.bfloat16)})

    @pytest.mark.parametrize("dtype", ["uint32", "float16"])
    def test_other_dtypes_marked_f32_to_bf16_are_as_stored(self, device: Any, tmp_path: Path, dtype: str) -> None:
        array = models.random_array((33,), dtype)
        models.write_model(tmp_path, [{"t": array}], encoding="f32-to-bf16")
        with ndcache.load(tmp_path, device) as weights:
            assert_tensors(weights, {"t": array})

    @pytest.mark.parametrize(("alias", "name"), [("e4m3_float8", "float8_e4m3fn"), ("e5m2_float8", "float8_e5m2")])
    def test_aliases_of_dtypes(self, device: Any, tmp_path: Path, alias: str, name: str) -> None:
        array = models.random_array((7,), name)
        models.write_model(tmp_path, [{"t": array}])
        relabel(tmp_path, alias, "raw")
        with ndcache.load(tmp_path, device) as weights:
            assert_tensors(weights, {"t": array})

    def test_an_empty_model(self, device: Any, tmp_path: Path) -> None:
        models.write_model(tmp_path, [])
        reports: list[ndcache.ProgressReport] = []
        with ndcache.load(tmp_path, device, progress=reports.append) as weights:
            assert_tensors(weights, {})
        assert [report.text.partition(":")[0] for report in reports] == [
            "Start to fetch params",
            "Loading model from cache[0/0]",
        ]
        assert reports[-1].progress == 1.0

    def test_an_empty_shard(self, device: Any, tmp_path: Path) -> None:
        empty = np.empty((0, 4), np.float32)
        models.write_model(tmp_path, [{"empty": empty}, {"full": np.ones(3, np.float32)}])
        with ndcache.load(tmp_path, device) as weights:
            assert_tensors(weights, {"empty": empty, "full": np.ones(3, np.float32)})

    # --- order

    def test_many_shards_keep_their_order(self, device: Any, tmp_path: Path) -> None:
        arrays = models.simple_model(tmp_path, shards=20, shard_bytes=4096)
        with ndcache.load(tmp_path, device) as weights:
            assert_tensors(weights, arrays)

    def test_a_stream_keeps_the_order(self, device: Any, tmp_path: Path) -> None:
        arrays = models.simple_model(tmp_path, shards=3)
        assert_tensors(dict(ndcache.stream(tmp_path, device)), arrays)

    @pytest.mark.parametrize("keeps_all", [True, False])
    def test_shards_may_be_staged_in_any_order(self, device: Any, tmp_path: Path, keeps_all: bool) -> None:
        arrays = models.simple_model(tmp_path, shards=6)
        manifest, opened = ndcache.read_manifest(tmp_path), open_device(device)
        tensors: dict[str, Any] = {}
        with upload_to(opened, manifest, keeps_all=keeps_all) as upload:
            with ThreadPoolExecutor(3) as pool:
                futures = [pool.submit(stage, upload, tmp_path, shard) for shard in reversed(manifest.shards)]
            for shard, future in zip(manifest.shards, reversed(futures), strict=True):
                for record, tensor in upload.place(future.result(), whole(shard)):
                    tensors[record.name] = tensor
            upload.finish()
        assert_tensors(tensors, arrays)
        opened.discard(tensors)
        assert tensors == {}

    @pytest.mark.parametrize("decode", [True, False])
    @pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
    def test_slices(
        self, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, decode: bool
    ) -> None:
        """Rows have any size and begin anywhere; those of large tensors are staged in several segments."""
        monkeypatch.setattr("ndcache.devices.segments._MIN_SEGMENT_BYTES", 1 << 12)
        shapes = [shape for shape in [*SHAPES, (9, 1001), (5001, 3)] if shape]
        arrays = {
            f"{dtype} {shape}": models.random_array(shape, dtype, seed=n)
            for n, (dtype, shape) in enumerate(itertools.product(DTYPES, shapes))
        }
        models.write_model(tmp_path, [arrays], encoding=encoding, gap=b"x")
        whole = {name: array.copy() for name, array in ndcache.load(tmp_path, decode=decode).items()}
        ends = itertools.cycle([slice(1, None), slice(None), slice(-3, -1), slice(2, 2), slice(None, -1), slice(1, 4)])
        names = {name: next(ends) for name in arrays}
        expected = {name: whole[name][rows] for name, rows in names.items()}
        with ndcache.load(tmp_path, device, names=names, decode=decode, copy=True) as lent:
            assert_tensors(lent, expected)
            into = {name: lent[name] for name in list(names)[::2]}
            again = dict(ndcache.stream(tmp_path, device, names=names, into=into, decode=decode, memory_limit=1 << 12))
            assert_tensors(again, expected)
            assert all(again[name] is memory for name, memory in into.items())

    # --- memory

    @pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
    def test_closing_weights_frees_their_memory(
        self, device: Any, tmp_path: Path, alive: Callable[[], int], encoding: str
    ) -> None:
        arrays = [{f"t{n}": models.random_array((100,), seed=n)} for n in range(4)]
        models.write_model(tmp_path, arrays, encoding=encoding)
        weights = ndcache.load(tmp_path, device)
        assert alive() == len(weights) == 4  # and nothing that only the load needed
        weights.close()
        assert alive() == 0

    @pytest.mark.parametrize("call", ["stage", "place", "finish"])
    def test_a_failed_load_frees_its_memory(
        self, device: Any, tmp_path: Path, alive: Callable[[], int], monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        models.simple_model(tmp_path, shards=4)
        original = getattr(self.upload_type, call)

        def fail(upload: Any, *arguments: Any) -> Any:
            if call == "finish" or arguments[1].shard.data_path == "params_shard_2.bin":
                raise ZeroDivisionError
            return original(upload, *arguments)

        monkeypatch.setattr(self.upload_type, call, fail)
        with pytest.raises(ZeroDivisionError):
            ndcache.load(tmp_path, device)
        assert alive() == 0

    def test_closing_an_upload_early_frees_its_memory(
        self, device: Any, tmp_path: Path, alive: Callable[[], int]
    ) -> None:
        models.simple_model(tmp_path, shards=3)
        manifest, opened = ndcache.read_manifest(tmp_path), open_device(device)
        with upload_to(opened, manifest) as upload:
            staged = [stage(upload, tmp_path, shard) for shard in manifest.shards]
            assert alive() >= 3
            upload.close()  # and once more at the end of the block
        del staged
        assert alive() == 0
        opened.discard({})

    # --- memory of the caller's: here, tensors of an earlier load

    @pytest.mark.parametrize("decode", [True, False])
    @pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
    @pytest.mark.parametrize("gap", [b"", b"x"], ids=["packed", "unaligned"])
    def test_tensors_go_into_memory_of_the_callers(
        self, device: Any, tmp_path: Path, gap: bytes, encoding: str, decode: bool
    ) -> None:
        arrays = {
            f"{dtype} {shape}": models.random_array(shape, dtype, seed=n)
            for n, (dtype, shape) in enumerate(itertools.product(DTYPES, SHAPES))
        }
        items = list(arrays.items())
        shards = [dict(items[::3]), dict(items[1::3]), dict(items[2::3])]
        models.write_model(tmp_path / "model", shards, encoding=encoding, gap=gap)
        zeros = [{name: np.zeros_like(array) for name, array in shard.items()} for shard in shards]
        models.write_model(tmp_path / "zeros", zeros, encoding=encoding)
        expected = {name: array.copy() for name, array in ndcache.load(tmp_path / "model", decode=decode).items()}
        with ndcache.load(tmp_path / "zeros", device, decode=decode, copy=True) as lent:
            names = [name for name in lent if len(name) % 2]
            into = {name: lent[name] for name in names}
            for chosen in (names, None):
                with ndcache.load(tmp_path / "model", device, names=chosen, into=into, decode=decode) as weights:
                    assert_tensors(weights, {name: expected[name] for name in chosen or expected})
                    assert all(weights[name] is into[name] for name in names)
                    assert weights.nbytes == sum(expected[name].nbytes for name in weights)
            zero = {name: np.zeros_like(expected[name]) for name in lent}
            assert_tensors(lent, {name: (expected if name in names else zero)[name] for name in lent})

    @pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
    def test_large_tensors_go_into_memory_of_the_callers(
        self, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
    ) -> None:
        """They are larger than a segment; some devices write them in parts."""
        monkeypatch.setattr("ndcache.devices.segments._MIN_SEGMENT_BYTES", 1 << 12)
        sizes = {"float32": 10_001, "uint8": 30_003, "float16": 12_289}
        arrays = {dtype: models.random_array((size,), dtype) for dtype, size in sizes.items()}
        models.write_model(tmp_path, [arrays], encoding=encoding, gap=b"x")
        expected = {name: array.copy() for name, array in ndcache.load(tmp_path).items()}
        models.write_model(tmp_path / "zeros", [{name: np.zeros_like(array) for name, array in arrays.items()}])
        with ndcache.load(tmp_path / "zeros", device, copy=True) as lent:
            ndcache.load(tmp_path, device, into=lent, memory_limit=1 << 12).close()
            assert_tensors(lent, expected)

    def test_a_stream_goes_into_memory_of_the_callers(self, device: Any, tmp_path: Path) -> None:
        arrays = models.simple_model(tmp_path, shards=3)
        with ndcache.load(tmp_path, device, copy=True) as lent:
            streamed = dict(ndcache.stream(tmp_path, device, into=lent))
            assert_tensors(streamed, arrays)
            assert all(streamed[name] is lent[name] for name in lent)

    def test_row_83_memory_of_another_shape_or_given_twice_is_refused(self, device: Any, tmp_path: Path) -> None:
        models.write_model(tmp_path, [{"a": np.ones(8, np.float32), "b": np.ones(8, np.float32), "c": np.ones((4, 2))}])
        with ndcache.load(tmp_path, device, copy=True) as lent:
            for memory in (lent["c"], None, 3, "b"):
                with pytest.raises(TypeError if memory is not lent["c"] else ValueError, match=r"^into\['b'\] "):
                    ndcache.load(tmp_path, device, into={"b": memory})
            with pytest.raises(ValueError, match=r"^into\['a'\] and into\['b'\] overlap"):
                ndcache.load(tmp_path, device, into={"a": lent["a"], "b": lent["a"]})

    @pytest.mark.parametrize("call", ["stage", "place"])
    def test_row_84_a_failed_load_keeps_memory_of_the_callers(
        self, device: Any, tmp_path: Path, alive: Callable[[], int], monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        arrays = models.simple_model(tmp_path, shards=4)
        original = getattr(self.upload_type, call)

        def fail(upload: Any, *arguments: Any) -> Any:
            if arguments[1].shard.data_path == "params_shard_2.bin":
                raise ZeroDivisionError
            return original(upload, *arguments)

        with ndcache.load(tmp_path, device, copy=True) as lent:
            before = alive()
            monkeypatch.setattr(self.upload_type, call, fail)
            with pytest.raises(ZeroDivisionError) as caught:
                ndcache.load(tmp_path, device, into={name: lent[name] for name in ("layer.3", "layer.2", "layer.0")})
            undefined = getattr(caught.value, "undefined", ())
            assert undefined[:2] == ("layer.3", "layer.2")
            del caught
            assert alive() == before
            assert_tensors({"layer.0": lent["layer.0"]}, {"layer.0": arrays["layer.0"]})

    # --- errors

    def test_limits_are_checked_before_an_upload(self, device: Any, tmp_path: Path) -> None:
        models.write_model(tmp_path, [{"t": np.ones(5, np.uint8)}])
        path = tmp_path / "tensor-cache.json"
        text = path.read_text().replace('"shape": [5]', f'"shape": [{TOO_LARGE}]')
        path.write_text(text.replace('"nbytes": 5', f'"nbytes": {TOO_LARGE}'))
        opened = open_device(device)
        with self.over_the_limits():
            opened.check_limits(ndcache.read_manifest(tmp_path).shards, decode=True)
        opened.discard({})

    def test_a_file_of_another_size_is_refused(self, device: Any, tmp_path: Path) -> None:
        models.simple_model(tmp_path, shards=2)
        manifest, opened = ndcache.read_manifest(tmp_path), open_device(device)
        os.truncate(tmp_path / "params_shard_1.bin", 5)
        with upload_to(opened, manifest) as upload:
            with pytest.raises(ndcache.SizeMismatchError) as caught:
                stage(upload, tmp_path, manifest.shards[1])
            assert (caught.value.shard, caught.value.received) == ("params_shard_1.bin", 5)
        opened.discard({})

    @pytest.mark.usefixtures("interruptible")
    @pytest.mark.parametrize("how", ["cancel", "Ctrl-C"])
    def test_row_36_a_load_is_stopped_while_tensors_are_placed(
        self, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        arrays = {f"t{n}": models.random_array((100,), seed=n) for n in range(9)}
        models.write_model(tmp_path, [arrays], encoding="f32-to-bf16")
        cancel = threading.Event()
        original = self.upload_type.place
        placed = 0

        def place(*arguments: Any) -> Any:
            nonlocal placed
            for item in original(*arguments):
                placed += 1
                if placed == 3:
                    stop(how, cancel)
                yield item

        monkeypatch.setattr(self.upload_type, "place", place)
        with pytest.raises(ndcache.CancelledError if how == "cancel" else KeyboardInterrupt):
            ndcache.load(tmp_path, device, cancel=cancel)
        assert placed == 3
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ndcache")]

    # --- closing

    def test_closed_weights_say_so(self, device: Any, tmp_path: Path) -> None:
        models.simple_model(tmp_path, shards=1)
        weights = ndcache.load(tmp_path, device)
        assert "1 tensor," in repr(weights)
        weights.close()
        weights.close()
        with pytest.raises(ValueError, match="closed"):
            weights["layer.0"]
        assert "closed" in repr(weights)

    def test_weights_name_their_device(self, device: Any, tmp_path: Path) -> None:
        models.simple_model(tmp_path, shards=1)
        with ndcache.load(tmp_path, device) as weights:
            assert weights.device == device
            assert open_device(device).name in repr(weights)


def watch_tensors(monkeypatch: pytest.MonkeyPatch, kind: type[Upload[Any, Any]]) -> Callable[[], int]:
    """Return a function that counts the live ones of all tensors that an upload staged and placed in this process."""
    found: dict[int, weakref.ref[Any]] = {}
    stage, place = kind.stage, kind.place

    def watched_stage(upload: Any, file: Any, segment: Segment) -> Any:
        staged = stage(upload, file, segment)
        found.update((id(tensor), weakref.ref(tensor)) for tensor in staged)
        return staged

    def watched_place(*arguments: Any) -> Any:
        for record, tensor in place(*arguments):
            found[id(tensor)] = weakref.ref(tensor)
            yield record, tensor

    def count() -> int:
        gc.collect()
        return sum(tensor() is not None for tensor in found.values())

    monkeypatch.setattr(kind, "stage", watched_stage)
    monkeypatch.setattr(kind, "place", watched_place)
    return count


class TestCpu(DeviceConformance):
    upload_type = CpuUpload

    @pytest.fixture
    def device(self) -> str:
        return "cpu"

    @pytest.fixture
    def alive(self, device: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
        return watch_tensors(monkeypatch, CpuUpload)

    def over_the_limits(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def test_it_is_the_device_by_default(self, tmp_path: Path) -> None:
        models.simple_model(tmp_path, shards=1)
        assert isinstance(open_device("cpu"), CpuDevice)
        assert ndcache.load(tmp_path).device == "cpu"


@pytest.mark.torch
class TestTorchCpu(DeviceConformance):
    upload_type: type[Upload[Any, Any]] = TorchCpuUpload

    @pytest.fixture
    def device(self) -> Any:
        return need_module("torch").device("cpu")

    @pytest.fixture
    def alive(self, device: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
        return watch_tensors(monkeypatch, self.upload_type)

    def over_the_limits(self) -> AbstractContextManager[Any]:
        return nullcontext()


class TestOtherDeviceOfTorch(TestTorchCpu):
    """The path of devices such as ``mps``, forced onto the CPU."""

    upload_type = OtherUpload

    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(opening, "TorchCpuDevice", OtherDevice)
        return need_module("torch").device("cpu")


class TestCudaOnTheCpu(TestTorchCpu):
    """All of the path of CUDA but CUDA itself."""

    upload_type = CudaUpload

    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        device = need_module("torch").device("cpu")
        use_fake_cuda(monkeypatch, api := FakeApi(device))
        yield device
        free_idle_lanes()
        assert api.registered == {}
        assert api.events == {}

    @pytest.fixture
    def alive(self, device: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
        return watch_allocations(monkeypatch)

    def over_the_limits(self) -> AbstractContextManager[Any]:
        return pytest.raises(ndcache.OutOfDeviceMemoryError, match=f"'t' takes {TOO_LARGE:,} bytes")


@pytest.mark.cuda
class TestCuda(TestTorchCpu):
    upload_type = CudaUpload

    @pytest.fixture
    def device(self) -> Any:
        torch = need_module("torch")
        return torch.device("cuda", torch.cuda.current_device())

    @pytest.fixture
    def alive(self, device: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
        return watch_allocations(monkeypatch)

    def over_the_limits(self) -> AbstractContextManager[Any]:
        return pytest.raises(ndcache.OutOfDeviceMemoryError, match=f"'t' takes {TOO_LARGE:,} bytes")


class TestCudaThroughTorch(TestCuda):
    """CUDA without the driver's library."""

    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(opening, "open_api", TorchApi)
        torch = need_module("torch")
        return torch.device("cuda", torch.cuda.current_device())


class TestGpu(DeviceConformance):
    upload_type = GpuUpload

    @pytest.fixture
    def device(self, gpu: Any) -> Any:
        return gpu

    @pytest.fixture
    def alive(self, device: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
        watch = BufferWatch(device, monkeypatch)
        return lambda: watch.alive

    def over_the_limits(self) -> AbstractContextManager[Any]:
        return pytest.raises(ndcache.OutOfDeviceMemoryError, match=f"'t' takes {TOO_LARGE:,} bytes")
