"""Read .safetensors and .npz files, one tensor after another, for ``ndcache dump``."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["TensorFileError", "read_tensors"]

#: The dtypes that NumPy has only with ml_dtypes. The package safetensors does not return all of them as arrays.
_ML_DTYPES = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_NUMPY_DTYPES = {"BOOL", "U8", "I8", "U16", "I16", "F16", "U32", "I32", "F32", "U64", "I64", "F64"}
#: The largest header, in bytes, that the package safetensors accepts.
_MAX_HEADER = 100_000_000
#: Errors that NumPy and zipfile raise for damaged files.
_NPZ_ERRORS = (ValueError, EOFError, zipfile.BadZipFile, zlib.error)


class TensorFileError(ValueError):
    """A file has another format, is damaged, has a tensor that NumPy cannot hold, or needs a missing package."""


def read_tensors(path: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the name and array of each tensor of a file.

    Raises
    ------
    TensorFileError, OSError
    """
    kind = path.suffix.lower()
    if kind == ".npz":
        return _read_npz(path)
    if kind == ".safetensors":
        return _read_safetensors(path)
    raise TensorFileError(f"{path} is neither .safetensors nor .npz")


def _read_npz(path: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise TensorFileError(f"{path} is not an .npz file, or is damaged")
        try:
            arrays = np.load(file, allow_pickle=False)
        except _NPZ_ERRORS as error:
            raise TensorFileError(f"{path} is not an .npz file, or is damaged: {error}") from error
        with arrays:
            if twice := [name for name, number in Counter(arrays.files).items() if number > 1]:
                raise TensorFileError(f"{path} has more than one array {twice[0]!r}")
            for name in arrays.files:
                try:
                    array = arrays[name]
                except _NPZ_ERRORS as error:
                    raise TensorFileError(f"array {name!r} of {path} cannot be read: {error}") from error
                yield name, array


def _read_safetensors(path: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise TensorFileError(
            'reading .safetensors needs another package: pip install "ndcache[safetensors]"'
        ) from error
    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except SafetensorError as error:
            _check_dtypes(path)
            raise TensorFileError(f"{path} is not a .safetensors file, or is damaged: {error}") from error
        raw = stack.enter_context(open(path, "rb"))
        header, start = _read_header(raw)
        for name in file.keys():  # noqa: SIM118 - not a mapping
            kind = header[name]["dtype"]
            if kind in _ML_DTYPES:
                begin, end = header[name]["data_offsets"]
                raw.seek(start + begin)
                tensor = np.fromfile(raw, np.uint8, end - begin).view(_ML_DTYPES[kind]).reshape(header[name]["shape"])
            elif kind in _NUMPY_DTYPES:
                tensor = file.get_tensor(name)
            else:
                raise _unknown_dtype(name, path, kind)
            yield name, tensor


def _check_dtypes(path: Path) -> None:
    """Raise if safetensors refused a file because this version does not know the dtype of one of its tensors."""
    header: dict[str, Any] = {}
    with suppress(OSError, ValueError, struct.error, RecursionError), open(path, "rb") as raw:
        header, _ = _read_header(raw)
    for name, fields in header.items() if isinstance(header, dict) else ():
        kind = fields.get("dtype") if isinstance(fields, dict) and name != "__metadata__" else None
        if isinstance(kind, str) and kind not in _ML_DTYPES and kind not in _NUMPY_DTYPES:
            raise _unknown_dtype(name, path, kind)


def _unknown_dtype(name: str, path: Path, kind: str) -> TensorFileError:
    return TensorFileError(f"tensor {name!r} of {path} has the dtype {kind}, which the format has no name for")


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header of a .safetensors file, and the offset at which the bytes of its tensors begin.

    Source: https://github.com/huggingface/safetensors#format
    """
    (length,) = struct.unpack("<Q", file.read(8))
    return json.loads(file.read(min(length, _MAX_HEADER))), 8 + length
