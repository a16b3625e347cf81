"""Load safetensors files of a local directory: which one, and that every bit is the one in the file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import ndcache
import ndcache.torch
from ndcache.cli import commands as cli
from ndcache.format.numpy_dtypes import TENSOR_DTYPES
from ndcache.sources.local import LocalModel

from ..helpers.devices import SHAPES, assert_tensors
from ..helpers.models import simple_model
from ..helpers.requirements import need_module
from ..helpers.tensor_files import file_bytes, tensor, write_index

Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
KINDS = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "U32": "uint32", "I32": "int32"},
    **{"U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "C64": "complex64"},
    **{"F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu"},
}
#: The dtypes that the oldest supported versions of the libraries have.
OLD_KINDS = list(KINDS)[:15]


def write_all(path: Path, kinds: Collection[str] = ()) -> Arrays:
    """Write tensors of every dtype, or of these, and shape, with every bit pattern of a byte, and return them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    arrays, data = dict[str, Any](), b""
    for kind, name in KINDS.items():
        if name not in TENSOR_DTYPES or (kinds and kind not in kinds):
            continue
        dtype = TENSOR_DTYPES[name]
        for shape in [*SHAPES, (256,)]:
            nbytes = int(np.prod(shape)) * dtype.itemsize
            stored = bytes(n % (2 if kind == "BOOL" else 256) for n in range(nbytes))
            arrays[f"{kind} {shape}"] = np.frombuffer(stored, dtype).reshape(shape)
            header[f"{kind} {shape}"] = tensor(kind, list(shape), len(data), len(data) + nbytes)
            data += stored
    path.write_bytes(file_bytes(header, data))
    return arrays


def array(value: int, rows: int = 8) -> np.ndarray[Any, Any]:
    return np.full((rows, 4), value, np.uint8)


@pytest.mark.parametrize("copy", [False, True])
def test_every_dtype_onto_the_cpu(tmp_path: Path, copy: bool) -> None:
    arrays = write_all(tmp_path / SINGLE)
    loaded = ndcache.load(tmp_path, copy=copy)
    assert_tensors(loaded, arrays)
    assert loaded.metadata == {"format": "pt"}
    old = write_all(tmp_path / "old.safetensors", OLD_KINDS[:12])
    with need_module("safetensors").safe_open(tmp_path / "old.safetensors", "numpy") as theirs:
        assert set(old) == set(theirs.keys())
        for name in old:
            expected = theirs.get_tensor(name)
            assert loaded[name].dtype == expected.dtype
            assert loaded[name].tobytes() == expected.tobytes()


def test_every_dtype_onto_the_gpu(tmp_path: Path, gpu: Any) -> None:
    arrays = write_all(tmp_path / SINGLE)
    with ndcache.load(tmp_path, gpu) as weights:
        assert_tensors(weights, arrays)


@pytest.mark.torch
def test_every_dtype_into_torch(tmp_path: Path) -> None:
    torch = need_module("torch")
    arrays = write_all(tmp_path / SINGLE)
    known = [name for name, item in arrays.items() if hasattr(torch, item.dtype.name)]
    weights = ndcache.torch.load(tmp_path, "cpu", names=known)
    assert_tensors(weights, {name: arrays[name] for name in known})
    with need_module("safetensors").safe_open(tmp_path / SINGLE, "pt") as theirs:
        for name in known:
            if name.split()[0] in OLD_KINDS:
                expected = theirs.get_tensor(name)
                assert weights[name].dtype == expected.dtype
                assert torch.equal(weights[name].view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))


def test_a_dtype_that_this_version_of_ml_dtypes_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SINGLE).write_bytes(file_bytes({"a": tensor("F8_E8M0", [4], 0, 4)}, b"data"))
    if hasattr(ml_dtypes, "float8_e8m0fnu"):
        monkeypatch.delitem(TENSOR_DTYPES, "float8_e8m0fnu")
    with pytest.raises(ndcache.UnsupportedDtypeError, match="'a' is float8_e8m0fnu, which the installed ml_dtypes"):
        ndcache.load(tmp_path)


def test_the_order_of_names(tmp_path: Path) -> None:
    write_index(tmp_path, {"1.safetensors": {"index": array(1)}})
    (tmp_path / SINGLE).write_bytes(file_bytes({"single": tensor("U8", [1], 0, 1)}, b"x"))
    simple_model(tmp_path, shards=1)
    assert list(ndcache.load(tmp_path)) == ["layer.0"]
    (tmp_path / "tensor-cache.json").unlink()
    assert list(ndcache.load(tmp_path)) == ["index"]
    assert list(ndcache.load(tmp_path / SINGLE)) == ["single"]
    assert list(ndcache.load(tmp_path / "1.safetensors")) == ["index"]
    (tmp_path / INDEX).unlink()
    assert list(ndcache.load(tmp_path)) == ["single"]
    assert list(ndcache.load(tmp_path.as_uri())) == ["single"]


