"""The tensors of .safetensors and .npz files, one after another, for ``ndcache dump``."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

__all__ = ["read_tensors"]

#: The dtypes of safetensors that NumPy has only with ml_dtypes: its package does not give all of them as arrays.
_ML_DTYPES = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_NUMPY_KINDS = {"BOOL", "U8", "I8", "U16", "I16", "F16", "U32", "I32", "F32", "U64", "I64", "F64"}
#: Bytes of a header, as safetensors limits them.
_MAX_HEADER = 100_000_000


def read_tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Give the names and arrays of a file.

    Raises
    ------
    ValueError
        It is of neither kind, damaged, or has a tensor that NumPy cannot hold.
    ImportError
        It is .safetensors and the package safetensors is not installed.
    """
    kind = path.suffix.lower()
    if kind == ".npz":
        return _read_npz(path)
    if kind == ".safetensors":
        return _read_safetensors(path)
    raise ValueError(f"{path} is neither .safetensors nor .npz")


def _read_npz(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is not an .npz file, or damaged")
        with np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                try:
                    array = arrays[name]
                except ValueError as error:
                    raise ValueError(f"array {name!r} of {path} cannot be read: {error}") from error
                yield name, array


def _read_safetensors(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError('reading .safetensors takes another package: pip install "ndcache[safetensors]"') from error
    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except SafetensorError as error:
            _check_kinds(path)
            raise ValueError(f"{path} is not a .safetensors file, or damaged: {error}") from error
        raw = stack.enter_context(open(path, "rb"))
        header, start = _read_header(raw)
        for name in file.keys():  # noqa: SIM118 - not a mapping
            kind = header[name]["dtype"]
            if kind in _ML_DTYPES:
                begin, end = header[name]["data_offsets"]
                raw.seek(start + begin)
                tensor = np.fromfile(raw, np.uint8, end - begin).view(_ML_DTYPES[kind]).reshape(header[name]["shape"])
            elif kind in _NUMPY_KINDS:
                tensor = file.get_tensor(name)
            else:
                raise _unnamed(name, path, kind)
            yield name, tensor


def _check_kinds(path: Path) -> None:
    """Raise if a file has tensors of a kind that older versions of safetensors do not even read."""
    header: dict[str, Any] = {}
    with suppress(OSError, ValueError, struct.error, RecursionError), open(path, "rb") as raw:
        header, _ = _read_header(raw)
    for name, fields in header.items() if isinstance(header, dict) else ():
        kind = fields.get("dtype") if isinstance(fields, dict) and name != "__metadata__" else None
        if isinstance(kind, str) and kind not in _ML_DTYPES and kind not in _NUMPY_KINDS:
            raise _unnamed(name, path, kind)


def _unnamed(name: str, path: Path, kind: str) -> ValueError:
    return ValueError(f"tensor {name!r} of {path} is of the kind {kind}, which the format has no name for")


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Give what a file that safetensors has checked says of its tensors, and where their bytes begin.

    Source: https://github.com/huggingface/safetensors#format
    """
    (length,) = struct.unpack("<Q", file.read(8))
    return json.loads(file.read(min(length, _MAX_HEADER))), 8 + length
