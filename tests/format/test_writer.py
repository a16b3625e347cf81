"""Models that `ndcache.dump` writes, read back by hand."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import pytest

import ndcache
from ndcache.format.numpy_dtypes import DTYPES

from ..helpers.models import random_array, write_model

Array: TypeAlias = "np.ndarray[Any, Any]"


def read_back(directory: Path, name: str = "tensor-cache.json") -> dict[str, Array]:
    """Return all tensors as they are stored, after checking all sizes and digests."""
    tensors: dict[str, Array] = {}
    for shard in json.loads((directory / name).read_bytes())["records"]:
        data = (directory / shard["dataPath"]).read_bytes()
        assert shard["nbytes"] == len(data)
        assert shard["md5sum"] == hashlib.md5(data).hexdigest()
        for record in shard["records"]:
            is_bf16 = record["format"] == "f32-to-bf16" and record["dtype"] == "float32"
            dtype = DTYPES["bfloat16" if is_bf16 else record["dtype"]]
            piece = data[record["byteOffset"] : record["byteOffset"] + record["nbytes"]]
            assert len(piece) == record["nbytes"]
            tensors[record["name"]] = np.frombuffer(piece, dtype).reshape(record["shape"])
    return tensors


def layout(directory: Path) -> list[list[str]]:
    """Return the names of the tensors by shard."""
    shards = json.loads((directory / "tensor-cache.json").read_bytes())["records"]
    return [[record["name"] for record in shard["records"]] for shard in shards]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def byte_tensors(*sizes: int) -> dict[str, Array]:
    return {f"t{index}": np.full(size, index, np.uint8) for index, size in enumerate(sizes)}


# --- the files ----------------------------------------------------------------------------------------


def test_text_of_the_manifest(tmp_path: Path) -> None:
    ndcache.dump({"w": np.ones((1, 2), np.float32)}, tmp_path, metadata={"name": "größe"})
    digest = hashlib.md5(b"\x80\x3f\x80\x3f").hexdigest()
    text = """{
    "metadata": {
        "name": "gr\\u00f6\\u00dfe"
    },
    "records": [
        {
            "dataPath": "params_shard_0.bin",
            "format": "raw-shard",
            "nbytes": 4,
            "records": [
                {
                    "name": "w",
                    "shape": [
                        1,
                        2
                    ],
                    "dtype": "float32",
                    "format": "f32-to-bf16",
                    "nbytes": 4,
                    "byteOffset": 0
                }
            ],
            "md5sum": "%s"
        }
    ]
}"""
    b16 = text.replace("float32", "bfloat16").replace("f32-to-bf16", "raw")
    assert contents(tmp_path) == {
        "params_shard_0.bin": b"\x80\x3f\x80\x3f",
        "tensor-cache.json": (text % digest).encode(),
        "tensor-cache-b16.json": (b16 % digest).encode(),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (2, 0, 3)], ids=str)
def test_every_dtype_and_shape(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = random_array(shape, dtype)
    ndcache.dump({"x": array}, tmp_path, encode="raw")
    stored = read_back(tmp_path)["x"]
    assert (stored.dtype, stored.shape, stored.tobytes()) == (DTYPES[dtype], shape, array.tobytes())


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.arange(6, dtype=">i8"),
        np.arange(12, dtype=np.int16).reshape(3, 4).T,
        np.arange(12, dtype=np.float64)[::-3],
        np.broadcast_to(np.float32(2.5), (3, 4)),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.frombuffer(b"\0" + np.arange(4, dtype=np.float32).tobytes(), np.uint8)[1:].view(np.float32),
    ],
    ids=["big endian", "big endian int", "transposed", "reversed", "broadcast", "fortran", "unaligned"],
)
@pytest.mark.parametrize("encode", ["raw", "f32-to-bf16"])
def test_byte_order_and_strides(tmp_path: Path, array: Array, encode: Any) -> None:
    ndcache.dump({"x": array}, tmp_path, encode=encode)
    np.testing.assert_array_equal(read_back(tmp_path)["x"].astype(array.dtype), array)


def test_bfloat16_rounds_to_even_and_keeps_what_is_not_finite(tmp_path: Path) -> None:
    cases = {  # float32 bits → bfloat16 bits
        0x3F808000: 0x3F80,  # halfway, down to even
        0x3F818000: 0x3F82,  # halfway, up to even
        0x3F808001: 0x3F81,
        0x3F807FFF: 0x3F80,
        0x80000000: 0x8000,  # -0
        0x00000001: 0x0000,  # subnormal
        0x00018000: 0x0002,
        0x7F7F7FFF: 0x7F7F,
        0x7F7FFFFF: 0x7F7F,  # the largest float32 is cut off, not rounded to infinity
        0xFF7FFFFF: 0xFF7F,
        0x7F800000: 0x7F80,
        0xFF800000: 0xFF80,
        0x7FC12345: 0x7FC1,  # NaN
        0xFFC00001: 0xFFC0,
    }
    ndcache.dump({"x": np.array(list(cases), np.uint32).view(np.float32)}, tmp_path)
    assert read_back(tmp_path)["x"].view(np.uint16).tolist() == list(cases.values())


def test_a_nan_with_its_payload_at_the_end_stays_nan(tmp_path: Path) -> None:
    ndcache.dump({"x": np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)}, tmp_path)
    assert np.isnan(read_back(tmp_path)["x"].astype(np.float32)).all()


def test_a_tensor_larger_than_the_encoder_takes_at_once(tmp_path: Path) -> None:
    array = random_array(((9 << 20) // 4 + 3,))
    ndcache.dump({"x": array}, tmp_path)
    np.testing.assert_array_equal(read_back(tmp_path)["x"], array.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [
        ((10, 20, 30), [["t0", "t1", "t2"]]),
        ((49, 49, 1), [["t0", "t1", "t2"]]),  # 99 bytes
        ((49, 49, 2), [["t0", "t1"], ["t2"]]),  # 100 would not be under the limit
        (
            (60, 50, 1),
            [["t1"], ["t0", "t2"]],
        ),  # a large tensor that does not fit gets its own shard; the pending one goes on
        ((60, 49, 1), [["t0"], ["t1", "t2"]]),
        ((49, 49, 49), [["t0", "t1"], ["t2"]]),
        ((10, 500, 20), [["t1"], ["t0", "t2"]]),
        ((100,), [["t0"]]),
        ((99, 1), [["t0"], ["t1"]]),
        ((0, 99, 0, 1, 0), [["t0", "t1", "t2"], ["t3", "t4"]]),
        ((0, 0), [["t0", "t1"]]),
        ((100, 0), [["t0"], ["t1"]]),
        ((), []),
    ],
)
def test_shards(tmp_path: Path, sizes: tuple[int, ...], shards: list[list[str]]) -> None:
    params = byte_tensors(*sizes)
    ndcache.dump(params, tmp_path, shard_bytes=100)
    assert layout(tmp_path) == shards
    assert [shard["dataPath"] for shard in json.loads((tmp_path / "tensor-cache.json").read_bytes())["records"]] == [
        f"params_shard_{number}.bin" for number in range(len(shards))
    ]
    assert {name: array.tobytes() for name, array in read_back(tmp_path).items()} == {
        name: array.tobytes() for name, array in params.items()
    }
    assert set(ndcache.load(tmp_path)) == set(params)


@pytest.mark.parametrize("encode", ["raw", {"*": "raw"}, {"w": "raw", "v": "raw", "*": "f32-to-bf16"}])
def test_no_b16_manifest_without_bfloat16(tmp_path: Path, encode: Any) -> None:
    ndcache.dump({"w": np.zeros(2, np.float32)}, tmp_path, encode="f32-to-bf16")
    assert (tmp_path / "tensor-cache-b16.json").exists()
    ndcache.dump({"w": np.zeros(2, np.float32), "v": np.zeros(2, np.int32)}, tmp_path, encode=encode)
    assert not (tmp_path / "tensor-cache-b16.json").exists()


def test_encoding_by_name(tmp_path: Path) -> None:
    params = {"a": random_array((3,)), "b": random_array((3,)), "c": np.arange(3)}
    ndcache.dump(params, tmp_path, encode={"a": "raw", "*": "f32-to-bf16"})
    records = json.loads((tmp_path / "tensor-cache.json").read_bytes())["records"][0]["records"]
    # In published models, other dtypes are marked, too, and stored as they are.
    assert [(record["format"], record["nbytes"]) for record in records] == [
        ("raw", 12),
        ("f32-to-bf16", 6),
        ("f32-to-bf16", 24),
    ]
    assert read_back(tmp_path, "tensor-cache-b16.json")["b"].dtype == ml_dtypes.bfloat16


def test_dump_returns_the_manifest(tmp_path: Path) -> None:
    manifest = ndcache.dump(byte_tensors(60, 60), tmp_path / "new" / "model", shard_bytes=100, metadata={"a": [1]})
    assert manifest == ndcache.read_manifest(tmp_path / "new" / "model")
    assert len(manifest.shards) == 2


# --- accepted arguments -------------------------------------------------------------------------------


class HasArray:
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.arange(3)


class HasNumpy:
    """Like a TVM tensor, which `numpy.asarray` would turn into an array of objects."""

    def __getitem__(self, index: int) -> HasNumpy:
        raise IndexError

    def numpy(self) -> Array:
        return np.arange(3)


@pytest.mark.parametrize("value", [HasArray(), HasNumpy(), [0, 1, 2], range(3)])
def test_anything_that_becomes_an_array_is_accepted(tmp_path: Path, value: Any) -> None:
    ndcache.dump({"x": value}, tmp_path)
    assert read_back(tmp_path)["x"].tolist() == [0, 1, 2]


def test_weights_are_taken_with_their_metadata(tmp_path: Path) -> None:
    ndcache.dump({"x": random_array((5,))}, tmp_path / "a", encode="raw", metadata=MappingProxyType({"n": 1}))
    weights = ndcache.load(tmp_path / "a")
    ndcache.dump(weights, tmp_path / "b", encode="raw", metadata=weights.metadata)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_weights_on_a_gpu_are_taken(tmp_path: Path, gpu: Any) -> None:
    ndcache.dump({"x": random_array((5,), "uint8"), "y": random_array((2, 2))}, tmp_path / "a", encode="raw")
    ndcache.dump(ndcache.load(tmp_path / "a", gpu), tmp_path / "b", encode="raw")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_metadata_may_be_known_only_at_the_end(tmp_path: Path) -> None:
    seen: list[str] = []

    def params() -> Iterator[tuple[str, Array]]:
        for name in "ab":
            seen.append(name)
            yield name, np.zeros(1)

    assert ndcache.dump(params(), tmp_path, metadata=lambda: {"names": seen}).metadata == {"names": ["a", "b"]}


def test_one_tensor_at_a_time_in_memory(tmp_path: Path) -> None:
    nbytes, count = 8 << 20, 12

    def params() -> Iterator[tuple[str, Array]]:
        for index in range(count):
            yield f"t{index}", np.full(nbytes // 4, index, np.float32)

    tracemalloc.start()
    try:
        ndcache.dump(params(), tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * nbytes


# --- refused arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"encode": "f16"}, ValueError, "encode must be"),
        ({"encode": {"w": "f16"}}, ValueError, r"encode\['w'\]"),
        ({"encode": {"v": "raw"}}, ValueError, r"neither 'w' nor '\*'"),
        ({"encode": None}, TypeError, "encode must be"),
        ({"shard_bytes": 0}, ValueError, "shard_bytes"),
        ({"shard_bytes": -1}, ValueError, "shard_bytes"),
        ({"shard_bytes": 1.5}, TypeError, "shard_bytes must be a number of bytes, not 1.5"),
        ({"metadata": {"x": object()}}, TypeError, "JSON"),
        ({"metadata": {"x": float("nan")}}, ndcache.ManifestSyntaxError, "NaN"),
        ({"metadata": lambda: {"x": object()}}, TypeError, "JSON"),
    ],
)
def test_arguments_that_are_refused(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    ndcache.dump({"old": np.zeros(1)}, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(error, match=match):
        ndcache.dump({"w": np.zeros(1, np.float32)}, tmp_path, **arguments)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(2, np.complex64),
        np.array([None]),
        np.array(["a"]),
        np.zeros(2, "datetime64[s]"),
        np.zeros(2, np.dtype([("a", "i4")])),
        np.zeros(2, getattr(ml_dtypes, "int4", np.complex128)),  # which the oldest ml_dtypes lacks
        [[1], [2, 3]],
        pytest.param(
            np.zeros(2, np.longdouble),
            marks=pytest.mark.skipif(np.finfo(np.longdouble).bits == 64, reason="long double is float64 here"),
        ),
    ],
    ids=["complex", "object", "str", "datetime", "struct", "int4", "ragged", "longdouble"],
)
@pytest.mark.filterwarnings("ignore:Creating an ndarray from ragged")  # by NumPy 1.21, before it is refused
def test_dtypes_that_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ndcache.UnsupportedDtypeError, match="'the-name'"):
        ndcache.dump({"fine": np.zeros(1), "the-name": value}, tmp_path)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [(["a", "b", "a"], ValueError, "'a' is given twice"), ([1], TypeError, "string"), (["\ud800"], ValueError, "Unic")],
)
@pytest.mark.parametrize("update", [False, True])
def test_names_that_are_refused(
    tmp_path: Path, names: list[Any], error: type[Exception], match: str, update: bool
) -> None:
    with pytest.raises(error, match=match):
        ndcache.dump([(name, np.zeros(1)) for name in names], tmp_path, update=update)
    assert contents(tmp_path) == {}


# --- over an older dump -------------------------------------------------------------------------------


def test_stale_files_go_and_others_stay(tmp_path: Path) -> None:
    ndcache.dump(byte_tensors(60, 60, 60), tmp_path, shard_bytes=100)
    keep = ("params_shard_x.bin", "params_shard_1.bin.bak", "tokenizer.json", "other-b16.json", "my_params_shard_2.bin")
    for name in keep:
        (tmp_path / name).write_text("mine")
    (tmp_path / "tensor-cache.json").rename(tmp_path / "ndarray-cache.json")  # the older name
    ndcache.dump({"w": np.zeros(1, np.uint8)}, tmp_path)
    assert set(contents(tmp_path)) == {"params_shard_0.bin", "tensor-cache.json", *keep}
    assert layout(tmp_path) == [["w"]]


def test_open_files_of_an_older_dump_stay_readable(tmp_path: Path) -> None:
    params = {"a": np.arange(1000), "b": np.arange(1000) * 2}
    ndcache.dump(params, tmp_path, shard_bytes=1000)
    weights = ndcache.load(tmp_path)
    ndcache.dump({"a": np.zeros(1000, np.int64)}, tmp_path, update=True)
    ndcache.dump({"c": np.zeros(7)}, tmp_path)
    for name, array in params.items():
        np.testing.assert_array_equal(weights[name], array)


def test_a_directory_may_be_dumped_into_itself(tmp_path: Path) -> None:
    params = {"a": random_array((1000,)), "b": random_array((1000,), seed=1)}
    ndcache.dump(params, tmp_path, encode="raw")
    ndcache.dump(ndcache.load(tmp_path), tmp_path, encode="raw", shard_bytes=1000)
    assert {name: array.tobytes() for name, array in read_back(tmp_path).items()} == {
        name: array.tobytes() for name, array in params.items()
    }


def test_manifests_are_renamed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        named.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    ndcache.dump({"a": np.zeros(100, np.float32), "b": np.zeros(100, np.float32)}, tmp_path, shard_bytes=200)
    assert named == ["params_shard_0.bin", "params_shard_1.bin", "tensor-cache.json", "tensor-cache-b16.json"]


@pytest.mark.parametrize("update", [False, True])
def test_a_dump_that_fails_changes_nothing(tmp_path: Path, update: bool) -> None:
    ndcache.dump(byte_tensors(60, 60), tmp_path, shard_bytes=100)
    before = contents(tmp_path)

    def params() -> Iterator[tuple[str, Array]]:
        yield "t0", np.zeros(60, np.uint8)
        yield "new", np.zeros(90, np.uint8)
        raise RuntimeError("out of tensors")

    with pytest.raises(RuntimeError, match="out of tensors"):
        ndcache.dump(params(), tmp_path, shard_bytes=100, update=update)
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("update", [False, True])
def test_a_dump_that_is_killed_changes_nothing(tmp_path: Path, update: bool) -> None:
    ndcache.dump(byte_tensors(60, 60), tmp_path, shard_bytes=100)
    before = contents(tmp_path)
    script = f"""
