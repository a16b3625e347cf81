"""Tensors in GPU buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache

from ...helpers import models


def test_buffers_can_be_bound_and_copied(gpu: Any, tmp_path: Path) -> None:
    import wgpu

    arrays: dict[str, np.ndarray[Any, Any]] = {"five": np.arange(5, dtype=np.uint8), "none": np.empty(0, np.float32)}
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


def test_a_tensor_becomes_an_array_on_demand(gpu: Any, tmp_path: Path) -> None:
    array = models.random_array((6, 7))
    models.write_model(tmp_path, [{"t": array}])
    with ndcache.load(tmp_path, gpu) as weights:
        tensor = weights["t"]
        assert np.asarray(tensor, dtype=np.float64).dtype == np.float64
        assert (tensor.numpy() == array).all()
        if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
            with pytest.raises(ValueError, match="without a copy"):
                np.asarray(tensor, copy=False)
        assert (tensor.ndim, tensor.size, len(tensor)) == (array.ndim, array.size, len(array))
        assert repr(tensor) == "GPUTensor(shape=(6, 7), dtype=float32, nbytes=168)"


def test_a_scalar_has_no_length_and_an_empty_tensor_is_there(gpu: Any, tmp_path: Path) -> None:
    models.write_model(tmp_path, [{"scalar": np.full((), 2, np.float32), "empty": np.empty((0, 3), np.float32)}])
    with ndcache.load(tmp_path, gpu) as weights:
        scalar, empty = weights["scalar"], weights["empty"]
        assert (scalar.ndim, scalar.size, empty.ndim, empty.size, len(empty)) == (0, 1, 2, 0, 0)
        with pytest.raises(TypeError, match="scalar"):
            len(scalar)
        assert scalar
        assert empty
