"""Memory of the caller's: what fits a tensor, and what overlaps."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ndcache
from ndcache.devices.cpu import CpuDevice
from ndcache.devices.into import Destination, LentMemory, find_destinations
from ndcache.format.manifest import Record, Shard

from ..helpers import models


def record(name: str = "t", shape: tuple[int, ...] = (4, 3), dtype: str = "float32", encoding: str = "raw") -> Record:
    return Record(name, shape, dtype, encoding, 0, 0)


def shard(*records: Record) -> Shard:
    return Shard("params_shard_0.bin", 0, None, None, "raw-shard", records)


def check(into: Any, *records: Record, decode: bool = True) -> dict[str, Destination]:
    return CpuDevice().check_into(into, [shard(*(records or [record()]))], decode=decode)


# --- what fits


@pytest.mark.parametrize("shape", [(), (1,), (4, 3), (0, 3), (2, 1, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bool", "uint8", "float16", "bfloat16", "float8_e5m2", "int64"])
def test_contiguous_arrays_of_the_same_shape_and_dtype_fit(shape: tuple[int, ...], dtype: str) -> None:
    array = models.random_array(shape, dtype).copy()
    found = check({"t": array}, record(shape=shape, dtype=dtype))["t"]
    assert found.owner is array
    assert (found.start, found.nbytes) == (array.ctypes.data, array.nbytes)
    assert array.size == 0 or np.shares_memory(found.memory, array)


def test_views_memory_maps_and_unaligned_arrays_fit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(48))
    good = [
        np.zeros((9, 3), np.float32)[2:6],
        np.memmap(tmp_path / "file", np.float32, "r+", shape=(4, 3)),
        np.frombuffer(bytearray(49), np.float32, 12, offset=1).reshape(4, 3),
    ]
    for array in good:
        assert check({"t": array})["t"].owner is array


def read_only() -> Any:
    array = np.zeros((4, 3), np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (np.zeros((3, 4), np.float32), r"into\['t'\] has the shape \(3, 4\), but the tensor has \(4, 3\)"),
        (np.zeros(12, np.float32), "shape"),
        (np.zeros((4, 3), np.float64), r"into\['t'\] has the dtype float64, but the tensor has float32$"),
        (np.zeros((4, 3), ">f4"), "has the dtype >f4"),
        (np.zeros((4, 3), object), "dtype object"),
        (np.zeros((3, 4), np.float32).T, "not contiguous"),
        (np.zeros((4, 6), np.float32)[:, ::2], "not contiguous"),
        (np.broadcast_to(np.zeros(3, np.float32), (4, 3)), "read-only|not contiguous"),
        (read_only(), r"into\['t'\] is read-only"),
        (np.frombuffer(bytes(48), np.float32).reshape(4, 3), "read-only"),
        (SimpleNamespace(__dlpack__=None), "is a SimpleNamespace, but this device loads into NumPy arrays"),
        (SimpleNamespace(map_state="unmapped"), "but this device loads into NumPy arrays"),
        ((SimpleNamespace(map_state="unmapped"), 4), "is a tuple, but this device loads into NumPy arrays"),
    ],
)
def test_other_memory_is_a_value_error(memory: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check({"t": memory})


@pytest.mark.parametrize("memory", [None, 3, "t", [0.0] * 12, bytearray(48), (np.zeros((4, 3), np.float32), 0), ()])
def test_what_is_no_memory_is_a_type_error(memory: Any) -> None:
    with pytest.raises(TypeError, match=rf"into\['t'\] is a {type(memory).__name__}"):
        check({"t": memory})


def test_the_dtype_is_that_after_decoding() -> None:
    encoded = record(encoding="f32-to-bf16")
    full, half = np.zeros((4, 3), np.float32), np.zeros((4, 3), ml_dtypes.bfloat16)
    check({"t": full}, encoded)
    check({"t": half}, encoded, decode=False)
    with pytest.raises(ValueError, match=r"has the dtype bfloat16, but the tensor has float32 \(with decode=False: bf"):
        check({"t": half}, encoded)
    with pytest.raises(ValueError, match=r"the dtype float32, but the tensor has bfloat16 \(with decode=True: float32"):
        check({"t": full}, encoded, decode=False)


def test_names_must_be_loaded() -> None:
    with pytest.raises(
        ValueError, match=r"into\['layer.o'\] is for a tensor that is not loaded; did you mean 'layer.0'"
    ):
        check({"layer.o": np.zeros((4, 3), np.float32)}, record("layer.0"))
    with pytest.raises(ValueError, match=r"into\['zzz'\] is for a tensor that is not loaded$"):
        check({"zzz": np.zeros((4, 3), np.float32)}, record("layer.0"))
    with pytest.raises(TypeError, match="names of into must be strings, not 3"):
        check({3: np.zeros((4, 3), np.float32)})


# --- overlaps


def test_views_of_one_array_may_not_overlap() -> None:
    base = np.zeros((8, 3), np.float32)
    two = record("a"), record("b")
    check({"a": base[:4], "b": base[4:]}, *two)
    with pytest.raises(ValueError, match=r"into\['a'\] and into\['b'\] overlap"):
        check({"a": base[:4], "b": base[3:7]}, *two)
    with pytest.raises(ValueError, match="overlap"):
        check({"a": base[:4], "b": base[:4]}, *two)
    as_bytes = base.reshape(-1).view(np.uint8)
    with pytest.raises(ValueError, match=r"into\['a'\] and into\['b'\] overlap"):
        check({"a": base[:4], "b": as_bytes[47:50]}, record("a"), record("b", (3,), "uint8"))


def test_empty_tensors_overlap_nothing() -> None:
    base = np.zeros((8, 3), np.float32)
    check({"a": base[:4], "b": base[2:2]}, record("a"), record("b", (0, 3)))


ranges = st.lists(st.tuples(st.sampled_from("xy"), st.integers(0, 40), st.integers(0, 9)), max_size=12)


@given(ranges)
def test_any_overlap_is_found(ranges: list[tuple[str, int, int]]) -> None:
    found = {f"t{index}": Destination(None, None, *each) for index, each in enumerate(ranges)}
    claimed = [{(space, byte) for byte in range(start, start + nbytes)} for space, start, nbytes in ranges]
    overlap = any(one & other for one, other in itertools.combinations(claimed, 2))
    shards = [shard(*map(record, found))]
    try:
        assert find_destinations(dict.fromkeys(found), shards, lambda each, _: found[each.name]) == found
        assert not overlap
    except ValueError as error:
        assert overlap
        first, second = (int(text.split("'")[1][1:]) for text in str(error).split(" and "))
        assert claimed[first] & claimed[second]


# --- what a failure leaves undefined


def generate(names: str, error: BaseException | None = None) -> Any:
    yield from ((name, None) for name in names)
    if error is not None:
        raise error


@pytest.mark.parametrize(
    ("error", "late", "undefined"),
    [
        (ndcache.ChecksumError("x"), False, ("d", "c")),
        (KeyboardInterrupt(), False, ("d", "c")),
        (MemoryError(), False, ("d", "c")),
        (ndcache.ChecksumError("x"), True, ("d", "a", "c", "b")),
        (ndcache.OutOfDeviceMemoryError("x"), False, ("d", "a", "c", "b")),
    ],
    ids=repr,
)
def test_a_failure_names_what_is_undefined(error: BaseException, late: bool, undefined: tuple[str, ...]) -> None:
    with pytest.raises(type(error)) as caught, LentMemory(dict.fromkeys("dacb")) as lent:
        for _ in lent.tracked(generate("axby", error), completes_late=late):
            pass
    assert getattr(caught.value, "undefined", None) == undefined


def test_after_the_last_tensor_nothing_is_undefined() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, LentMemory(dict.fromkeys("ab")) as lent:
        assert [name for name, _ in lent.tracked(generate("axb"), completes_late=True)] == ["a", "x", "b"]
        raise KeyboardInterrupt
    assert getattr(caught.value, "undefined", None) == ()


def test_errors_that_take_no_attributes_stay_as_they_are() -> None:
    class Sealed(Exception):
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    with pytest.raises(Sealed), LentMemory(dict.fromkeys("ab")):
        raise Sealed


def test_into_is_a_mapping() -> None:
    with pytest.raises(TypeError, match="into must be a mapping from tensor names to memory, not list"):
        LentMemory([np.zeros(3)])  # type: ignore[arg-type]
