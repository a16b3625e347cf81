"""Read .npz files, one array after another, for ``ndcache dump``."""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NpzError", "read_npz"]

#: Errors that NumPy and zipfile raise for damaged files.
_DAMAGE = (ValueError, EOFError, zipfile.BadZipFile, zlib.error)


class NpzError(ValueError):
    """A file has another format, is damaged, or has an array of Python objects."""


def read_npz(path: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the name and array of each array of a file.

    Raises
    ------
    NpzError, OSError
    """
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise NpzError(f"{path} is not an .npz file, or is damaged")
        try:
            arrays = np.load(file, allow_pickle=False)
        except _DAMAGE as error:
            raise NpzError(f"{path} is not an .npz file, or is damaged: {error}") from error
        with arrays:
            if twice := [name for name, number in Counter(arrays.files).items() if number > 1]:
                raise NpzError(f"{path} has more than one array {twice[0]!r}")
            for name in arrays.files:
                try:
                    array = arrays[name]
                except _DAMAGE as error:
                    raise NpzError(f"array {name!r} of {path} cannot be read: {error}") from error
                yield name, array
