"""From any bytes, the parser returns a consistent manifest or raises one of its errors."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ndcache.errors import (
    ManifestLayoutError,
    ManifestLimitError,
    ManifestSyntaxError,
    UnsafePathError,
    UnsupportedDtypeError,
    UnsupportedFormatError,
)
from ndcache.format import json_reader
from ndcache.format import parse as parse_module
from ndcache.format.manifest import Manifest
from ndcache.format.numpy_dtypes import DTYPES
from ndcache.format.parse import parse_manifest
from ndcache.format.paths import STATE_DIRECTORY, check_path

from ..helpers.manifests import byte_record, document, parse, record, shard
from .test_paths import UNSAFE_PATHS


def thorough(ci: int, default: int = 100) -> settings:
    """Try a property `ci` times with HYPOTHESIS_PROFILE=ci: over 20,000 times for the whole parser."""
    return settings(
        max_examples=ci if os.environ.get("HYPOTHESIS_PROFILE") == "ci" else default,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


def check_invariants(manifest: Manifest) -> None:
    names, files = set(), set()
    base = Path("/srv/model")
    for part in manifest.shards:
        check_path(part.data_path)
        for path in (part.data_path, unquote(part.data_path), unquote(unquote(part.data_path))):
            inside = Path(os.path.normpath(base.joinpath(*path.split("/"))))
            assert base in inside.parents
            assert STATE_DIRECTORY not in (parent.lower() for parent in inside.parts)
            assert "\\" not in path
            assert path.isprintable() or not path.isascii()
        files.add(part.data_path.lower())
        assert 0 <= part.nbytes < 1 << 63
        end = 0
        for item in sorted(part.records, key=lambda item: (item.byte_offset, item.nbytes)):
            assert item.name not in names
            names.add(item.name)
            assert 0 <= item.byte_offset <= item.byte_offset + item.nbytes <= part.nbytes
            assert item.nbytes == 0 or item.byte_offset >= end
            end = max(end, item.byte_offset + item.nbytes)
            assert all(type(size) is int and size >= 0 for size in item.shape)
            if item.stored_dtype in DTYPES and item.format in ("raw", "f32-to-bf16"):
                assert math.prod(item.shape) * DTYPES[item.stored_dtype].itemsize == item.nbytes
    assert len(files) == len(manifest.shards)
    assert len(names) == len(manifest) == len(list(manifest.records))
    assert manifest.nbytes < 1 << 63
    repr(manifest).encode()
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    try:
        manifest.select()
    except (UnsupportedDtypeError, UnsupportedFormatError) as error:
        str(error).encode()


def outcome(data: bytes) -> Manifest | tuple[type[Exception], str]:
    """Return the manifest, or one of the four errors as its class and message."""
    try:
        return parse_manifest(data)
    except (ManifestSyntaxError, ManifestLayoutError, ManifestLimitError, UnsafePathError) as error:
        str(error).encode()
        return type(error), str(error)


def check_parsed_or_refused(data: bytes) -> None:
    """Check that `data` gives a good manifest or an error, the same whether records are read together or alone."""
    for window in (1 << 20, 128):
        with mock.patch.multiple(json_reader, _WINDOW_BYTES=window, _LEAST_WINDOW_BYTES=window):
            found = outcome(data)
            if isinstance(found, Manifest):
                check_invariants(found)
            with (
                mock.patch.object(json_reader.JsonReader, "_next_elements", return_value=[]),
                mock.patch.object(parse_module, "_record_fields", {}.__getitem__),
                mock.patch.object(parse_module, "_usual_end", return_value=None),
            ):
                assert outcome(data) == found


integers = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, 10**399, -(1 << 63)]),
    st.integers(),
)
texts = st.one_of(
    st.text(st.characters(), max_size=12),  # including surrogates
    st.sampled_from([*UNSAFE_PATHS[:90], "a", "A", "a/b", "\u00e9", "e\u0301", "w", "x.bin", "%41"]),
    st.sampled_from([*DTYPES, "int4", "e4m3_float8", "raw", "f32-to-bf16", "raw-shard", "0" * 32]),
)
scalars = st.one_of(st.none(), st.booleans(), integers, st.floats(), texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=5,
)
keys = st.sampled_from(
    ["metadata", "records", "dataPath", "format", "nbytes", "md5sum", "name", "shape", "dtype", "byteOffset"]
)

real_records = st.builds(
    lambda name, shape, dtype, form, offset, wrong: record(
        name,
        shape=shape,
        dtype=dtype,
        format=form,
        byteOffset=offset,
        nbytes=math.prod(shape)
        * (2 if (dtype, form) == ("float32", "f32-to-bf16") else DTYPES[dtype].itemsize if dtype in DTYPES else 1)
        + wrong,
    ),
    texts,
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([*DTYPES, "int4", "float32", "float32"]),
    st.sampled_from(["raw", "raw", "f32-to-bf16", "zip"]),
    st.integers(0, 30),
    st.sampled_from([0] * 12 + [1, -1]),
)
real_shards = st.builds(
    lambda path, records, nbytes, form: shard(*records, dataPath=path, nbytes=nbytes, format=form),
    st.one_of(st.sampled_from(["a.bin", "b.bin", "c/d.bin", "c/e.bin", "c"]), texts),
    st.lists(real_records, max_size=3),
    st.integers(30, 300),
    st.sampled_from(["raw-shard", "raw-shard", "zip"]),
)
real_documents = st.builds(
    lambda shards, metadata: document(*shards, metadata=metadata),
    st.lists(real_shards, max_size=3),
    st.dictionaries(texts, scalars, max_size=2),
)


def encode(value: Any) -> bytes:
    return json.dumps(value).encode()


@thorough(9000)
@given(st.binary(max_size=200))
def test_row_21_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    check_parsed_or_refused(data)


@thorough(600, default=100)
@given(st.one_of(values, st.fixed_dictionaries({"records": st.lists(st.dictionaries(keys, values, max_size=5))})))
def test_row_21_any_json_is_parsed_or_refused(value: Any) -> None:
    check_parsed_or_refused(encode(value))


@thorough(2000)
@given(real_documents)
def test_row_21_likely_manifests_are_parsed_or_refused(value: Any) -> None:
    check_parsed_or_refused(encode(value))


@thorough(3000)
@given(st.data())
def test_row_21_a_manifest_with_changed_fields_is_parsed_or_refused(data: st.DataObject) -> None:
    value = copy.deepcopy(_REAL)
    places: list[tuple[Any, Any]] = [(value, key) for key in value]
    for part in value["records"]:
        places += [(part, key) for key in part]
        places += [(item, key) for item in part["records"] for key in item]
        places += [(item["shape"], 0) for item in part["records"] if item["shape"]]
    for _ in range(data.draw(st.integers(1, 2))):
        holder, key = data.draw(st.sampled_from(places))
        if data.draw(st.integers(0, 4)) == 0:
            holder.pop(key, None) if isinstance(holder, dict) else holder.clear()
        else:
            odd = data.draw(st.one_of(scalars, values))
            if isinstance(holder, dict):
                holder[key] = odd
            else:
                holder[:1] = [odd]
    check_parsed_or_refused(encode(value))


@thorough(6000)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1 << 16),
            st.integers(0, 12),
            st.one_of(
                st.binary(max_size=6),
                st.sampled_from(
                    [b"", b"-", b"0", b"e9", b".", b"NaN", b"\\ud800", b"\\u0000", b"[", b"]", b"{", b"}", b",", b'"']
                ),
            ),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_row_21_a_manifest_with_spliced_bytes_is_parsed_or_refused(cuts: list[tuple[int, int, bytes]]) -> None:
    data = _REAL_BYTES
    for place, length, new in cuts:
        start = place % (len(data) + 1)
        data = data[:start] + new + data[start + length :]
    check_parsed_or_refused(data)


@thorough(3000)
@given(texts)
def test_row_20_any_path_is_safe_or_refused(path: str) -> None:
    refused: UnsafePathError | None = None
    try:
        check_path(path)
    except UnsafePathError as error:
        refused = error
    if refused is not None:
        assert str(refused).isprintable()
    else:
        check_invariants(parse(document(shard(dataPath="sub/" + path if path.endswith(".json") else path))))


_REAL = document(
    shard(record("model.embed", format="f32-to-bf16", nbytes=12), byte_record("q", 13, 5), md5sum="0" * 32),
    shard(
        record("scale", shape=[], dtype="float16", format="f32-to-bf16", nbytes=2),
        record("empty", shape=[0, 4], nbytes=0, byteOffset=64),
        record("f8", dtype="e4m3_float8", nbytes=6, byteOffset=3),
        dataPath="sub/params_shard_1.bin",
    ),
)
_REAL_BYTES = encode(_REAL)


def test_the_manifest_that_these_tests_change_is_good() -> None:
    check_invariants(parse(_REAL_BYTES))
    assert len(parse(_REAL_BYTES)) == 5
