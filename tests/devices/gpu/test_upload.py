"""Uploads to a GPU, and calls of wgpu that fail during one."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache.devices.gpu import upload as upload_module
from ndcache.devices.reading import check_size

from ...helpers import models
from ...helpers.devices import BufferWatch, assert_tensors, stop


def test_a_trace_shows_what_each_thread_does(gpu: Any, tmp_path: Path) -> None:
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


def test_the_main_thread_submits_nothing_itself(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # wgpu may call back from a submission, and Ctrl-C would be lost in the callback.
    models.simple_model(tmp_path, shards=3)
    original, threads = type(gpu.queue).submit, set()

    def submit(queue: Any, commands: Any) -> Any:
        threads.add(threading.current_thread())
        return original(queue, commands)

    monkeypatch.setattr(type(gpu.queue), "submit", submit)
    with ndcache.load(tmp_path, gpu):
        assert threads
        assert threading.main_thread() not in threads


@pytest.mark.parametrize("memory_limit", [1, 1000, 1 << 20])
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_shards_may_be_staged_in_several_batches(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_limit: int, encoding: str
) -> None:
    monkeypatch.setattr(upload_module, "_BATCH_BYTES", 8192)
    sizes = [(30_001,), (3,), (0,), (8192,), (100, 77), (5,)]
    arrays = {f"t{n}": models.random_array(shape, seed=n) for n, shape in enumerate(sizes)}
    names = list(arrays)
    shards = [{name: arrays[name] for name in part} for part in (names[:3], names[3:5], names[5:])]
    models.write_model(tmp_path, shards, encoding=encoding, gap=b"x")
    expected = {name: np.asarray(array) for name, array in ndcache.load(tmp_path).items()}
    with ndcache.load(tmp_path, gpu, memory_limit=memory_limit) as weights:
        assert_tensors(weights, expected)


def test_a_file_that_shrinks_while_it_is_staged_is_refused(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.simple_model(tmp_path, shards=2)

    def cut(file: Any, segment: Any) -> None:
        check_size(file, segment)
        os.truncate(tmp_path / segment.shard.data_path, 5)

    monkeypatch.setattr(upload_module, "check_size", cut)
    watch = BufferWatch(gpu, monkeypatch)
    with pytest.raises(ndcache.SizeMismatchError, match="5 bytes"):
        ndcache.load(tmp_path, gpu)
    assert watch.alive == 0


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("call", "how"), [("submit", "cancel"), ("submit", "Ctrl-C"), ("read_buffer", "Ctrl-C")])
def test_row_36_a_load_is_stopped_while_tensors_are_copied(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, how: str
) -> None:
    models.simple_model(tmp_path, shards=4)
    watch = BufferWatch(gpu, monkeypatch)
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
    assert watch.alive == 0


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
def test_row_38_a_failed_call_of_wgpu_frees_all_buffers(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Any, error: Any, call: str
) -> None:
    import wgpu

    models.simple_model(tmp_path, shards=4)
    watch = BufferWatch(gpu, monkeypatch)
    owner = type(gpu if call == "create_buffer" else gpu.queue)
    failing = 2 if call == "create_buffer" else 1  # there must be a buffer to free
    original, calls = getattr(owner, call), 0

    def fail(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing or call == "read_buffer":
            raise failure(wgpu)
        return original(*args, **options)

    monkeypatch.setattr(owner, call, fail)
    with pytest.raises(error) as caught:
        ndcache.load(tmp_path, gpu)
    assert type(caught.value) is error
    if error is not AttributeError:
        assert isinstance(caught.value.__cause__, (wgpu.GPUError, RuntimeError, AttributeError))
    assert watch.made
    assert watch.alive == 0


@pytest.mark.parametrize("call", ["create_buffer", "create_compute_pipeline"])
def test_row_38_a_gpu_without_memory_for_a_later_tensor_or_the_shader_is_an_error(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    import wgpu

    arrays = {f"t{index}": models.random_array((1000 + 16 * index,), seed=index) for index in range(9)}
    models.write_model(tmp_path, [{name: array} for name, array in arrays.items()], encoding="f32-to-bf16")
    watch = BufferWatch(gpu, monkeypatch)
    original = getattr(type(gpu), call)

    def fail(*args: Any, **options: Any) -> Any:
        if call != "create_buffer" or options["size"] == 4 * (1000 + 16 * 8):  # the last one's
            raise wgpu.GPUOutOfMemoryError("no memory")
        return original(*args, **options)

    monkeypatch.setattr(type(gpu), call, fail)
    with pytest.raises(ndcache.OutOfDeviceMemoryError):
        ndcache.load(tmp_path, gpu)
    assert watch.alive == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ndcache")]
