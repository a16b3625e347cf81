"""Manifests for tests of the parser, and shortcuts to parse them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ndcache.errors import ManifestError
from ndcache.format.manifest import Manifest, Record
from ndcache.format.parse import parse_manifest


def record(name: Any = "w", **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "shape": [2, 3],
        "dtype": "float32",
        "format": "raw",
        "byteOffset": 0,
        "nbytes": 24,
        **fields,
    }


def shard(*records: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"dataPath": "params_shard_0.bin", "format": "raw-shard", "nbytes": 64, "records": list(records), **fields}


def document(*shards: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"metadata": {"ParamSize": 1}, "records": list(shards), **fields}


def parse(value: Any) -> Manifest:
    return parse_manifest(value if isinstance(value, bytes) else json.dumps(value).encode())


def parse_one(**fields: Any) -> Record:
    """Return the only record of a manifest."""
    (found,) = parse(document(shard(record(**fields)))).records
    return found


def without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name != key}


def with_path(path: str) -> bytes:
    return json.dumps(document(shard(record(), dataPath=path))).encode()


def check_refused(value: Any, error: type[ManifestError]) -> ManifestError:
    """Check that `value` is refused with exactly `error`, with a message that fits on a screen."""
    with pytest.raises(ManifestError) as caught:
        parse(value)
    assert type(caught.value) is error, caught.value
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()  # can be printed
    return caught.value


def byte_record(name: str, offset: int, nbytes: int) -> dict[str, Any]:
    return record(name, shape=[nbytes], dtype="uint8", byteOffset=offset, nbytes=nbytes)


#: A small manifest, in JSON.
GOOD = json.dumps(document(shard(record())))


def replaced(old: str, new: str) -> bytes:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new).encode()
