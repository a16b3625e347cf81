"""Manifests whose sizes, offsets and shapes contradict each other are refused."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from ndcache.errors import ManifestLayoutError

from ..helpers.manifests import byte_record, check_refused, document, parse, record, shard

BIG = 1 << 62

BAD_LAYOUT: dict[str, dict[str, Any]] = {
    "a negative offset": record(byteOffset=-1),
    "a negative size": record(nbytes=-1, shape=[0]),
    "a negative size, as the shape gives": record(nbytes=-4, shape=[-1]),
    "a negative shape": record(shape=[-2, -3]),
    "beyond the shard": record(byteOffset=41),
    "far beyond the shard": record(byteOffset=1 << 63),
    "an offset of 400 digits": record(byteOffset=10**399),
    "a size of 400 digits": record(nbytes=10**399),
    "a shape of 400 digits": record(shape=[10**399]),
    "larger than the shard": record(shape=[17], nbytes=68),
    "empty, beyond the shard": record(shape=[0], nbytes=0, byteOffset=65),
    "a byte short": record(nbytes=23),
    "a byte long": record(nbytes=25),
    "a scalar of 8 bytes": record(shape=[], nbytes=8),
    "an empty tensor with bytes": record(shape=[0, 3], nbytes=4),
    "a full tensor without": record(nbytes=0),
    "the bytes of the other form": record(format="f32-to-bf16"),
    "raw, with the bytes of bfloat16": record(nbytes=12),
    "an odd bf16 length": record(shape=[3], format="f32-to-bf16", nbytes=5),
    "an odd bf16 length of none": record(shape=[0], format="f32-to-bf16", nbytes=1),
    "an odd bfloat16 length": record(shape=[3], dtype="bfloat16", nbytes=5),
    "marked uint32 with half its bytes": record(dtype="uint32", format="f32-to-bf16", nbytes=12),
    "marked float16 with a quarter": record(dtype="float16", format="f32-to-bf16", nbytes=6),
    "an alias with wrong bytes": record(dtype="e4m3_float8", nbytes=24),
    "a product of 2**64": record(shape=[1 << 32, 1 << 32], dtype="int8", nbytes=0),
    "a product of 2**64 + 6": record(shape=[2, (1 << 63) + 3]),
    "a size of 2**63": record(shape=[1 << 63], nbytes=0),
    "empty, with a side of 2**62": record(shape=[0, BIG], nbytes=0),
    "empty, with sides whose product overflows": record(shape=[1 << 40, 0, 1 << 40], nbytes=0),
    "33 dimensions": record(shape=[1] * 33, nbytes=4),
    "a million dimensions": record(shape=[1] * 1_000_000, nbytes=4),
}


@pytest.mark.parametrize("item", BAD_LAYOUT.values(), ids=BAD_LAYOUT)
def test_row_23_sizes_offsets_and_shapes_that_contradict_each_other_are_refused(item: dict[str, Any]) -> None:
    check_refused(document(shard(item)), ManifestLayoutError)


@pytest.mark.parametrize(
    "places",
    [
        [(0, 8), (0, 8)],
        [(0, 8), (7, 1)],
        [(7, 1), (0, 8)],
        [(0, 64), (32, 1)],
        [(0, 8), (16, 8), (15, 2)],
        [(0, 8), (4, 0), (7, 8)],
    ],
)
def test_row_23_overlapping_tensors_are_refused(places: list[tuple[int, int]]) -> None:
    records = [byte_record(str(index), *place) for index, place in enumerate(places)]
    error = check_refused(document(shard(*records)), ManifestLayoutError)
    assert "overlap" in str(error)


@pytest.mark.parametrize(
    "places",
    [
        [(0, 8), (8, 8)],
        [(8, 8), (0, 8)],
        [(0, 8), (4, 0), (8, 0), (8, 8)],
        [(0, 0), (0, 0), (0, 64)],
        [(64, 0), (0, 64)],
        [(1, 3), (11, 5)],
    ],
)
def test_tensors_that_only_touch_are_read(places: list[tuple[int, int]]) -> None:
    records = [byte_record(str(index), *place) for index, place in enumerate(places)]
    found = parse(document(shard(*records))).records
    assert [(item.byte_offset, item.nbytes) for item in found] == places


def test_row_23_overlapping_tensors_of_unknown_dtypes_are_refused() -> None:
    records = [byte_record("a", 0, 8), byte_record("b", 4, 8) | {"dtype": "int4"}]
    check_refused(document(shard(*records)), ManifestLayoutError)


@pytest.mark.parametrize("nbytes", [-1, 1 << 63, 10**399])
def test_row_23_an_impossible_shard_size_is_refused(nbytes: int) -> None:
    check_refused(document(shard(nbytes=nbytes)), ManifestLayoutError)


def test_row_23_shards_of_more_than_2_to_the_63_bytes_are_refused() -> None:
    one = (1 << 63) - 1
    assert parse(document(shard(nbytes=one))).nbytes == one
    check_refused(document(shard(nbytes=one), shard(nbytes=1, dataPath="b")), ManifestLayoutError)


def test_row_23_nothing_is_allocated_for_a_huge_shape() -> None:
    # One exbibyte, and consistent: nothing of that size may be allocated while parsing.
    size = 1 << 58
    tracemalloc.start()
    try:
        manifest = parse(document(shard(record(shape=[size], nbytes=4 * size), nbytes=4 * size)))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert manifest.nbytes == 4 * size


def test_row_23_a_tensor_of_too_many_elements_is_refused() -> None:
    item = record(dtype="uint8", shape=[1 << 61], nbytes=1 << 61)
    check_refused(document(shard(item, nbytes=1 << 62)), ManifestLayoutError)
