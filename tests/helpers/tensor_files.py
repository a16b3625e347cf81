"""Write safetensors files by hand, also ones that the library would not write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["file_bytes", "header_of", "tensor", "write_files", "write_index"]


#: The format's names of dtypes.
_KINDS = {"float32": "F32", "int32": "I32"}


def tensor(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    """Return the JSON of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a file with this header, as JSON or in bytes, and this text in front of it as its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def write_index(folder: Path, files: Mapping[str, Mapping[str, np.ndarray[Any, Any]]]) -> Path:
    """Write files of uint8 tensors and their index; return its path."""
    folder.mkdir(exist_ok=True)
    for file, arrays in files.items():
        header, data = {}, b""
        for name, array in arrays.items():
            header[name] = tensor("U8", list(array.shape), len(data), len(data) + array.nbytes)
            data += array.tobytes()
        (folder / file).write_bytes(file_bytes(header, data))
    weight_map = {name: file for file, arrays in files.items() for name in arrays}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def header_of(arrays: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the header of a file with these arrays, one behind the other."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, array in arrays.items():
        end = position + array.nbytes
        header[name] = tensor(_KINDS[array.dtype.name], list(array.shape), position, end)
        position = end
    return header


def write_files(
    directory: Path, arrays: Mapping[str, np.ndarray[Any, Any]], files: int, name: str = "model"
) -> dict[str, Path]:
    """Write a model as one file, or as several with an index, and return the paths of the files by their names."""
    directory.mkdir(parents=True, exist_ok=True)
    names = (
        [f"{name}.safetensors"]
        if files == 1
        else [f"{name}-{n + 1:05}-of-{files:05}.safetensors" for n in range(files)]
    )
    weight_map, paths = dict[str, str](), dict[str, Path]()
    for number, file in enumerate(names):
        keys = [key for index, key in enumerate(arrays) if index * files // len(arrays) == number]
        part = {key: arrays[key] for key in keys}
        data = b"".join(array.tobytes() for array in part.values())
        paths[file] = directory / file
        paths[file].write_bytes(file_bytes(header_of(part, {"format": "pt"}), data))
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": weight_map}
        (directory / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    return paths
