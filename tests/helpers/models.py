"""Write small models for tests, by hand: the reader must not be tested with its own writer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


def stored_bytes(array: np.ndarray[Any, Any], encoding: str = "raw") -> bytes:
    """Return the bytes of a tensor in a shard."""
    if encoding == "f32-to-bf16" and array.dtype == np.float32:
        array = array.astype(ml_dtypes.bfloat16)
    return array.tobytes()


def record(name: str, array: np.ndarray[Any, Any], offset: int, encoding: str = "raw") -> dict[str, Any]:
    """Return the JSON of a record."""
    return {
        "name": name,
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "format": encoding,
        "nbytes": len(stored_bytes(array, encoding)),
        "byteOffset": offset,
    }


def write_model(
    directory: Path,
    shards: Sequence[Mapping[str, np.ndarray[Any, Any]]],
    *,
    encoding: str = "raw",
    manifest_name: str = "tensor-cache.json",
    metadata: Mapping[str, Any] | None = None,
    md5: bool = True,
    gap: bytes = b"",
) -> dict[str, Any]:
    """Write a model directory: one file for each mapping of names to arrays, `gap` before each tensor.

    Returns
    -------
    dict
        The manifest's JSON.
    """
    directory.mkdir(parents=True, exist_ok=True)
    records = []
    for index, arrays in enumerate(shards):
        data, items = b"", []
        for name, array in arrays.items():
            data += gap
            items.append(record(name, array, len(data), encoding))
            data += stored_bytes(array, encoding)
        path = f"params_shard_{index}.bin"
        (directory / path).write_bytes(data)
        records.append(
            {
                "dataPath": path,
                "format": "raw-shard",
                "nbytes": len(data),
                "records": items,
                **({"md5sum": hashlib.md5(data).hexdigest()} if md5 else {}),
            }
        )
    manifest = {"metadata": dict(metadata or {}), "records": records}
    (directory / manifest_name).write_text(json.dumps(manifest))
    return manifest


def random_array(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray[Any, Any]:
    """Return random values of any dtype of the format; no NaN."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        return rng.standard_normal(shape).astype(getattr(ml_dtypes, dtype))
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return rng.standard_normal(shape).astype(kind)
    return rng.integers(0, 256, (math.prod(shape) * kind.itemsize,), np.uint8).view(kind).reshape(shape)


def through_bf16(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return float32 rounded to bfloat16 as TVM does, computed with integers; other dtypes unchanged.

    Values are rounded to nearest even, and cut off at the largest bfloat16.
    """
    if array.dtype != np.float32:
        return array
    bits = array.view(np.uint32).astype(np.uint64)
    largest = np.uint32(0x7F7F0000).view(np.float32)
    # All of one dtype: old releases of NumPy do not shift a single uint64 by an int.
    half, one, shift, upper = map(np.uint64, (0x7FFF, 1, 16, 0xFFFF0000))
    rounded = np.where(np.abs(array) < largest, bits + half + ((bits >> shift) & one), bits) & upper
    return rounded.astype(np.uint32).view(np.float32)


def simple_model(
    directory: Path, shards: int = 4, shard_bytes: int = 1 << 16, seed: int = 0
) -> dict[str, np.ndarray[Any, Any]]:
    """Write a model of `shards` shards with one raw float32 tensor each, which are those of a seed.

    Returns
    -------
    dict
        Its tensors, ``"layer.0"`` and so on.
    """
    arrays = {f"layer.{index}": random_array((shard_bytes // 4,), seed=seed + index) for index in range(shards)}
    write_model(directory, [{name: array} for name, array in arrays.items()])
    return arrays


def assert_same(weights: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Check names and their order, dtypes, shapes and bytes."""
    assert list(weights) == list(arrays)
    for name, array in arrays.items():
        loaded = np.asarray(weights[name])
        assert (loaded.dtype, loaded.shape) == (array.dtype, array.shape), name
        assert loaded.tobytes() == array.tobytes(), name
