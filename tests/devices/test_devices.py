"""One suite that every device must pass, and what is particular to each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ndcache
from ndcache.devices import cpu as cpu_module
from ndcache.devices import open_device
from ndcache.devices.gpu import adapters as adapters_module
from ndcache.devices.gpu import device as gpu_module
from ndcache.devices.gpu import upload as upload_module
from ndcache.devices.gpu.layout import plan_batches
from ndcache.devices.gpu.staging import StagingRing
from ndcache.format.dtypes import DTYPES
from ndcache.format.manifest import Record
from ndcache.stats import LoadStats

from ..helpers import models
from ..helpers.servers import FileServer

SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (4,), (5, 7), (0,), (3, 0, 2), (2, 3, 4, 5), (1025,)]


class Conformance:
    """Inherit and say in `device` what is tested."""

    @pytest.fixture
    def device(self, request: pytest.FixtureRequest) -> Any:
        raise AssertionError("a subclass says which device")

    def load(self, device: Any, directory: Path, **options: Any) -> ndcache.Weights:
        return ndcache.load(directory, device, **options)

    def check(self, weights: ndcache.Weights, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        assert list(weights) == list(arrays)
        for name, array in arrays.items():
            tensor = weights[name]
            assert tensor.shape == array.shape, name
            assert tensor.dtype == array.dtype, name
            assert tensor.nbytes == array.nbytes, name
            back = np.asarray(tensor)
            assert (back.shape, back.dtype) == (array.shape, array.dtype), name
            assert back.tobytes() == array.tobytes(), name

    @pytest.mark.parametrize("dtype", list(DTYPES))
    @pytest.mark.parametrize("gap", [b"", b"x"], ids=["packed", "unaligned"])
    def test_every_dtype_and_shape(self, device: Any, tmp_path: Path, dtype: str, gap: bytes) -> None:
        arrays = {f"t{n}": models.random_array(shape, dtype, seed=n) for n, shape in enumerate(SHAPES)}
        models.write_model(tmp_path, [arrays], gap=gap)
        with self.load(device, tmp_path) as weights:
            self.check(weights, arrays)
            assert weights.nbytes == sum(array.nbytes for array in arrays.values())

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("gap", [b"", b"x", b"xyz"], ids=["packed", "1 off", "3 off"])
    def test_bfloat16_is_expanded(self, device: Any, tmp_path: Path, shape: tuple[int, ...], gap: bytes) -> None:
        bits = np.array(np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16))
        bits.reshape(-1)[:6] = [0x7F80, 0xFF80, 0x7FC1, 0x8000, 0x0001, 0x7F7F][: bits.size]
        models.write_model(tmp_path, [{"t": bits.view(ml_dtypes.bfloat16)}], gap=gap)
        relabel(tmp_path, "float32", "f32-to-bf16")
        with self.load(device, tmp_path) as weights:
            expanded = (bits.reshape(-1).astype(np.uint32) << 16).view(np.float32).reshape(shape)
            self.check(weights, {"t": expanded})
        with self.load(device, tmp_path, decode=False) as weights:
            self.check(weights, {"t": bits.view(ml_dtypes.bfloat16)})

    @pytest.mark.parametrize("dtype", ["uint32", "float16"])
    def test_other_dtypes_marked_f32_to_bf16_are_as_stored(self, device: Any, tmp_path: Path, dtype: str) -> None:
        array = models.random_array((33,), dtype)
        models.write_model(tmp_path, [{"t": array}], encoding="f32-to-bf16")
        with self.load(device, tmp_path) as weights:
            self.check(weights, {"t": array})

    @pytest.mark.parametrize(("alias", "name"), [("e4m3_float8", "float8_e4m3fn"), ("e5m2_float8", "float8_e5m2")])
    def test_aliases(self, device: Any, tmp_path: Path, alias: str, name: str) -> None:
        array = models.random_array((7,), name)
        models.write_model(tmp_path, [{"t": array}])
        relabel(tmp_path, alias, "raw")
        with self.load(device, tmp_path) as weights:
            self.check(weights, {"t": array})

    def test_many_shards_keep_their_order(self, device: Any, tmp_path: Path) -> None:
        arrays = models.simple_model(tmp_path, shards=20, shard_bytes=4096)
        with self.load(device, tmp_path) as weights:
            self.check(weights, arrays)

    def test_an_empty_model(self, device: Any, tmp_path: Path) -> None:
        models.write_model(tmp_path, [])
        reports: list[ndcache.ProgressReport] = []
        with self.load(device, tmp_path, progress=reports.append) as weights:
            self.check(weights, {})
        assert [report.text.partition(":")[0] for report in reports] == [
            "Start to fetch params",
            "Loading model from cache[0/0]",
        ]
        assert reports[-1].progress == 1.0

    def test_a_shard_with_nothing_in_it(self, device: Any, tmp_path: Path) -> None:
        empty = np.empty((0, 4), np.float32)
        models.write_model(tmp_path, [{"empty": empty}, {"full": np.ones(3, np.float32)}])
        with self.load(device, tmp_path) as weights:
            self.check(weights, {"empty": empty, "full": np.ones(3, np.float32)})

    def test_streaming(self, device: Any, tmp_path: Path) -> None:
        arrays = models.simple_model(tmp_path, shards=3)
        seen = dict(ndcache.stream(tmp_path, device))
        assert {name: np.asarray(tensor).tobytes() for name, tensor in seen.items()} == {
            name: array.tobytes() for name, array in arrays.items()
        }

    @pytest.mark.usefixtures("interruptible")
    @pytest.mark.parametrize("how", ["cancel", "Ctrl-C"])
    def test_row_36_while_tensors_are_placed(
        self, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        arrays = {f"t{n}": models.random_array((100,), seed=n) for n in range(9)}
        models.write_model(tmp_path, [arrays], encoding="f32-to-bf16")
        cancel = threading.Event()
        placed = 0

        def place(original: Any) -> Any:
            def count(*args: Any) -> Any:
                nonlocal placed
                for item in original(*args):
                    placed += 1
                    if placed == 3:
                        stop(how, cancel)
                    yield item

            return count

        for kind in (cpu_module.CpuUpload, upload_module.GpuUpload):
            monkeypatch.setattr(kind, "place", place(kind.place))
        with pytest.raises(ndcache.CancelledError if how == "cancel" else KeyboardInterrupt):
            self.load(device, tmp_path, cancel=cancel)
        assert placed == 3
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ndcache")]

    def test_closed_weights_say_so(self, device: Any, tmp_path: Path) -> None:
        models.simple_model(tmp_path, shards=1)
        weights = self.load(device, tmp_path)
        assert "1 tensor," in repr(weights)
        weights.close()
        weights.close()
        with pytest.raises(ValueError, match="closed"):
            weights["layer.0"]
        assert "closed" in repr(weights)


def stop(how: str, cancel: threading.Event) -> None:
    if how == "cancel":
        cancel.set()
    else:
        signal.raise_signal(signal.SIGINT)


def relabel(directory: Path, dtype: str, encoding: str) -> None:
    """Give every record of a model another dtype and format in the manifest."""
    import json

    path = directory / "tensor-cache.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["records"]:
        for record in shard["records"]:
            record.update(dtype=dtype, format=encoding)
    path.write_text(json.dumps(manifest))


class TestCpu(Conformance):
    @pytest.fixture
    def device(self) -> str:
        return "cpu"

    def test_views_and_copies(self, tmp_path: Path) -> None:
        models.write_model(tmp_path, [{"raw": models.random_array((8,)), "half": models.random_array((8,), "float16")}])
        models.write_model(tmp_path / "bf16", [{"t": models.random_array((8,))}], encoding="f32-to-bf16")
        raw = ndcache.load(tmp_path)
        assert not raw["raw"].flags.writeable
        assert not raw["raw"].flags.owndata
        expanded = ndcache.load(tmp_path / "bf16")["t"]
        assert expanded.flags.writeable

    @pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
    def test_arrays_of_their_own(self, tmp_path: Path, encoding: str) -> None:
        arrays = {f"t{n}": models.random_array(shape, seed=n) for n, shape in enumerate(SHAPES)}
        models.write_model(tmp_path, [arrays], encoding=encoding, gap=b"x")
        expected = ndcache.load(tmp_path)
        for decode in (True, False):
            for name, array in ndcache.load(tmp_path, copy=True, decode=decode).items():
                assert array.flags.owndata, name
                assert array.flags.writeable, name
                assert not np.shares_memory(array, expected[name])
        for name, array in ndcache.load(tmp_path, copy=True).items():
            assert array.tobytes() == expected[name].tobytes(), name
        assert dict(ndcache.stream(tmp_path, copy=True))["t0"].flags.owndata

    def test_many_shards_do_not_use_up_descriptors(self, tmp_path: Path) -> None:
        resource = pytest.importorskip("resource")
        arrays = models.simple_model(tmp_path, shards=600, shard_bytes=8)
        script = (
            "import ndcache, resource, sys\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))\n"
            "weights = ndcache.load(sys.argv[1])\n"
            "print(len(weights), sum(float(a.sum()) for a in weights.values()))"
        )
        assert resource.getrlimit(resource.RLIMIT_NOFILE)
        output = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
        ).stdout
        count, total = output.split()
        assert int(count) == 600
        assert float(total) == sum(float(array.sum()) for array in arrays.values())

    def test_a_file_that_shrinks_before_it_is_mapped(self, tmp_path: Path) -> None:
        models.simple_model(tmp_path, shards=1)
        (shard,) = ndcache.read_manifest(tmp_path).shards
        os.truncate(tmp_path / "params_shard_0.bin", 5)
        upload = cpu_module.CpuUpload(LoadStats(), decode=True, copy=False, may_map=True)
        with open(tmp_path / "params_shard_0.bin", "rb") as file, pytest.raises(ndcache.SizeMismatchError):
            upload.stage(file, shard)


class TestGpu(Conformance):
    @pytest.fixture
    def device(self, gpu: Any) -> Any:
        return gpu

    def test_the_name_opens_a_device_of_its_own(self, gpu: Any, tmp_path: Path) -> None:
        arrays = models.simple_model(tmp_path, shards=2)
        with ndcache.load(tmp_path, "gpu") as weights:
            self.check(weights, arrays)
            assert weights.device is not gpu
            limits = weights.device.adapter.limits
            for name in ("max-buffer-size", "max-storage-buffer-binding-size"):
                assert weights.device.limits[name] == limits[name]

    def test_buffers_can_be_bound_and_copied(self, gpu: Any, tmp_path: Path) -> None:
        import wgpu

        arrays = {"five": np.arange(5, dtype=np.uint8), "none": np.empty(0, np.float32)}
        models.write_model(tmp_path, [arrays])
        weights = ndcache.load(tmp_path, gpu)
        assert weights.device is gpu
        usage = wgpu.BufferUsage
        for tensor in weights.values():
            assert tensor.buffer.usage == usage.STORAGE | usage.COPY_SRC | usage.COPY_DST
            assert tensor.device is gpu
        assert weights["five"].buffer.size == 8
        assert weights["none"].buffer.size == 4
        assert bytes(gpu.queue.read_buffer(weights["five"].buffer)) == bytes([0, 1, 2, 3, 4, 0, 0, 0])
        weights.close()
        # The device is the caller's and still works.
        gpu.create_buffer(size=4, usage=usage.STORAGE).destroy()

    def test_arrays_are_made_on_demand(self, gpu: Any, tmp_path: Path) -> None:
        array = models.random_array((6, 7))
        models.write_model(tmp_path, [{"t": array}])
        with ndcache.load(tmp_path, gpu) as weights:
            tensor = weights["t"]
            assert np.asarray(tensor, dtype=np.float64).dtype == np.float64
            assert (tensor.numpy() == array).all()
            if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
                with pytest.raises(ValueError, match="without a copy"):
                    np.asarray(tensor, copy=False)
            assert repr(tensor) == "GPUTensor(shape=(6, 7), dtype=float32, nbytes=168)"

    @pytest.mark.parametrize("where", ["local", "remote"])
    def test_row_38_a_tensor_over_the_limits_is_refused_before_anything_is_fetched(
        self, gpu: Any, tmp_path: Path, serve: Callable[..., FileServer], where: str
    ) -> None:
        limit = gpu.limits["max-buffer-size"]
        models.write_model(tmp_path / "model", [{"small": np.ones(4, np.uint8)}, {"t": np.ones(5, np.uint8)}])
        path = tmp_path / "model" / "tensor-cache.json"
        size = limit + 1
        text = path.read_text().replace('"shape": [5]', f'"shape": [{size}]')
        path.write_text(text.replace('"nbytes": 5', f'"nbytes": {size}'))
        server = serve(tmp_path / "model")
        with pytest.raises(ndcache.OutOfDeviceMemoryError, match="'t'") as caught:
            ndcache.load(tmp_path / "model" if where == "local" else server.url, gpu)
        assert (caught.value.expected, caught.value.received) == (size, limit)
        assert server.shard_requests() == []

    def test_a_trace_shows_what_each_thread_does(self, gpu: Any, tmp_path: Path) -> None:
        models.write_model(tmp_path / "model", [{"t": np.ones(8, np.float32)}], encoding="f32-to-bf16")
        stats = ndcache.load(tmp_path / "model", gpu, trace=tmp_path / "trace.json").stats
        found = [event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if "dur" in event]
        sizes = {event["name"]: event["args"].get("nbytes") for event in found}
        expected = {"read": 16, "staging": 16, "buffers": 32, "copy": 16}
        assert {name: sizes[name] for name in expected} == expected
        caller = next(event["tid"] for event in found if event["name"] == "place")
        assert {event["name"] for event in found if event["tid"] == caller} >= {
            "place",
            "wait_buffers",
            "shader",
            "copy",
            "finish",
        }
        assert len({event["tid"] for event in found if event["name"] in ("place", "read", "buffers")}) == 3
        assert stats.seconds["place"] >= sum(stats.seconds[part] for part in ("wait_buffers", "shader", "copy"))

    @pytest.mark.filterwarnings("ignore:tensor 't' takes:RuntimeWarning")  # Where less can be bound than made.
    def test_row_38_a_limit_that_decoding_goes_over(self, gpu: Any, tmp_path: Path) -> None:
        """Stored as bfloat16 it fits, expanded it does not."""
        device = gpu_module.GpuDevice(gpu, is_ours=True)  # and so what cannot be bound is no error
        limit = gpu.limits["max-buffer-size"]
        models.write_model(tmp_path, [{"t": np.ones(8, np.float32)}], encoding="f32-to-bf16")
        path, count = tmp_path / "tensor-cache.json", limit // 4 + 1
        text = path.read_text().replace('"shape": [8]', f'"shape": [{count}]')
        path.write_text(text.replace('"nbytes": 16', f'"nbytes": {2 * count}'))
        shards = ndcache.read_manifest(tmp_path).shards
        device.check_limits(shards, decode=False)
        with pytest.raises(ndcache.OutOfDeviceMemoryError, match="'t'"):
            device.check_limits(shards, decode=True)

    @pytest.mark.parametrize(
        ("failure", "error"),
        [
            (lambda wgpu: wgpu.GPUOutOfMemoryError("no memory"), ndcache.OutOfDeviceMemoryError),
            (lambda wgpu: wgpu.GPUValidationError("Parent device is lost"), ndcache.DeviceError),
            (lambda wgpu: RuntimeError("device lost"), ndcache.DeviceError),
            (lambda wgpu: AttributeError("None has no attribute", name="get_token"), ndcache.DeviceError),
            (lambda wgpu: AttributeError("None has no attribute", name="other"), AttributeError),
        ],
        ids=["out of memory", "lost", "lost, by another name", "destroyed", "a mistake of ours"],
    )
    @pytest.mark.parametrize("call", ["create_buffer", "submit", "read_buffer"])
    def test_row_38_buffers_made_so_far_are_destroyed(
        self, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Any, error: Any, call: str
    ) -> None:
        import wgpu

        models.simple_model(tmp_path, shards=4)
        made, destroyed = watch_buffers(gpu, monkeypatch)
        owner = type(gpu if call == "create_buffer" else gpu.queue)
        original, calls = getattr(owner, call), 0

        def fail(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1 or call == "read_buffer":
                raise failure(wgpu)
            return original(*args, **options)

        monkeypatch.setattr(owner, call, fail)
        with pytest.raises(error) as caught:
            ndcache.load(tmp_path, gpu)
        assert type(caught.value) is error
        if error is not AttributeError:
            assert isinstance(caught.value.__cause__, (wgpu.GPUError, RuntimeError, AttributeError))
        assert made
        assert {id(buffer) for buffer in destroyed} == {id(buffer) for buffer in made}

    @pytest.mark.parametrize("call", ["create_buffer", "create_compute_pipeline"])
    def test_row_38_no_memory_for_what_comes_later(
        self, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        import wgpu

        arrays = {f"t{index}": models.random_array((1000 + 16 * index,), seed=index) for index in range(9)}
        models.write_model(tmp_path, [{name: array} for name, array in arrays.items()], encoding="f32-to-bf16")
        made, destroyed = watch_buffers(gpu, monkeypatch)
        original = getattr(type(gpu), call)

        def fail(*args: Any, **options: Any) -> Any:
            if call != "create_buffer" or options["size"] == 4 * (1000 + 16 * 8):  # the last one's
                raise wgpu.GPUOutOfMemoryError("no memory")
            return original(*args, **options)

        monkeypatch.setattr(type(gpu), call, fail)
        with pytest.raises(ndcache.OutOfDeviceMemoryError):
            ndcache.load(tmp_path, gpu)
        assert {id(buffer) for buffer in made} <= {id(buffer) for buffer in destroyed}
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ndcache")]

    def test_row_38_a_device_that_fails_as_it_is_opened(self, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        destroyed = []

        def fail(*_: Any) -> None:
            raise RuntimeError("device lost")

        def destroy(device: Any) -> None:
            destroyed.append(device)

        monkeypatch.setattr(type(gpu.queue), "read_buffer", fail)
        monkeypatch.setattr(type(gpu), "destroy", destroy)
        with pytest.raises(ndcache.DeviceError, match="device lost"):
            gpu_module.open_gpu("gpu")
        assert len(destroyed) == 1

    def test_row_38_a_device_that_is_lost(self, gpu: Any, tmp_path: Path) -> None:
        models.simple_model(tmp_path)
        opened = gpu_module.open_gpu("gpu")
        assert opened is not None
        opened.handle.destroy()
        with pytest.raises(ndcache.DeviceError, match="lost") as caught:
            ndcache.load(tmp_path, opened.handle)
        assert type(caught.value) is ndcache.DeviceError

    @pytest.mark.usefixtures("interruptible")
    @pytest.mark.parametrize(("call", "how"), [("submit", "cancel"), ("submit", "Ctrl-C"), ("read_buffer", "Ctrl-C")])
    def test_row_36_while_tensors_are_copied(
        self, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, how: str
    ) -> None:
        models.simple_model(tmp_path, shards=4)
        made, destroyed = watch_buffers(gpu, monkeypatch)
        original, cancel, calls = getattr(type(gpu.queue), call), threading.Event(), 0

        def press(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1 or call == "read_buffer":
                stop(how, cancel)
            return original(*args, **options)

        monkeypatch.setattr(type(gpu.queue), call, press)
        with pytest.raises(ndcache.CancelledError if how == "cancel" else KeyboardInterrupt):
            ndcache.load(tmp_path, gpu, cancel=cancel)
        assert {id(buffer) for buffer in made} <= {id(buffer) for buffer in destroyed}

    def test_row_38_a_device_that_is_lost_meanwhile(self, gpu: Any, tmp_path: Path) -> None:
        """In a process of its own, as wgpu ends it if it is asked to submit something."""
        models.simple_model(tmp_path, shards=4)
        script = (
            "import sys, ndcache\n"
            "from ndcache.devices.gpu import open_gpu\n"
            "device = open_gpu('gpu').handle\n"
            "stream = ndcache.stream(sys.argv[1], device)\n"
            "next(stream)\n"
            "device.destroy()\n"
            "try:\n"
            "    list(stream)\n"
            "except ndcache.DeviceError as error:\n"
            "    print(type(error).__name__)\n"
        )
        child = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], check=False, capture_output=True, text=True, timeout=120
        )
        assert (child.returncode, child.stdout) == (0, "DeviceError\n"), child.stderr

    def test_row_38_a_device_that_is_destroyed_while_a_thread_waits_for_it(self) -> None:
        """It would wait for ever: nobody polls the device any more."""
        script = (
            "import threading\n"
            "from concurrent.futures import ThreadPoolExecutor\n"
            "from ndcache.devices.gpu import open_gpu\n"
            "from ndcache.devices.gpu.staging import StagingBuffer\n"
            "device, asked = open_gpu('gpu').handle, threading.Event()\n"
            "chunk = StagingBuffer(device, 4096)\n"
            "chunk.unmap()\n"
            "device._poller._poll_func = lambda block: asked.set()  # which brings no answer\n"
            "with ThreadPoolExecutor(1) as pool:\n"
            "    mapping = pool.submit(chunk.map)\n"
            "    assert asked.wait(60)\n"
            "    device.destroy()\n"
            "    print(repr(mapping.exception(60)))\n"
        )
        child = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)
        assert (child.returncode, child.stdout) == (0, "RuntimeError('it was destroyed')\n"), child.stderr

    @pytest.mark.parametrize("memory_limit", [1, 1000, 1 << 20])
    @pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
    def test_shards_that_are_staged_in_pieces(
        self, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_limit: int, encoding: str
    ) -> None:
        monkeypatch.setattr(upload_module, "_BATCH_BYTES", 8192)
        sizes = [(30_001,), (3,), (0,), (8192,), (100, 77), (5,)]
        arrays = {f"t{n}": models.random_array(shape, seed=n) for n, shape in enumerate(sizes)}
        names = list(arrays)
        shards = [{name: arrays[name] for name in part} for part in (names[:3], names[3:5], names[5:])]
        models.write_model(tmp_path, shards, encoding=encoding, gap=b"x")
        expected = {name: np.asarray(array) for name, array in ndcache.load(tmp_path).items()}
        with self.load(gpu, tmp_path, memory_limit=memory_limit) as weights:
            self.check(weights, expected)

    def test_without_memory_that_can_be_written_in_place(
        self, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kind = type(gpu.create_buffer(size=4, usage=1 << 7))
        monkeypatch.delattr(kind, "_experimental_get_mapped_range", raising=False)
        arrays = models.simple_model(tmp_path, shards=40)
        with self.load(gpu, tmp_path, max_workers=2, memory_limit=1 << 18) as weights:
            self.check(weights, arrays)

    def test_a_file_that_shrinks_while_it_is_staged(
        self, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models.simple_model(tmp_path, shards=2)
        check = upload_module.check_size

        def cut(file: Any, shard: Any) -> None:
            check(file, shard)
            os.truncate(tmp_path / shard.data_path, 5)

        monkeypatch.setattr(upload_module, "check_size", cut)
        made, destroyed = watch_buffers(gpu, monkeypatch)
        with pytest.raises(ndcache.SizeMismatchError, match="5 bytes"):
            ndcache.load(tmp_path, gpu)
        assert {id(buffer) for buffer in destroyed} == {id(buffer) for buffer in made}

    def test_staging_memory_goes_round(self, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        made, destroyed = watch_buffers(gpu, monkeypatch)
        ring = StagingRing(gpu, limit=3 << 16)
        chunks = [ring.acquire(1 << 16) for _ in range(2)]
        for chunk in chunks:
            chunk.view[:4] = b"data"
            chunk.unmap()
            ring.release(chunk)
        assert ring.acquire(1 << 16) is chunks[0]  # the oldest
        assert len(made) == 2
        assert ring.acquire(40_000) is chunks[1]  # a larger one will do
        ring.release(chunks[1])
        ring.acquire(1 << 18)  # for which there is no room otherwise
        assert destroyed == [chunks[1].buffer]
        ring.acquire(1 << 18)  # what is over the limit is held by others, which are not waited for
        ring.destroy()
        assert {id(buffer) for buffer in destroyed} == {id(buffer) for buffer in made}

    def test_real_adapters_go_first_and_each_is_counted_once(self, gpu: Any) -> None:
        found = adapters_module.list_adapters()
        assert found
        names = [adapter.info["device"] for adapter in found]
        assert len(names) == len(set(names))
        software = [adapters_module.is_software(adapter) for adapter in found]
        assert software == sorted(software)


def watch_buffers(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """The buffers that will be made on the device, and those that will be destroyed."""
    made: list[Any] = []
    destroyed: list[Any] = []
    create = type(gpu).create_buffer
    kind = type(gpu.create_buffer(size=4, usage=1 << 7))
    destroy = kind.destroy

    def create_buffer(self: Any, **options: Any) -> Any:
        made.append(create(self, **options))
        return made[-1]

    def destroy_buffer(self: Any) -> None:
        destroyed.append(self)
        destroy(self)

    monkeypatch.setattr(type(gpu), "create_buffer", create_buffer)
    monkeypatch.setattr(kind, "destroy", destroy_buffer)
    return made, destroyed


@given(
    sizes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 9), st.booleans()), max_size=12),
    limit=st.sampled_from([4, 8, 64, 256, 4096, 1 << 20]),
    order=st.randoms(use_true_random=False),
)
def test_the_layout_of_staging_memory(sizes: list[tuple[int, int, bool]], limit: int, order: Any) -> None:
    """What a GPU does with pieces, done here: every byte gets to where it belongs, in words."""
    records, offset = [], 0
    for index, (count, gap, is_bf16) in enumerate(sizes):
        offset += gap
        nbytes = 2 * count if is_bf16 else count
        records.append(
            Record(
                name=f"t{index}",
                shape=(count,),
                dtype="float32" if is_bf16 else "uint8",
                format="f32-to-bf16" if is_bf16 else "raw",
                byte_offset=offset,
                nbytes=nbytes,
            )
        )
        offset += nbytes
    order.shuffle(records)
    file = np.random.default_rng(offset).bytes(offset)
    tensors = [bytearray(-(-record.nbytes // 4) * 4) for record in records]
    for batch in plan_batches(records, limit, decode=True):
        assert batch.nbytes <= limit
        memory = bytearray(b"\xff" * batch.nbytes)
        for read in batch.reads:
            data = file[read.file_offset : read.file_offset + read.nbytes]
            memory[read.staging_offset : read.staging_offset + read.nbytes] = data
            if read.is_tail:
                memory[read.staging_offset : read.staging_offset + 4] = data + bytes(4 - len(data))
        start, end = batch.expanded_range
        assert 0 <= start <= end <= batch.nbytes
        for copy in batch.copies:
            assert copy.staging_offset % 4 == copy.tensor_offset % 4 == 0
            assert copy.is_expanded == records[copy.record_index].is_bf16_encoded
            assert copy.nbytes % (2 if copy.is_expanded else 4) == 0
            assert not copy.is_expanded or start <= copy.staging_offset < copy.staging_offset + copy.nbytes <= end
            tensors[copy.record_index][copy.tensor_offset : copy.tensor_offset + copy.nbytes] = memory[
                copy.staging_offset : copy.staging_offset + copy.nbytes
            ]
    for record, tensor in zip(records, tensors, strict=True):
        stored = file[record.byte_offset : record.byte_offset + record.nbytes]
        assert tensor == stored + bytes(len(tensor) - record.nbytes)


class Adapter:
    """What `list_adapters` looks at."""

    def __init__(self, device: str, adapter_type: str, backend: str) -> None:
        self.info = {"device": device, "adapter_type": adapter_type, "backend_type": backend}


def test_the_order_of_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    import wgpu

    found = [
        Adapter("llvmpipe (LLVM 15)", "CPU", "Vulkan"),
        Adapter("NVIDIA H200/PCIe/SSE2", "Unknown", "OpenGL"),
        Adapter("NVIDIA H200", "DiscreteGPU", "Vulkan"),
        Adapter("NVIDIA H200", "DiscreteGPU", "Vulkan"),
        Adapter("Intel(R) UHD", "IntegratedGPU", "D3D12"),
        Adapter("llvmpipe (LLVM 15)", "CPU", "OpenGL"),
    ]
    monkeypatch.setattr(adapters_module, "_known", [])
    monkeypatch.setattr(adapters_module, "_list_primary", lambda: None)
    monkeypatch.setattr(wgpu.gpu, "enumerate_adapters_sync", lambda: found)
    assert [(a.info["device"], a.info["backend_type"]) for a in adapters_module.list_adapters()] == [
        ("NVIDIA H200", "Vulkan"),
        ("NVIDIA H200", "Vulkan"),
        ("Intel(R) UHD", "D3D12"),
        ("llvmpipe (LLVM 15)", "Vulkan"),
    ]


def test_row_38_no_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wgpu

    monkeypatch.setattr(adapters_module, "_known", [])
    monkeypatch.setattr(adapters_module, "_list_primary", list)
    monkeypatch.setattr(wgpu.gpu, "enumerate_adapters_sync", list)
    models.simple_model(tmp_path)
    with pytest.raises(ndcache.NoAdapterError, match="no GPU adapter") as caught:
        ndcache.load(tmp_path, "gpu")
    if sys.platform == "linux":
        assert "mesa-vulkan-drivers" in str(caught.value)
    assert ndcache.load(tmp_path, "auto").device == "cpu"


def test_row_38_an_adapter_index_that_is_too_high(gpu: Any, tmp_path: Path) -> None:
    models.simple_model(tmp_path)
    with pytest.raises(ndcache.NoAdapterError, match="no GPU adapter 99"):
        ndcache.load(tmp_path, "gpu:99")


def test_row_38_wgpu_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models.simple_model(tmp_path)
    monkeypatch.setitem(sys.modules, "wgpu", None)
    with pytest.raises(ndcache.NoAdapterError, match="wgpu cannot be loaded"):
        ndcache.load(tmp_path, "gpu")
    assert ndcache.load(tmp_path, "auto").device == "cpu"


@pytest.mark.parametrize("device", ["gpuu", "GPU", "gpu:", "gpu:-1", "cuda", "", "cpu:0"])
def test_a_device_that_is_none(device: str) -> None:
    with pytest.raises(ValueError, match="device must be 'cpu', 'gpu', 'gpu:N' or 'auto'"):
        open_device(device)


@pytest.mark.parametrize("device", [None, 0, object()])
def test_a_device_of_another_type(device: object) -> None:
    with pytest.raises(TypeError, match="device must be a string"):
        open_device(device)
