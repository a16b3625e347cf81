"""Opening a GPU, and GPUs that fail or get lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.devices.gpu.device import open_gpu

from ...helpers import models
from ...helpers.devices import assert_tensors


def test_the_name_opens_a_device_of_its_own(gpu: Any, tmp_path: Path) -> None:
    arrays = models.simple_model(tmp_path, shards=2)
    with ndcache.load(tmp_path, "gpu") as weights:
        assert_tensors(weights, arrays)
        assert weights.device is not gpu
        limits = weights.device.adapter.limits
        for name in ("max-buffer-size", "max-storage-buffer-binding-size"):
            assert weights.device.limits[name] == limits[name]


def test_row_38_a_device_that_fails_at_its_first_submission_is_destroyed(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    destroyed = []

    def fail(*_: Any) -> None:
        raise RuntimeError("device lost")

    def destroy(device: Any) -> None:
        destroyed.append(device)

    monkeypatch.setattr(type(gpu.queue), "read_buffer", fail)
    monkeypatch.setattr(type(gpu), "destroy", destroy)
    with pytest.raises(ndcache.DeviceError, match="device lost"):
        open_gpu("gpu")
    assert len(destroyed) == 1


def test_row_38_a_lost_device_is_an_error(gpu: Any, tmp_path: Path) -> None:
    models.simple_model(tmp_path)
    opened = open_gpu("gpu")
    assert opened is not None
    opened.handle.destroy()
    with pytest.raises(ndcache.DeviceError, match="lost") as caught:
        ndcache.load(tmp_path, opened.handle)
    assert type(caught.value) is ndcache.DeviceError


def test_row_38_a_device_that_is_destroyed_during_a_stream_is_an_error(gpu: Any, tmp_path: Path) -> None:
    # In a process of its own, as wgpu ends the process if something is submitted to a destroyed device.
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


def test_row_38_a_device_that_is_destroyed_during_a_wait_ends_the_wait() -> None:
    # The wait would never end by itself: no thread polls a destroyed device.
    script = (
        "import threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from ndcache.devices.gpu import open_gpu\n"
        "from ndcache.devices.gpu.staging import StagingBuffer\n"
        "device, asked = open_gpu('gpu').handle, threading.Event()\n"
        "if not hasattr(device, '_poller'):\n"
        "    print(repr(RuntimeError('it was destroyed')))  # wgpu 0.26: each thread that waits polls by itself\n"
        "    raise SystemExit\n"
        "staging = StagingBuffer(device, 4096)\n"
        "staging.unmap()\n"
        "device._poller._poll_func = lambda block: asked.set()  # gets no answer\n"
        "with ThreadPoolExecutor(1) as pool:\n"
        "    mapping = pool.submit(staging.map)\n"
        "    assert asked.wait(60)\n"
        "    device.destroy()\n"
        "    print(repr(mapping.exception(60)))\n"
    )
    child = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stdout) == (0, "RuntimeError('it was destroyed')\n"), child.stderr
