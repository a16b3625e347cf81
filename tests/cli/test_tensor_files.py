"""Test reading .safetensors files, whose bytes are made here, and .npz files."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import ndcache
from ndcache.cli.tensor_files import TensorFileError, read_tensors

pytest.importorskip("safetensors")

KINDS: dict[str, Any] = {
    **{"BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "F16": np.float16},
    **{"U32": np.uint32, "I32": np.int32, "F32": np.float32, "U64": np.uint64, "I64": np.int64, "F64": np.float64},
    **{"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
}


def write(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_each_dtype(tmp_path: Path, kind: str) -> None:
    dtype = np.dtype(KINDS[kind])
    data = bytes([0, 1] * 128) if kind == "BOOL" else bytes(range(256))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    shapes: dict[str, list[int]] = {"a": [256 // dtype.itemsize // 4, 4], "none": [0, 3], "one": []}
    offset = 0
    for name, shape in shapes.items():
        nbytes = int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    path = write(tmp_path / "x.safetensors", header, data + data[: dtype.itemsize])
    read = dict(read_tensors(path))
    assert {name: list(array.shape) for name, array in read.items()} == shapes
    assert all(array.dtype == dtype for array in read.values())
    assert read["a"].tobytes() == data
    ndcache.dump(read_tensors(path), tmp_path / "out", encode="raw")
    loaded = ndcache.load(tmp_path / "out")
    assert loaded["a"].dtype == dtype
    assert loaded["a"].tobytes() == data
    assert loaded["one"].tobytes() == data[: dtype.itemsize]


@pytest.mark.parametrize("kind", ["F8_E8M0", "F4", "F6_E2M3", "C64", "X9"])
def test_a_dtype_that_the_format_lacks_is_named(tmp_path: Path, kind: str) -> None:
    nbytes = 24
    size = {"F4": 48, "F6_E2M3": 32, "C64": 3}.get(kind, nbytes)
    header = {"a": {"dtype": kind, "shape": [size], "data_offsets": [0, nbytes]}}
    path = write(tmp_path / "x.safetensors", header, bytes(nbytes))
    with pytest.raises(TensorFileError, match=kind):
        list(read_tensors(path))


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"{", b""),
        (b"[]", b""),
        ({"a": {"dtype": "F8_E4M3", "shape": [9], "data_offsets": [0, 8]}}, bytes(8)),
        ({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, bytes(7)),
        ({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [8, 0]}}, bytes(8)),
        ({"a": {"dtype": "F8_E4M3", "shape": [-8], "data_offsets": [0, 8]}}, bytes(8)),
        ({"a": {"dtype": "F8_E4M3"}}, bytes(8)),
    ],
)
def test_a_damaged_safetensors_file(tmp_path: Path, header: Any, data: bytes) -> None:
    with pytest.raises(TensorFileError, match=r"not a \.safetensors file, or is damaged"):
        list(read_tensors(write(tmp_path / "x.safetensors", header, data)))


@pytest.mark.parametrize("damage", ["compressed bytes", "directory", "header"])
def test_a_damaged_npz_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "in.npz"
    np.savez_compressed(path, a=np.arange(1000), b=np.arange(1000))
    data = bytearray(path.read_bytes())
    where = {"compressed bytes": 100, "directory": data.rindex(b"PK\x01\x02"), "header": 0}[damage]
    data[where : where + 4] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(TensorFileError, match=r"in\.npz"):
        list(read_tensors(path))


def test_an_npz_file_with_two_arrays_of_one_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "a.npy")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.write(tmp_path / "a.npy", "a.npy")
    with pytest.raises(TensorFileError, match=r"in\.npz has more than one array 'a'"):
        list(read_tensors(tmp_path / "in.npz"))
