"""The NumPy dtypes of the names in manifests."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from .dtypes import ITEM_SIZES

__all__ = ["DTYPES", "dtype_name"]

#: Manifest name → NumPy dtype, little-endian as stored.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name).newbyteorder("<")
    for name in ITEM_SIZES
}


def dtype_name(dtype: np.dtype[Any]) -> str | None:
    """Return the manifest's name of a NumPy dtype of any byte order, or None if the format has none."""
    name = "bool" if dtype.kind == "b" else dtype.name
    return name if name in DTYPES else None
