"""Names of dtypes in manifests, and their NumPy counterparts."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["ALIASES", "DTYPES", "canonical_name", "dtype_name"]

#: Manifest name → NumPy dtype, little-endian as stored.
DTYPES: dict[str, np.dtype[Any]] = {
    "bool": np.dtype(np.bool_),
    **{
        name: np.dtype(name).newbyteorder("<")
        for name in (
            *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
            *("float16", "float32", "float64"),
        )
    },
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}

#: Other spellings in published models.
ALIASES: dict[str, str] = {
    "e4m3_float8": "float8_e4m3fn",
    "e5m2_float8": "float8_e5m2",
}


def canonical_name(name: str) -> str:
    """Return the usual name of a dtype; an unknown name is returned as it is."""
    return ALIASES.get(name, name)


def dtype_name(dtype: np.dtype[Any]) -> str | None:
    """Return the manifest's name of a NumPy dtype of any byte order, or None if the format has none."""
    name = "bool" if dtype.kind == "b" else dtype.name
    return name if name in DTYPES else None
