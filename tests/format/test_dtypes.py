"""Names of dtypes, and their NumPy counterparts."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ndcache.format import dtypes
from ndcache.format.dtypes import ALIASES, canonical_name
from ndcache.format.numpy_dtypes import DTYPES, dtype_name

ITEM_SIZES = {
    "bool": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}


def test_every_dtype_of_the_format() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_SIZES == dtypes.ITEM_SIZES


@pytest.mark.parametrize("name", DTYPES)
def test_names_round_trip(name: str) -> None:
    assert dtype_name(DTYPES[name]) == name
    assert canonical_name(name) == name
    assert DTYPES[name].type(1) == 1


@pytest.mark.parametrize("name", [name for name, size in ITEM_SIZES.items() if size > 1])
def test_stored_little_endian(name: str) -> None:
    dtype = DTYPES[name]
    expected = {"float16": "003c", "float32": "0000803f", "float64": "000000000000f03f", "bfloat16": "803f"}
    assert np.ones((), dtype).tobytes().hex() == expected.get(name, "01" + "00" * (dtype.itemsize - 1))


@pytest.mark.parametrize(("alias", "name"), [("e4m3_float8", "float8_e4m3fn"), ("e5m2_float8", "float8_e5m2")])
def test_aliases(alias: str, name: str) -> None:
    assert canonical_name(alias) == ALIASES[alias] == name
    assert alias not in DTYPES


@pytest.mark.parametrize("name", ["", "Float32", "float32 ", "int4", "e4m3", "float", "<f4", "\ud800"])
def test_unknown_names_are_returned_as_they_are(name: str) -> None:
    assert canonical_name(name) == name
    assert name not in DTYPES


#: Dtypes that the format has no name for. The oldest ml_dtypes lacks some of them.
UNKNOWN_DTYPES = ("float8_e4m3", "float8_e4m3fnuz", "int4", "uint4")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (">f4", "float32"),
        ("=f4", "float32"),
        (">u8", "uint64"),
        (">i2", "int16"),
        ("longlong", "int64"),
        ("?", "bool"),
        (np.bool_, "bool"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (ml_dtypes.float8_e5m2, "float8_e5m2"),
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn"),
        # dtypes that the format has no name for
        *((getattr(ml_dtypes, name), None) for name in UNKNOWN_DTYPES if hasattr(ml_dtypes, name)),
        ("c8", None),
        ("O", None),
        ("S4", None),
        ("U4", None),
        ("V4", None),
        ("M8[s]", None),
        ("m8[s]", None),
        ([("a", "f4")], None),
        ((np.float32, (2,)), None),
    ],
)
def test_names_of_numpy_dtypes(dtype: Any, name: str | None) -> None:
    assert dtype_name(np.dtype(dtype)) == name