def test_the_only_model_with_an_unusual_name(tmp_path: Path) -> None:
    write_index(tmp_path, {"my-00001-of-00002.safetensors": {"a": array(1)}, "my-00002-of-00002.safetensors": {}})
    (tmp_path / INDEX).rename(tmp_path / "my.safetensors.index.json")
    assert list(ndcache.load(tmp_path)) == ["a"]
    (tmp_path / "my.safetensors.index.json").unlink()
    (tmp_path / "my-00002-of-00002.safetensors").unlink(missing_ok=True)
    assert list(ndcache.load(tmp_path)) == ["a"]


def test_row_89_several_models_with_unusual_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.safetensors").write_bytes(file_bytes({}))
    with pytest.raises(ndcache.NotFoundError, match="there are 2 safetensors models in") as caught:
        ndcache.load(tmp_path)
    assert caught.value.hint == (
        f"Give the one that you want: {tmp_path / 'a.safetensors'}, {tmp_path / 'b.safetensors'}."
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ndcache.NotFoundError, match=r"there is no tensor-cache\.json or .* no model\.safe.* either"):
        ndcache.load(tmp_path / "empty")


def test_a_part_of_an_index(tmp_path: Path) -> None:
    index = write_index(
        tmp_path / "m", {"1.safetensors": {"a": array(1), "b": array(2)}, "2.safetensors": {"c": array(3)}}
    )
    loaded = ndcache.load(index.parent, names=["b", "c"])
    assert_tensors(loaded, {"b": array(2), "c": array(3)})
    assert_tensors(ndcache.load(index, names={"b": slice(-2, None)}), {"b": array(2, 2)})
    streamed = {name: item.copy() for name, item in ndcache.stream(index.parent, names="[ac]")}
    assert_tensors(streamed, {"a": array(1), "c": array(3)})
    memory = np.zeros((8, 4), np.uint8)
    ndcache.load(index, names="a", into={"a": memory})
    assert (memory == 1).all()
    with pytest.raises(KeyError, match=r"model\.safetensors\.index\.json"):
        ndcache.load(index, names="d")


def test_metadata_files_and_digests(tmp_path: Path) -> None:
    index = write_index(tmp_path / "m", {"1.safetensors": {"a": array(1)}})
    manifest = ndcache.read_manifest(index)
    assert (manifest.name, dict(manifest.metadata)) == (INDEX, {"total_size": 1})
    (shard,) = manifest.shards
    assert (shard.data_path, shard.nbytes) == ("1.safetensors", (tmp_path / "m" / "1.safetensors").stat().st_size)
    assert ndcache.fetch(tmp_path / "m") == tmp_path / "m"
    data = (tmp_path / "m" / "1.safetensors").read_bytes()
    digests = hashlib.sha256(data).digest(), bytes(32)
    right, wrong = (f"sha256-{base64.b64encode(digest).decode()}" for digest in digests)
    assert list(ndcache.load(index, integrity={"1.safetensors": right})) == ["a"]
    for name in ("1.safetensors", INDEX):
        with pytest.raises(ndcache.ChecksumError):
            ndcache.load(index, integrity={name: wrong})
    with pytest.raises(ndcache.ManifestLayoutError, match="not a file of"):
        ndcache.load(index, integrity={"2.safetensors": wrong})


def test_row_91_a_local_file_that_is_replaced_after_its_header_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_index(tmp_path / "m", {"1.safetensors": {"a": array(1), "b": array(2)}})
    write_index(tmp_path / "new", {"1.safetensors": {"b": array(1), "a": array(2)}})
    prepare = LocalModel.prepare

    def replace(self: LocalModel, shards: Any) -> bool:
        (tmp_path / "new" / "1.safetensors").replace(tmp_path / "m" / "1.safetensors")
        return prepare(self, shards)

    monkeypatch.setattr(LocalModel, "prepare", replace)
    with pytest.raises(ndcache.ManifestLayoutError, match="replaced by another file after its header was read"):
        ndcache.load(tmp_path / "m")
    monkeypatch.undo()
    assert_tensors(ndcache.load(tmp_path / "m"), {"b": array(1), "a": array(2)})


def test_the_command_line(tmp_path: Path) -> None:
    index = write_index(tmp_path / "m", {"1.safetensors": {"a": array(1)}})

    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.main, [*words, str(index.parent)])
        return result.exit_code, result.output

    code, output = run("inspect")
    assert code == 0
    assert "1.safetensors" in output
    assert run("verify")[0] == 0
    with open(index.parent / "1.safetensors", "ab") as file:
        file.write(b"!")
    code, output = run("verify")
    assert code == 1
    assert "1.safetensors" in output


def test_views_are_of_the_file_unless_it_is_not_aligned(tmp_path: Path) -> None:
    """A header of any length is allowed, so that the first tensor may begin anywhere."""
    for padding in range(9):
        header = json.dumps({"a": tensor("F64", [2], 0, 16)}).encode() + b" " * padding
        (tmp_path / SINGLE).write_bytes(file_bytes(header, np.array([1.5, 2.5]).tobytes()))
        loaded = ndcache.load(tmp_path)
        assert loaded["a"].tolist() == [1.5, 2.5]
        assert loaded["a"].flags.aligned or (8 + len(header)) % 8
