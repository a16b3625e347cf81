"""Slices of tensors: the records of their rows, with Python's meaning of every end."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from ndcache.errors import UnsupportedDtypeError
from ndcache.format.manifest import Manifest
from ndcache.format.slices import check_slices

from ..helpers.manifests import byte_record, document, parse, record, shard

ENDS = (None, -9, -7, -6, -1, 0, 1, 3, 6, 7, 10**20, np.int32(4))


def one(shape: list[int], dtype: str = "uint16", **fields: Any) -> Manifest:
    return parse(document(shard(record("w", shape=shape, dtype=dtype, **fields), nbytes=100)))


@pytest.mark.parametrize("shape", [[7], [7, 3], [7, 3, 2], [7, 0], [0, 3], [1, 5]])
def test_every_slice_has_the_bytes_that_numpy_gives(shape: list[int]) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    manifest = one(shape, byteOffset=10, nbytes=array.nbytes)
    file = bytes(10) + array.tobytes()
    for start in ENDS:
        for stop in ENDS:
            (found,) = manifest.select({"w": slice(start, stop)})
            (part,) = found.records
            assert part.shape == array[start:stop].shape
            assert file[part.byte_offset : part.byte_offset + part.nbytes] == array[start:stop].tobytes()
            assert found.nbytes == manifest.shards[0].nbytes
    assert manifest.select({"w": slice(None)}) == manifest.shards


def test_rows_of_float32_stored_as_bfloat16() -> None:
    manifest = one([4, 3], "float32", format="f32-to-bf16", nbytes=24)
    ((part,),) = (found.records for found in manifest.select({"w": slice(1, 3, 1)}))
    assert (part.byte_offset, part.nbytes, part.shape, part.is_bf16_encoded) == (6, 12, (2, 3), True)


def test_only_the_named_tensors_are_selected() -> None:
    records = [byte_record(name, 4 * place, 4) for place, name in enumerate("abc")]
    manifest = parse(document(shard(*records), shard(byte_record("d*", 0, 4)) | {"dataPath": "two"}))
    (first, second) = manifest.select({"d*": slice(2), "b": slice(None)})
    assert first.records == (manifest["b"],)
    assert [(part.name, part.shape) for part in second.records] == [("d*", (2,))]
    assert manifest.select({}) == manifest.shards_with({}) == ()
    with pytest.raises(KeyError, match=r"no tensor of tensor-cache\.json is called 'd'; did you mean 'd\*'"):
        manifest.select({"d": slice(None)})
    with pytest.raises(KeyError, match=r"is called '\[ab\]'"):
        manifest.select({"[ab]": slice(None)})
    assert pickle.loads(pickle.dumps(second)) == second


@pytest.mark.parametrize("rows", [slice(None), slice(0, 1), slice(0, 0)])
def test_a_scalar_has_no_rows(rows: slice) -> None:
    with pytest.raises(ValueError, match=r"'w'.* scalar"):
        one([], nbytes=2).select({"w": rows})


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        ({"w": slice(0, 4, 2)}, ValueError, r"slice\(0, 4, 2\), but the step must be 1"),
        ({"w": slice(None, None, -1)}, ValueError, "step must be 1"),
        ({"w": slice(0, 4, 0)}, ValueError, "step must be 1"),
        ({"w": slice(0, 4, "1")}, TypeError, "integers or None"),
        ({"w": slice(0.0, 4)}, TypeError, "integers or None"),
        ({"w": slice("a")}, TypeError, "integers or None"),
        ({"w": 5}, TypeError, r"must be a slice, .* not 5; slice\(5, 6\) is one row"),
        ({"w": (0, 5)}, TypeError, r"must be a slice, .* not \(0, 5\)$"),
        ({"w": (slice(0, 5), slice(0, 5))}, TypeError, "must be a slice"),
        ({"w": None}, TypeError, "must be a slice"),
        ({3: slice(0, 5)}, TypeError, "keys of names must be names of tensors, not 3"),
    ],
)
def test_other_values_are_refused(names: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        check_slices(names)
    with pytest.raises(error, match=text):
        one([7], nbytes=14).select(names)


def test_a_slice_needs_a_known_dtype() -> None:
    manifest = one([7], "float4_e2m1", nbytes=4)
    for select in (manifest.select, manifest.shards_with):
        with pytest.raises(UnsupportedDtypeError, match="float4_e2m1"):
            select({"w": slice(0, 2)})