import sys, numpy as np, ndcache
def params():
    yield "t0", np.ones(60, np.uint8)
    for index in range(3):
        yield f"new{{index}}", np.ones(90, np.uint8)
    print("now", flush=True)
    sys.stdin.read()
ndcache.dump(params(), {str(tmp_path)!r}, shard_bytes=100, update={update})
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"now\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before
    ndcache.dump({"w": np.zeros(1)}, tmp_path)  # files left by the killed process do no harm
    assert list(ndcache.load(tmp_path)) == ["w"]


# --- update -------------------------------------------------------------------------------------------


def test_update_replaces_and_adds(tmp_path: Path) -> None:
    params = {f"t{index}": random_array((10,), seed=index) for index in range(6)}
    ndcache.dump(params, tmp_path, encode="raw", shard_bytes=100, metadata={"kept": True})
    assert layout(tmp_path) == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"]]
    before = contents(tmp_path)
    # Two tensors of one shard, in another order, with another dtype and shape of the same size.
    changes = {"t3": np.arange(5, dtype=np.int64), "t2": -params["t2"], "t4": -params["t4"], "new": np.arange(4)}
    manifest = ndcache.dump(changes, tmp_path, encode="raw", shard_bytes=100, update=True)
    assert manifest.metadata == {"kept": True}
    assert layout(tmp_path) == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"], ["new"]]
    stored = read_back(tmp_path)
    assert {name: (a.dtype, a.tobytes()) for name, a in stored.items()} == {
        name: (a.dtype, a.tobytes()) for name, a in {**params, **changes}.items()
    }
    assert contents(tmp_path)["params_shard_0.bin"] == before["params_shard_0.bin"]


