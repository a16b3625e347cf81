"""Tensors that are larger than what a GPU can hold, or bind at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache import devices
from ndcache.devices.gpu.device import GpuDevice

from ...helpers import models
from ...helpers.servers import FileServer

BINDABLE = 1 << 16


@pytest.fixture
def limited(gpu: Any) -> Any:
    """Return a device that can bind 64 KiB at once."""
    device = gpu.adapter.request_device_sync(required_limits={"max-storage-buffer-binding-size": BINDABLE})
    assert device.limits["max-storage-buffer-binding-size"] == BINDABLE
    return device


def write(directory: Path) -> None:
    arrays = {name: np.zeros(size, np.uint8) for name, size in (("fits", BINDABLE), ("large", BINDABLE + 1))}
    models.write_model(directory, [arrays, {f"larger.{n}": np.zeros(2 * BINDABLE, np.uint8) for n in range(4)}])


def test_row_62_a_tensor_that_cannot_be_bound_is_a_warning_on_the_callers_line(
    limited: Any, tmp_path: Path, serve: Callable[..., FileServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    server = serve(tmp_path)
    monkeypatch.setattr(devices, "open_gpu", lambda *_: GpuDevice(limited, is_ours=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = ndcache.load(server.url, "gpu")
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert warning.filename == __file__
    for words in ("tensors 'large' takes 65,537 bytes", "'larger.1' takes 131,072", "2 more", "65,536", "in parts"):
        assert words in str(warning.message)
    assert weights["larger.3"].buffer.size == 2 * BINDABLE
    weights.close()


def test_row_62_the_warning_comes_before_anything_is_fetched(
    limited: Any, tmp_path: Path, serve: Callable[..., FileServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    server = serve(tmp_path)
    monkeypatch.setattr(devices, "open_gpu", lambda *_: GpuDevice(limited, is_ours=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="'large'"):
            ndcache.load(server.url, "gpu")
    assert not server.shard_requests()


def test_row_62_a_tensor_that_the_callers_device_cannot_bind_is_an_error(
    limited: Any, tmp_path: Path, serve: Callable[..., FileServer]
) -> None:
    write(tmp_path)
    server = serve(tmp_path)
    with pytest.raises(ndcache.DeviceError, match=r"'large'.*required_limits.*device='gpu'") as caught:
        ndcache.load(server.url, limited)
    assert (caught.value.expected, caught.value.received) == (BINDABLE + 1, BINDABLE)
    assert not server.shard_requests()
    with ndcache.load(server.url, limited, names="fits") as weights:
        assert weights["fits"].buffer.size == BINDABLE


@pytest.mark.parametrize("where", ["local", "remote"])
def test_row_38_a_tensor_over_the_limits_is_refused_before_anything_is_fetched(
    gpu: Any, tmp_path: Path, serve: Callable[..., FileServer], where: str
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


@pytest.mark.filterwarnings("ignore:tensor 't' takes:RuntimeWarning")  # on devices that bind less than they hold
def test_row_38_a_tensor_that_exceeds_the_limits_once_expanded_is_refused(gpu: Any, tmp_path: Path) -> None:
    device = GpuDevice(gpu, is_ours=True)  # so that a tensor that cannot be bound is only a warning
    limit = gpu.limits["max-buffer-size"]
    models.write_model(tmp_path, [{"t": np.ones(8, np.float32)}], encoding="f32-to-bf16")
    path, count = tmp_path / "tensor-cache.json", limit // 4 + 1
    text = path.read_text().replace('"shape": [8]', f'"shape": [{count}]')
    path.write_text(text.replace('"nbytes": 16', f'"nbytes": {2 * count}'))
    shards = ndcache.read_manifest(tmp_path).shards
    device.check_limits(shards, decode=False)
    with pytest.raises(ndcache.OutOfDeviceMemoryError, match="'t'"):
        device.check_limits(shards, decode=True)
