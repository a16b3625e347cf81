"""The tensors of .safetensors and .npz files, one after another, for ``ndcache dump``."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_tensors"]


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
            raise ValueError(f"{path} is not a .safetensors file, or damaged: {error}") from error
        for name in file.keys():  # noqa: SIM118 - not a mapping
            try:
                tensor = file.get_tensor(name)
            except (AttributeError, TypeError) as error:
                dtype = file.get_slice(name).get_dtype()
                raise ValueError(f"tensor {name!r} of {path} is of the kind {dtype}, which NumPy lacks") from error
            yield name, tensor