def test_update_in_a_shard_with_empty_tensors(tmp_path: Path) -> None:
    params = {"a": np.zeros(0, np.int64), "b": np.arange(4), "c": np.zeros(0, np.int64), "d": np.arange(3)}
    ndcache.dump(params, tmp_path)
    changes = {"c": np.zeros(0, np.int64), "b": np.arange(4) * 7, "a": np.zeros((0, 9), np.int64)}
    ndcache.dump(changes, tmp_path, update=True)
    stored = read_back(tmp_path)
    for name, array in {**params, **changes}.items():
        np.testing.assert_array_equal(stored[name], array)


def test_update_may_replace_metadata(tmp_path: Path) -> None:
    ndcache.dump(byte_tensors(1), tmp_path, metadata={"a": 1})
    assert ndcache.dump({}, tmp_path, metadata={"b": 2}, update=True).metadata == {"b": 2}
    assert layout(tmp_path) == [["t0"]]


def test_update_of_nothing_is_a_new_dump(tmp_path: Path) -> None:
    ndcache.dump(byte_tensors(3, 4), tmp_path / "a", update=True)
    ndcache.dump(byte_tensors(3, 4), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_update_to_another_size_is_refused(tmp_path: Path) -> None:
    ndcache.dump(byte_tensors(3, 4), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"'t1' has 4 bytes .* 5"):
        ndcache.dump({"t0": np.ones(3, np.uint8), "t1": np.ones(5, np.uint8)}, tmp_path, update=True)
    assert contents(tmp_path) == before


def test_update_of_an_incomplete_directory_is_refused(tmp_path: Path) -> None:
    ndcache.dump(byte_tensors(3, 4), tmp_path)
    (tmp_path / "params_shard_0.bin").write_bytes(b"123")
    with pytest.raises(ndcache.SizeMismatchError, match=r"params_shard_0\.bin has 3 bytes"):
        ndcache.dump(byte_tensors(3), tmp_path, update=True)


def test_update_keeps_what_other_writers_left(tmp_path: Path) -> None:
    """Keep an older manifest name, other numbers of shards, and digests other than md5."""
    old = write_model(tmp_path, [byte_tensors(8), {"w": np.arange(8)}], manifest_name="ndarray-cache.json")
    (tmp_path / "params_shard_0.bin").rename(tmp_path / "params_shard_2.bin")
    old["records"][0].update(dataPath="params_shard_2.bin", sha256sum="0" * 64)
    (tmp_path / "ndarray-cache.json").write_text(json.dumps(old))
    ndcache.dump({"t0": np.ones(8, np.uint8), "new": np.ones(2, np.float32)}, tmp_path, update=True)
    stored = read_back(tmp_path, "ndarray-cache.json")
    assert {name: array.tolist() for name, array in stored.items()} == {
        "t0": [1] * 8,
        "w": list(range(8)),
        "new": [1.0, 1.0],
    }
    assert set(contents(tmp_path)) == {
        *("params_shard_1.bin", "params_shard_2.bin", "params_shard_3.bin"),
        *("ndarray-cache.json", "ndarray-cache-b16.json"),
    }
    assert ndcache.verify(tmp_path).checked.keys() == {f"params_shard_{number}.bin" for number in (1, 2, 3)}
