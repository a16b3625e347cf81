"""Test that ndcache and apache-tvm read and write each other's directories, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ndcache
from ndcache.format.numpy_dtypes import DTYPES

from .helpers.models import random_array, through_bf16
from .helpers.requirements import need_module
from .helpers.servers import FileServer

pytestmark = pytest.mark.once

Array = np.ndarray[Any, Any]
Serve = Callable[..., FileServer]
#: A tensor in a form that can be compared: dtype, shape, bytes.
Bits = tuple[str, tuple[int, ...], bytes]

_SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-40, 1.00390625, 1.01171875]


@pytest.fixture(scope="session")
def tvm() -> Any:
    return need_module("tvm")


@pytest.fixture(scope="session")
def tvmjs(tvm: Any) -> Any:
    return need_module("tvm.contrib.tvmjs")


def bits(array: Any) -> Bits:
    array = np.asarray(array)
    return array.dtype.name, array.shape, array.tobytes()


def all_bits(tensors: Mapping[str, Any]) -> dict[str, Bits]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def parameters() -> dict[str, Array]:
    """Make tensors of every dtype of TVM: scalars, empty and odd sizes, and sizes around the shard limit."""
    params: dict[str, Array] = {}
    for seed, dtype in enumerate(DTYPES):
        params[f"{dtype}.matrix"] = random_array((13, 7), dtype, seed)
        params[f"{dtype}.scalar"] = random_array((), dtype, seed)
        params[f"{dtype}.empty"] = random_array((3, 0), dtype, seed)
    params["special"] = np.array(_SPECIAL, np.float32)
    for seed, nbytes in enumerate((300_000, 700_000, 3_000_000, 400_001, 524_288, 100_000)):
        params[f"big.{seed}"] = random_array((nbytes // 4,), seed=seed)
    params["big.f16"] = random_array((1001, 999), "float16")
    return params


class _TVM:
    """Write and read directories with apache-tvm."""

    def __init__(self, tvm: Any, tvmjs: Any) -> None:
        self._tvm, self._tvmjs = tvm, tvmjs

    def dump(
        self, params: Mapping[str, Any], directory: Path, *, encode: Any, shard_bytes: int, **options: Any
    ) -> None:
        self._tvmjs.dump_tensor_cache(
            params,
            str(directory),
            encode_format=encode,
            shard_cap_mb=shard_bytes / (1 << 20),
            show_progress=False,
            **options,
        )

    def load(self, path: Path) -> dict[str, Bits]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # TVM leaves its files to the garbage collector
            tensors, _ = self._tvmjs.load_tensor_cache(str(path), self._tvm.cpu())
        return {name: bits(tensor.numpy()) for name, tensor in tensors.items()}

    def load_natively(self, directory: Path, names: list[str]) -> dict[str, Bits]:
        """Load with the C++ loader that mlc_llm uses."""
        self.function("clear")()
        self.function("load")(str(directory), 1, 0)  # kDLCPU
        tensors = {name: bits(self.function("get")(name).numpy()) for name in names}
        self.function("clear")()
        return tensors

    def function(self, name: str) -> Any:
        return self._tvm.get_global_func(f"vm.builtin.tensor_cache.{name}")


@pytest.fixture(scope="session")
def apache(tvm: Any, tvmjs: Any) -> _TVM:
    return _TVM(tvm, tvmjs)


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest) -> Any:
    return "cpu" if request.param == "cpu" else request.getfixturevalue("gpu")


# --- TVM writes, ndcache reads ------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[(encode, shard_bytes) for encode in ("raw", "f32-to-bf16") for shard_bytes in (1 << 20, 32 << 20)],
    ids=str,
)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, apache: _TVM
) -> tuple[Path, dict[str, Bits]]:
    """Write a directory with TVM; return it and what TVM itself reads from it."""
    encode, shard_bytes = request.param
    directory = tmp_path_factory.mktemp("written")
    apache.dump(parameters(), directory, encode=encode, shard_bytes=shard_bytes, meta_data={"ParamSize": 1})
    return directory, apache.load(directory)


def test_read_in_place(written: tuple[Path, dict[str, Bits]], device: Any) -> None:
    directory, expected = written
    weights = ndcache.load(directory, device, verify="always")
    assert all_bits(weights) == expected
    assert weights.metadata == {"ParamSize": 1}


def test_read_over_http(written: tuple[Path, dict[str, Bits]], device: Any, serve: Serve) -> None:
    directory, expected = written
    weights = ndcache.load(serve(directory).url, device)
    assert all_bits(weights) == expected
    assert weights.stats.integrity.keys() == {"md5"}


def test_read_the_b16_manifest(tmp_path: Path, apache: _TVM, device: Any, serve: Serve) -> None:
    apache.dump(parameters(), tmp_path, encode="f32-to-bf16", shard_bytes=1 << 20)
    expected = apache.load(tmp_path / "tensor-cache-b16.json")
    assert expected["special"][0] == "bfloat16"
    assert all_bits(ndcache.load(serve(tmp_path).url + "tensor-cache-b16.json", device)) == expected


def test_tvm_reads_what_fetch_brought(written: tuple[Path, dict[str, Bits]], apache: _TVM, serve: Serve) -> None:
    directory, expected = written
    assert apache.load(ndcache.fetch(serve(directory).url)) == expected


# --- ndcache writes, TVM reads ------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1000, 1 << 20, 32 << 20])
@pytest.mark.parametrize(
    "encode", ["raw", "f32-to-bf16", {"*": "raw", "special": "f32-to-bf16", "big.1": "f32-to-bf16"}]
)
def test_the_same_files(tmp_path: Path, apache: _TVM, encode: Any, shard_bytes: int) -> None:
    metadata = {"ParamSize": 60, "ParamBytes": 1.5e9, "name": "größe", "nested": {"a": [None, True]}}
    apache.dump(parameters(), tmp_path / "tvm", encode=encode, shard_bytes=shard_bytes, meta_data=metadata)
    ndcache.dump(parameters(), tmp_path / "ours", encode=encode, shard_bytes=shard_bytes, metadata=metadata)
    assert contents(tmp_path / "ours") == contents(tmp_path / "tvm")


_DTYPES = st.sampled_from(["float32", "float32", "uint8", "float16", "bfloat16", "int64"])
_TENSORS = st.lists(st.tuples(st.integers(0, 40), _DTYPES), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    tensors=_TENSORS,
    more=_TENSORS,
    encode=st.sampled_from(["raw", "f32-to-bf16"]),
    shard_bytes=st.sampled_from([8, 16, 64, 100, 256]),
    replaced=st.sets(st.integers(0, 29)),
)
def test_the_same_files_whatever_the_sizes(
    tmp_path_factory: pytest.TempPathFactory,
    apache: _TVM,
    tensors: list[tuple[int, str]],
    more: list[tuple[int, str]],
    encode: Any,
    shard_bytes: int,
    replaced: set[int],
) -> None:
    """Dump tensors, then update the directory: replace some tensors and add others."""
    directory = tmp_path_factory.mktemp("same")
    params = {f"t{i}": random_array((n,), dtype, i) for i, (n, dtype) in enumerate(tensors)}
    update = {name: array[::-1].copy() for name, array in params.items() if int(name[1:]) in replaced}
    update |= {f"new{i}": random_array((n,), dtype, i) for i, (n, dtype) in enumerate(more)}
    for each in (params, update):
        # TVM loses empty tensors that nothing follows in their shard.
        each["last"] = random_array((3,), "uint8")
    apache.dump(params, directory / "tvm", encode=encode, shard_bytes=shard_bytes)
    ndcache.dump(params, directory / "ours", encode=encode, shard_bytes=shard_bytes)
    assert contents(directory / "ours") == contents(directory / "tvm")
    update["end"] = update.pop("last")
    apache.dump(update, directory / "tvm", encode=encode, shard_bytes=shard_bytes, update_if_exists=True)
    ndcache.dump(update, directory / "ours", encode=encode, shard_bytes=shard_bytes, update=True)
    assert contents(directory / "ours") == contents(directory / "tvm")


@pytest.mark.parametrize("encode", ["raw", "f32-to-bf16"])
def test_tvm_reads_our_files(tmp_path: Path, apache: _TVM, encode: Any) -> None:
    params = parameters()
    ndcache.dump(params, tmp_path, encode=encode, shard_bytes=1 << 20)
    if encode == "f32-to-bf16":
        params = {name: through_bf16(array) for name, array in params.items()}
    assert apache.load(tmp_path) == all_bits(params)


@pytest.mark.parametrize("encode", ["raw", "f32-to-bf16"])
def test_tvm_reads_our_files_natively(tmp_path: Path, apache: _TVM, encode: Any) -> None:
    # TVM's C++ loader rejects an empty float32 tensor that is stored as bfloat16.
    params = {name: array for name, array in parameters().items() if name != "float32.empty"}
    ndcache.dump(params, tmp_path, encode=encode, shard_bytes=1 << 20)
    assert apache.load_natively(tmp_path, list(params)) == apache.load(tmp_path)


def test_tvm_reads_a_shard_of_empty_tensors(tmp_path: Path, apache: _TVM) -> None:
    params = {"a": np.zeros((0, 3), np.float32), "b": np.zeros(0, np.int8)}
    ndcache.dump(params, tmp_path, encode="raw")
    assert apache.load(tmp_path) == apache.load_natively(tmp_path, list(params)) == all_bits(params)


def test_tensors_of_tvm_are_taken(tmp_path: Path, apache: _TVM, tvm: Any) -> None:
    params = {
        "f32": random_array((3, 4)),
        "f16": random_array((3, 4), "float16"),
        "bf16": random_array((3, 4), "bfloat16"),
        "i8": random_array((5,), "int8"),
    }
    tensors = {}
    for name, array in params.items():
        tensors[name] = tvm.runtime.empty(array.shape, array.dtype.name)
        tensors[name].copyfrom(array.view(np.uint16) if name == "bf16" else array)
    apache.dump(tensors, tmp_path / "tvm", encode="raw", shard_bytes=1 << 20)
    ndcache.dump(tensors, tmp_path / "ours", encode="raw", shard_bytes=1 << 20)
    assert contents(tmp_path / "ours") == contents(tmp_path / "tvm")
    assert all_bits(ndcache.load(tmp_path / "ours")) == all_bits(params)
