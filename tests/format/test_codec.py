"""Records as arrays, and float32 as the bfloat16 that the format stores."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from ndcache.errors import DecodeError, UnsupportedDtypeError
from ndcache.format.codec import decode_record, encode_bf16, view_record
from ndcache.format.manifest import Record
from ndcache.format.numpy_dtypes import DTYPES

from ..helpers.models import random_array

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 1, 5), (0,), (4, 0, 3), (1,) * 32, (1025,)]


def in_shard(data: bytes, offset: int, after: int = 3) -> npt.NDArray[np.uint8]:
    """Return a read-only shard at a multiple of 8, with `data` at `offset` and other bytes around it."""
    whole = b"\xa5" * offset + data + b"\x5a" * after
    aligned = np.empty(len(whole) // 8 + 1, np.uint64).view(np.uint8)[: len(whole)]
    aligned[:] = np.frombuffer(whole, np.uint8)
    aligned.flags.writeable = False
    return aligned


def record_of(array: npt.NDArray[Any], offset: int, form: str = "raw", dtype: str | None = None) -> Record:
    return Record("w", array.shape, dtype or array.dtype.name, form, offset, array.nbytes)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 5, 7, 8, 13])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_is_a_view(dtype: str, shape: tuple[int, ...], offset: int) -> None:
    array = random_array(shape, dtype)
    shard = in_shard(array.tobytes(), offset)
    for function in (view_record, decode_record):
        found = function(record_of(array, offset), shard)
        assert (found.shape, found.dtype) == (shape, array.dtype)
        assert found.tobytes() == array.tobytes()
        assert not found.flags.writeable
        assert not found.flags.owndata
        if found.size:
            assert found.__array_interface__["data"][0] == shard.__array_interface__["data"][0] + offset
        with pytest.raises(ValueError, match="read-only"):
            found[...] = 0


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_is_expanded(shape: tuple[int, ...], offset: int) -> None:
    values = random_array(shape, "bfloat16")
    shard = in_shard(values.tobytes(), offset)
    record = record_of(values, offset, "f32-to-bf16", "float32")
    found = decode_record(record, shard)
    assert (found.shape, found.dtype) == (shape, np.dtype(np.float32))
    assert found.tobytes() == values.astype(np.float32).tobytes()
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert not np.shares_memory(found, shard)
    assert view_record(record, shard).dtype == ml_dtypes.bfloat16
    assert view_record(record, shard).tobytes() == values.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="NumPy asks for huge pages only on Linux")
def test_large_tensors_begin_with_a_huge_page() -> None:
    values = random_array((2, (1 << 19) + 1), "bfloat16")
    record = Record("w", values.shape, "float32", "f32-to-bf16", 3, values.nbytes)
    one, other = (decode_record(record, in_shard(values.tobytes(), 3)) for _ in range(2))
    for array in (one, other):
        assert array.ctypes.data % (2 << 20) == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.tobytes() == values.astype(np.float32).tobytes()
    assert not np.shares_memory(one, other)


@pytest.mark.parametrize("offset", [0, 1])
def test_bf16_is_expanded_to_the_bit(offset: int) -> None:
    # All bit patterns: NaN with all payloads, infinities, denormals, both zeros.
    bits = np.arange(1 << 16, dtype=np.uint16)
    record = Record("w", (1 << 16,), "float32", "f32-to-bf16", offset, 1 << 17)
    found = decode_record(record, in_shard(bits.tobytes(), offset))
    np.testing.assert_array_equal(found.view(np.uint32), bits.astype(np.uint32) << 16)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "float32"])
def test_records_marked_bf16_that_are_not_float32_are_views(dtype: str) -> None:
    array = random_array((5,), dtype)
    found = decode_record(record_of(array, 1, "f32-to-bf16"), in_shard(array.tobytes(), 1))
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


def test_writable_shard_gives_writable_view() -> None:
    shard = np.zeros(8, np.uint8)
    found = view_record(Record("w", (2,), "float32", "raw", 0, 8), shard)
    found[:] = 1
    assert shard.tobytes() == np.ones(2, "<f4").tobytes()


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 12), (5, 4), (9, 0)])
@pytest.mark.parametrize("form", ["raw", "f32-to-bf16"])
def test_a_shard_that_is_too_short_is_refused(offset: int, nbytes: int, form: str) -> None:
    record = Record("the.name", (nbytes // 4,), "float32", form, offset, nbytes)
    with pytest.raises(DecodeError, match=r"the\.name"):
        decode_record(record, np.zeros(8, np.uint8))


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UnsupportedDtypeError, match="int4"):
        view_record(Record("w", (2,), "int4", "raw", 0, 1), np.zeros(8, np.uint8))


# --- encoding -----------------------------------------------------------------------------------------


def reference_bf16(bits: int) -> int:
    """Convert the bits of a float32 to those of a bfloat16 with integers only."""
    sign, magnitude = bits & 0x8000_0000, bits & 0x7FFF_FFFF
    if magnitude > 0x7F80_0000:  # NaN stays NaN, even if nothing of its payload is left
        upper = magnitude >> 16
        return sign >> 16 | (upper if upper & 0x7F else upper | 0x40)
    if magnitude >= 0x7F7F_0000:  # the largest finite bfloat16 and beyond: cut off
        return sign >> 16 | magnitude >> 16
    upper, lower = divmod(magnitude, 1 << 16)
    if lower > 0x8000 or (lower == 0x8000 and upper & 1):
        upper += 1
    return sign >> 16 | upper


def interesting_bits() -> npt.NDArray[np.uint32]:
    """Return floats of every sign and exponent, with mantissas around all special values."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xBFFF, 0xFFFE, 0xFFFF], np.uint32)
    return np.asarray((upper[:, None] | lower[None, :]).ravel(), np.uint32)


