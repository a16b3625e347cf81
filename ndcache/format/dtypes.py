"""Names of dtypes in manifests, without NumPy, which processes that only download do not need."""

from __future__ import annotations

__all__ = ["ALIASES", "ITEM_SIZES", "TENSOR_SIZES", "canonical_name"]

#: Manifest name → bytes of an element as stored.
ITEM_SIZES: dict[str, int] = {
    "bool": 1,
    **{"int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8},
    **{"float16": 2, "float32": 4, "float64": 8, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1},
}

#: The same for all tensors: safetensors files have some dtypes for which NDArray caches have no name.
TENSOR_SIZES: dict[str, int] = {
    **ITEM_SIZES,
    **{"complex64": 8, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1},
}

#: Other spellings in published models.
ALIASES: dict[str, str] = {
    "e4m3_float8": "float8_e4m3fn",
    "e5m2_float8": "float8_e5m2",
}


def canonical_name(name: str) -> str:
    """Return the usual name of a dtype; an unknown name is returned as it is."""
    return ALIASES.get(name, name)
