"""Headers of safetensors files, and indexes: the library refuses no file that is accepted here."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ndcache
from ndcache.errors import (
    ManifestError,
    ManifestLayoutError,
    ManifestLimitError,
    ManifestSyntaxError,
    NotFoundError,
    UnsafePathError,
    UnsupportedDtypeError,
)
from ndcache.format.safetensors.headers import FileHeader, Headers

from ...helpers.requirements import need_module
from ...helpers.tensor_files import file_bytes, tensor, write_index
from ..test_parse_properties import thorough

U8 = tensor("U8", [4], 0, 4)
DATA = b"data"
GOOD = file_bytes({"a": U8}, DATA)

#: Files that safetensors refuses as well.
REFUSED: dict[str, tuple[bytes, type[Exception], str]] = {
    "empty": (b"", ManifestSyntaxError, "ends after 0 bytes"),
    "no header": (bytes(8), ManifestSyntaxError, "does not begin with '{'"),
    "cut in the header": (GOOD[:20], ManifestSyntaxError, "ends before its header does"),
    "longer than the file": (file_bytes({"a": U8}, DATA, 1 << 20), ManifestSyntaxError, "ends before its header does"),
    "longer than any": (file_bytes({"a": U8}, DATA, 1 << 40), ManifestLimitError, r"limit is 67,108,864"),
    "web page": (b"<html><head></head><body></body>", ManifestSyntaxError, "web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", ManifestSyntaxError, "git-lfs pointer"),
    "space first": (file_bytes(b' {"a":1}'), ManifestSyntaxError, "no header begins at byte 8"),
    "no JSON": (file_bytes(b"{'a'}"), ManifestSyntaxError, "header is not JSON"),
    "no UTF-8": (file_bytes(b'{"\xff":1}'), ManifestSyntaxError, "not UTF-8"),
    "text behind": (file_bytes(b"{}x"), ManifestSyntaxError, "Extra data"),
    "NaN": (file_bytes(b'{"a":NaN}'), ManifestSyntaxError, "NaN"),
    "surrogate": (file_bytes({"\ud800": U8}, DATA), ManifestSyntaxError, "not Unicode"),
    "metadata": (file_bytes({"__metadata__": {"a": 1}}), ManifestSyntaxError, "not an object of strings"),
    "no object": (file_bytes({"a": 1}), ManifestSyntaxError, "'a' is an integer, not an object"),
    "no shape": (file_bytes({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), ManifestSyntaxError, "no 'shape'"),
    "three offsets": (file_bytes({"a": {**U8, "data_offsets": [0, 4, 4]}}, DATA), ManifestSyntaxError, "3 numbers"),
    "fraction": (file_bytes({"a": tensor("U8", [4.0], 0, 4)}, DATA), ManifestSyntaxError, "array of integers"),
    "true": (file_bytes({"a": tensor("U8", [True], 0, 1)}, b"a"), ManifestSyntaxError, "array of integers"),
    "minus zero": (file_bytes(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), ManifestSyntaxError, "-0"),
    "negative": (file_bytes({"a": tensor("U8", [-4], 0, 4)}, DATA), ManifestLayoutError, "impossible shape"),
    "huge": (file_bytes({"a": tensor("U8", [1 << 64], 0, 4)}, DATA), ManifestLayoutError, "impossible shape"),
    "backwards": (file_bytes({"a": tensor("U8", [4], 4, 0)}, DATA), ManifestLayoutError, "lies at bytes 4 to 0"),
    "other size": (file_bytes({"a": tensor("F32", [4], 0, 4)}, DATA), ManifestLayoutError, "takes 16 bytes"),
    "overflow": (file_bytes({"a": tensor("U8", [1 << 32] * 2, 0, 0)}), ManifestLayoutError, "lies at bytes 0 to 0"),
    "gap": (file_bytes({"a": tensor("U8", [3], 1, 4)}, DATA), ManifestLayoutError, "leave a gap: 'a' begins at byte 1"),
    "overlap": (
        file_bytes({"a": tensor("U8", [3], 0, 3), "b": tensor("U8", [2], 2, 4)}, DATA),
        ManifestLayoutError,
        "overlap: 'b' begins at byte 2 of the data, and the one before it ends at 3",
    ),
    "cut": (GOOD[:-1], ManifestLayoutError, "was cut or has grown"),
    "grown": (GOOD + b"!", ManifestLayoutError, "was cut or has grown"),
    "unknown dtype": (file_bytes({"a": tensor("X9", [4], 0, 4)}, DATA), UnsupportedDtypeError, "'a' has the .* 'X9'"),
}
#: Files that are accepted by the library, or by some versions of it.
REFUSED_HERE: dict[str, tuple[bytes, type[Exception], str]] = {
    "twice": (
        file_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(U8).encode(),) * 2), DATA),
        ManifestSyntaxError,
        "header has the key 'a' twice",
    ),
    "dimensions": (file_bytes({"a": tensor("U8", [1] * 33, 0, 1)}, b"a"), ManifestLayoutError, "of 33 dimensions"),
    "strides": (file_bytes({"a": tensor("U8", [0, *[1 << 62] * 2], 0, 0)}), ManifestLayoutError, "impossible shape"),
}
#: Files with dtypes that NumPy cannot hold.
PACKED: dict[str, tuple[bytes, type[Exception], str]] = {
    "F4": (file_bytes({"a": tensor("F4", [8], 0, 4)}, DATA), UnsupportedDtypeError, "'a' has the unsupported .* 'F4'"),
    "F6": (file_bytes({"a": tensor("F6_E2M3", [4], 0, 3)}, b"abc"), UnsupportedDtypeError, "'F6_E2M3'"),
}
ACCEPTED: dict[str, bytes] = {
    "no tensor": file_bytes({}),
    "no metadata": file_bytes({"__metadata__": None, "a": U8}, DATA),
    "metadata": file_bytes({"__metadata__": {"a": '[-0] {"b": -0}', "ä": "\n"}, "a": U8}, DATA),
    "padded": file_bytes(json.dumps({"a": U8}).encode() + b" \n\t ", DATA),
    "another order": file_bytes({"b": tensor("U8", [2], 2, 4), "ü": tensor("U8", [2], 0, 2)}, DATA),
    "empty tensors": file_bytes(
        {"b": tensor("F32", [1], 0, 4), "a": tensor("F64", [0, 3], 0, 0), "c": tensor("BOOL", [0], 4, 4)}, DATA
    ),
    "another field": file_bytes({"a": {**U8, "note": [1]}}, DATA),
}


def their_names(path: Path) -> list[str] | None:
    """Return the names that the library finds, or None if it refuses the file."""
    safetensors = need_module("safetensors")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return sorted(file.keys())
    except (safetensors.SafetensorError, UnicodeDecodeError, OSError):
        return None


@pytest.mark.parametrize("case", PACKED)
def test_row_87_a_dtype_that_numpy_cannot_hold(tmp_path: Path, case: str) -> None:
    data, kind, words = PACKED[case]
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(kind, match=words):
        ndcache.load(tmp_path)
    assert list(ndcache.read_manifest(tmp_path)) == ["a"]


@pytest.mark.parametrize("case", [*REFUSED, *REFUSED_HERE])
def test_row_86_a_header_that_lies(tmp_path: Path, case: str) -> None:
    data, kind, words = (REFUSED | REFUSED_HERE)[case]
    (path := tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(kind, match=words) as caught:
        ndcache.load(path)
    assert isinstance(caught.value, ndcache.NdcacheError)
    assert caught.value.shard == "x.safetensors"
    assert not ndcache.is_cached(path)
    if case in REFUSED:
        assert their_names(path) is None


def test_row_86_a_shape_of_a_million_sizes_takes_no_time(tmp_path: Path) -> None:
    """Their product would take minutes."""
    (tmp_path / "x.safetensors").write_bytes(file_bytes({"a": tensor("U8", [2**63 - 1] * (1 << 18), 0, 0)}))
    with pytest.raises(ManifestLayoutError, match="of 262144 dimensions"):
        ndcache.read_manifest(tmp_path / "x.safetensors")


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_header_that_the_library_accepts(tmp_path: Path, case: str) -> None:
    (path := tmp_path / "x.safetensors").write_bytes(ACCEPTED[case])
    loaded = ndcache.load(path)
    assert sorted(loaded) == their_names(path)
    assert b"".join(array.tobytes() for array in loaded.values()) == (DATA if loaded else b"")


def test_row_88_an_index_and_files_that_disagree(tmp_path: Path) -> None:
    one, two = (np.full(4, n, np.uint8) for n in (1, 2))
    index = write_index(tmp_path / "m", {"1.safetensors": {"a": one}, "2.safetensors": {"b": two}})
    good = json.loads(index.read_text())
    cases: list[tuple[dict[str, Any] | bytes, type[Exception], str]] = [
        ({"a": "1.safetensors", "b": "3.safetensors"}, NotFoundError, r"no file .*3\.safetensors, which model\.safe"),
        ({"a": "1.safetensors"} | {"c": "2.safetensors"}, ManifestLayoutError, "has the tensor 'c', and its header"),
        ({"a": "1.safetensors"} | {"a ": "1.safetensors", "b": "2.safetensors"}, ManifestLayoutError, "tensor 'a '"),
        ({"a": "2.safetensors", "b": "2.safetensors"}, ManifestLayoutError, "'a', and its header does not"),
        ({"a": "1.safetensors", "b": "../m/2.safetensors"}, UnsafePathError, r"\.\./m/2"),
        ({"a": "1.safetensors", "b": "model.bin"}, UnsafePathError, "not a safetensors file"),
        ({"a": "1.safetensors", "b": 2}, ManifestSyntaxError, "the file of tensor 'b' in the index is an integer"),
        (
            b'{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}',
            ManifestSyntaxError,
            "index has the key 'a' twice",
        ),
        (b"{", ManifestSyntaxError, "the index is not JSON"),
        (b"[]", ManifestSyntaxError, "the index is an array"),
        (b"{}", ManifestSyntaxError, "no 'weight_map'"),
        (b"", ManifestSyntaxError, "the index is not JSON"),
    ]
    for content, kind, words in cases:
        text = content if isinstance(content, bytes) else json.dumps(good | {"weight_map": content}).encode()
        index.write_bytes(text)
        with pytest.raises(kind, match=words):
            ndcache.load(index.parent)
    index.write_text(json.dumps(good))
    assert list(ndcache.load(index)) == ["a", "b"]


def test_row_88_two_files_with_the_same_tensor(tmp_path: Path) -> None:
    array = np.zeros(4, np.uint8)
    files = {"1.safetensors": {"a": array, "c": array}, "2.safetensors": {"a": array, "b": array}}
    index = write_index(tmp_path / "m", files)
    with pytest.raises(ManifestLayoutError, match=r"'1\.safetensors' and '2\.safetensors' both have the tensor 'a'"):
        ndcache.load(index)
    index.write_text(json.dumps({"weight_map": {"b": "2.safetensors"}}))
    with pytest.raises(ManifestLayoutError, match="has the tensor 'a', and the index does not say so"):
        ndcache.load(index)


def test_headers_from_the_cache_are_those_that_were_kept() -> None:
    files = tuple(FileHeader(f"{n}.safetensors", GOOD[:-4], len(GOOD), "0" * 64, f'"{n}"') for n in range(2))
    headers = Headers(
        "model.safetensors.index.json",
        files,
        FileHeader("model.safetensors.index.json", b"{}", 2),
        "c" * 40,
        is_chosen=True,
    )
    data = headers.encode()
    assert Headers.decode(data) == headers
    for damaged in (data[:-1], data[1:], b"", b"[]\n", data.replace(b'"format":1', b'"format":2')):
        with pytest.raises(ManifestSyntaxError, match="cannot be read"):
            Headers.decode(damaged)


numbers = st.integers(0, 8) | st.sampled_from([-1, 1 << 63, 1 << 65, True, 4.0, "4", None])
few = st.integers(0, 4)
fields = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["U8", "U8", "BOOL", "F32", "BF16", "F64", "X", "f32", 1]),
        "shape": st.lists(few | numbers, max_size=3) | numbers,
        "data_offsets": st.tuples(few, few) | st.lists(numbers, max_size=3) | numbers,
    },
)


@st.composite
def almost_good(draw: st.DrawFn) -> bytes:
    """Return a file whose tensors follow each other, but for a change here and there."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.text(max_size=2), max_size=4, unique=True)):
        dtype, size = draw(st.sampled_from([("U8", 1), ("F32", 4), ("BF16", 2), ("BOOL", 1)]))
        shape = draw(st.lists(few, max_size=2))
        begin, end = end, end + size * int(np.prod(shape))
        header[name] = tensor(dtype, shape, begin, end)
        if draw(st.integers(0, 5)) == 0:
            header[name].update(draw(fields))
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.none() | st.dictionaries(st.text(max_size=2), st.text(max_size=2)) | numbers)
    data = bytes(max(0, end + draw(st.sampled_from([0, 0, 0, 0, -1, 1]))))
    text = bytearray(json.dumps(dict(draw(st.permutations(list(header.items()))))).encode())
    if draw(st.integers(0, 5)) == 0:
        text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
    return file_bytes(bytes(text), data, draw(st.none() | st.none() | st.integers(0, 200)))


@pytest.mark.once
@given(almost_good() | st.binary(max_size=40))
@thorough(2000)
def test_only_promised_errors_and_nothing_that_the_library_refuses(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "x.safetensors").write_bytes(data)
        with contextlib.suppress(ManifestError, UnsupportedDtypeError):
            assert sorted(ndcache.read_manifest(path)) == their_names(path)
