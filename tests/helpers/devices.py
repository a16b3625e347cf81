"""Helpers for tests of devices: compare tensors with arrays, and watch a GPU's buffers."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ndcache.format.numpy_dtypes import TENSOR_DTYPES

from .requirements import need_module

#: Shapes with no, one and several elements, in words and beside them.
SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (4,), (5, 7), (0,), (3, 0, 2), (2, 3, 4, 5), (1025,)]


def assert_tensors(weights: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Assert that tensors and arrays have the same names, in order, and the same shapes, dtypes and bytes."""
    assert list(weights) == list(arrays)
    for name, array in arrays.items():
        tensor = weights[name]
        assert (tensor.shape, tensor.nbytes) == (array.shape, array.nbytes), name
        back = as_array(tensor)
        assert (back.shape, back.dtype) == (array.shape, array.dtype), name
        assert back.tobytes() == array.tobytes(), name


def as_array(tensor: Any) -> np.ndarray[Any, Any]:
    """Return a copy of a tensor of any device, with the same dtype."""
    if type(tensor).__module__ != "torch":
        back: np.ndarray[Any, Any] = np.asarray(tensor)
        assert back.dtype == tensor.dtype
        return back
    torch = need_module("torch")
    # PyTorch cannot give NumPy its smallest floats.
    stored: np.ndarray[Any, Any] = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return stored.view(TENSOR_DTYPES[str(tensor.dtype).removeprefix("torch.")]).reshape(tensor.shape)


def relabel(directory: Path, dtype: str, encoding: str) -> None:
    """Give every record of a model another dtype and format in the manifest."""
    path = directory / "tensor-cache.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["records"]:
        for record in shard["records"]:
            record.update(dtype=dtype, format=encoding)
    path.write_text(json.dumps(manifest))


def stop(how: str, cancel: threading.Event) -> None:
    """Stop a load from one of its threads: by its ``cancel`` event or as Ctrl-C does."""
    if how == "cancel":
        cancel.set()
    else:
        signal.raise_signal(signal.SIGINT)


class BufferWatch:
    """Record the buffers that are made and destroyed on a `wgpu.GPUDevice`.

    Attributes
    ----------
    made, destroyed : list of wgpu.GPUBuffer
    """

    def __init__(self, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Any] = []
        self.destroyed: list[Any] = []
        create = type(gpu).create_buffer
        kind = type(gpu.create_buffer(size=4, usage=1 << 7))
        destroy = kind.destroy

        def create_buffer(device: Any, **options: Any) -> Any:
            self.made.append(create(device, **options))
            return self.made[-1]

        def destroy_buffer(buffer: Any) -> None:
            self.destroyed.append(buffer)
            destroy(buffer)

        monkeypatch.setattr(type(gpu), "create_buffer", create_buffer)
        monkeypatch.setattr(kind, "destroy", destroy_buffer)

    @property
    def alive(self) -> int:
        """Return how many of the buffers made are not destroyed."""
        return len({id(buffer) for buffer in self.made} - {id(buffer) for buffer in self.destroyed})