def test_encode_to_the_bit() -> None:
    bits = interesting_bits()
    expected = np.array([reference_bf16(value) for value in bits.tolist()], np.uint16)
    found = encode_bf16(bits.view(np.float32))
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.view(np.uint16), expected)


def test_reference_agrees_with_arithmetic() -> None:
    # The nearer one of the two neighbours, for values without a special rule.
    for value in (1.0, 1.00390625, 1.01171875, -3.1415927, 1e-40, 6.5e-5, 1e38):
        bits = int(np.float32(value).view(np.uint32))
        found = float(np.uint32(reference_bf16(bits) << 16).view(np.float32))
        for other in (bits >> 16, (bits >> 16) + 1):
            neighbour = float(np.uint32(other << 16).view(np.float32))
            assert abs(found - float(np.float32(value))) <= abs(neighbour - float(np.float32(value)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("inf"), 0x7F80),
        (float("-inf"), 0xFF80),
        (3.4028235e38, 0x7F7F),
        (-3.4028235e38, 0xFF7F),
        (-0.0, 0x8000),
        (0.0, 0),
        (1.0, 0x3F80),
    ],
)
def test_encode_special_values(value: float, expected: int) -> None:
    arrays: list[npt.NDArray[np.float32]] = [
        np.array(value, np.float32),
        np.full((2, 3), value, np.float32),
        np.array([value], ">f4"),
    ]
    for array in arrays:
        found = encode_bf16(array)
        assert found.shape == array.shape
        assert set(found.reshape(-1).view(np.uint16).tolist()) == {expected}


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_encode_keeps_shapes_and_its_input(shape: tuple[int, ...]) -> None:
    array = np.full(shape, np.nan, np.float32)
    before = array.tobytes()
    array.flags.writeable = False
    assert encode_bf16(array).shape == shape
    assert array.tobytes() == before


def test_encode_arrays_that_are_not_contiguous() -> None:
    values = interesting_bits()[-24_000:].view(np.float32).reshape(120, 200)
    for view in (values.T, values[::-1, ::3], values[:, 5], values[:1].T):
        assert encode_bf16(view).tobytes() == encode_bf16(np.ascontiguousarray(view)).tobytes()


def test_encoding_and_decoding_round_trips() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    record = Record("w", (1 << 16,), "float32", "f32-to-bf16", 0, 1 << 17)
    found = encode_bf16(decode_record(record, bits.view(np.uint8)))
    np.testing.assert_array_equal(found.view(np.uint16), bits)
