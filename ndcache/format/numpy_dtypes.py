"""The NumPy dtypes of the names in manifests."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import UnsupportedDtypeError
from .dtypes import ITEM_SIZES, TENSOR_SIZES

__all__ = ["DTYPES", "TENSOR_DTYPES", "dtype_name"]


class _Dtypes(dict[str, "np.dtype[Any]"]):
    def __missing__(self, name: str) -> np.dtype[Any]:
        raise UnsupportedDtypeError(
            f"the installed ml_dtypes does not have {name}",
            hint="A newer version may: pip install --upgrade ml_dtypes.",
        )


def _dtypes(names: Iterable[str]) -> _Dtypes:
    return _Dtypes(
        (name, np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name).newbyteorder("<"))
        for name in names
        if hasattr(ml_dtypes, name) or not name.startswith("float8_")
    )


#: Manifest name → NumPy dtype, little-endian as stored.
DTYPES: Mapping[str, np.dtype[Any]] = _dtypes(ITEM_SIZES)
#: The same for all tensors. Early versions of ml_dtypes lack some of them.
TENSOR_DTYPES: Mapping[str, np.dtype[Any]] = _dtypes(TENSOR_SIZES)


def dtype_name(dtype: np.dtype[Any], known: Collection[str] = DTYPES) -> str | None:
    """Return the manifest's name of a NumPy dtype of any byte order, or None if it is none of the known ones."""
    name = "bool" if dtype.kind == "b" else dtype.name
    return name if name in known else None
