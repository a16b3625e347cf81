"""Manifests as values: selecting, looking up, comparing, and unknown dtypes and formats."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterable
from typing import Any

import pytest

from ndcache.errors import ManifestError, ManifestLayoutError, UnsupportedDtypeError, UnsupportedFormatError
from ndcache.format.manifest import Manifest, Shard
from ndcache.format.numpy_dtypes import DTYPES

from ..helpers.manifests import byte_record, check_refused, document, parse, parse_one, record, shard


@pytest.fixture
def manifest() -> Manifest:
    names = ["layers.0.q", "layers.0.k", "layers.1.q", "layers[1].q", "head*", "head", "Layers.0.q"]
    shards = [
        shard(*(byte_record(name, 8 * place, 8) for place, name in enumerate(names[first : first + 3])))
        | {"dataPath": f"params_shard_{first}.bin"}
        for first in range(0, len(names), 3)
    ]
    return parse(document(*shards))


def names_of(shards: Iterable[Shard]) -> list[str]:
    return [item.name for part in shards for item in part.records]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("layers.0.q", ["layers.0.q"]),
        ("layers.0.*", ["layers.0.q", "layers.0.k"]),
        ("layers.?.q", ["layers.0.q", "layers.1.q"]),
        ("layers.[01].q", ["layers.0.q", "layers.1.q"]),
        ("layers.[!0].q", ["layers.1.q"]),
        ("*.q", ["layers.0.q", "layers.1.q", "layers[1].q", "Layers.0.q"]),
        (["head", "layers.0.k"], ["layers.0.k", "head"]),
        (("head", "head", "h?ad"), ["head"]),
        ({"head": 1}.keys(), ["head"]),
        ({"head": slice(4)}, ["head"]),
        (iter(["head"]), ["head"]),
        ("layers[1].q", ["layers[1].q"]),  # the exact name; the pattern would match layers1.q
        ("head*", ["head*"]),
        (["head*", "head"], ["head*", "head"]),
        ("hea*", ["head*", "head"]),
        ("Layers.*", ["Layers.0.q"]),
        (lambda name: name.endswith("k"), ["layers.0.k"]),
        (lambda name: None, []),
        ([], []),
    ],
)
def test_select(manifest: Manifest, names: Any, expected: list[str]) -> None:
    assert names_of(manifest.select(names)) == expected


def test_select_everything(manifest: Manifest) -> None:
    assert manifest.select() == manifest.select(None) == manifest.select("*") == manifest.shards


def test_select_keeps_all_but_the_records(manifest: Manifest) -> None:
    (found,) = manifest.select("head")
    assert dataclasses.replace(found, records=()) == dataclasses.replace(manifest.shards[1], records=())
    assert found.records == (manifest["head"],)


@pytest.mark.parametrize("names", ["nothing", "", ["head", "nothing.*"], "HEAD", "layers.2.?", "layers.0"])
def test_select_refuses_names_that_match_nothing(manifest: Manifest, names: Any) -> None:
    with pytest.raises(KeyError, match=r"tensor-cache\.json"):
        manifest.select(names)


def test_select_lets_errors_of_the_predicate_through(manifest: Manifest) -> None:
    def predicate(name: str) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        manifest.select(predicate)


def test_lookup(manifest: Manifest) -> None:
    assert len(manifest) == 7
    assert list(manifest) == names_of(manifest.shards) == [item.name for item in manifest.records]
    assert "head" in manifest
    assert "tail" not in manifest
    assert manifest["head"].name == "head"
    with pytest.raises(KeyError):
        manifest["tail"]


def test_pickle_and_copy(manifest: Manifest) -> None:
    for other in (pickle.loads(pickle.dumps(manifest)), copy.deepcopy(manifest), copy.copy(manifest)):
        assert other == manifest
        assert hash(other) == hash(manifest)
        assert other["head"] == manifest["head"]
        assert other.name == manifest.name


def test_immutable(manifest: Manifest) -> None:
    part, item = manifest.shards[0], manifest["head"]
    for value, name in ((manifest, "shards"), (manifest, "metadata"), (part, "nbytes"), (item, "byte_offset")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
    with pytest.raises(TypeError):
        manifest.metadata["x"] = 1  # type: ignore[index]
    assert isinstance(part.records, tuple)
    assert isinstance(item.shape, tuple)


def test_metadata_is_a_copy() -> None:
    metadata = {"a": 1}
    manifest = Manifest(metadata, ())
    metadata["a"] = 2
    assert manifest.metadata == {"a": 1}


# --- row 24: dtypes and formats -----------------------------------------------------------------------

UNKNOWN: list[tuple[dict[str, Any], dict[str, Any], type[Exception]]] = [
    ({"dtype": "int4"}, {}, UnsupportedDtypeError),
    ({"dtype": ""}, {}, UnsupportedDtypeError),
    ({"dtype": "Float32"}, {}, UnsupportedDtypeError),
    ({"dtype": "float32 "}, {}, UnsupportedDtypeError),
    ({"dtype": "<f4"}, {}, UnsupportedDtypeError),
    ({"dtype": "object"}, {}, UnsupportedDtypeError),
    ({"dtype": "complex64"}, {}, UnsupportedDtypeError),
    ({"dtype": "float8_e4m3"}, {}, UnsupportedDtypeError),
    ({"dtype": "int4", "nbytes": 3, "format": "f32-to-bf16"}, {}, UnsupportedDtypeError),
    ({"format": "zstd"}, {}, UnsupportedFormatError),
    ({"format": "zstd", "nbytes": 5}, {}, UnsupportedFormatError),  # a compressed size
    ({"format": ""}, {}, UnsupportedFormatError),
    ({"format": "RAW"}, {}, UnsupportedFormatError),
    ({"format": "f32-to-bf16 "}, {}, UnsupportedFormatError),
    ({}, {"format": "zip-shard"}, UnsupportedFormatError),
    ({}, {"format": ""}, UnsupportedFormatError),
    ({}, {"format": "raw"}, UnsupportedFormatError),
]


@pytest.mark.parametrize(("of_record", "of_shard", "error"), UNKNOWN)
def test_row_24_unknown_dtypes_and_formats_are_refused_only_if_selected(
    of_record: dict[str, Any], of_shard: dict[str, Any], error: type[ManifestError]
) -> None:
    manifest = parse(
        document(
            shard(record("good")),
            shard(record("odd", **of_record), record("fine", byteOffset=32), dataPath="b", **of_shard),
        )
    )
    assert [item.data_path for item in manifest.select("good")] == ["params_shard_0.bin"]
    assert len(manifest.shards_with(None)) == 2
    if not of_shard:
        assert [item.name for part in manifest.select(["fine", "good"]) for item in part.records] == ["good", "fine"]
    for names in (None, "odd", ["good", "odd"], "*", lambda name: name == "odd"):
        with pytest.raises(error) as caught:
            manifest.select(names)
        assert type(caught.value) is error
        assert caught.value.shard == "b"
        assert of_shard or "'odd'" in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_known_dtype(dtype: str) -> None:
    nbytes = 6 * DTYPES[dtype].itemsize
    assert parse_one(dtype=dtype, nbytes=nbytes).stored_dtype == dtype
    check_refused(document(shard(record(dtype=dtype, nbytes=nbytes + 1))), ManifestLayoutError)
