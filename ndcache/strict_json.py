"""Untrusted JSON → plain values, without anything that JSON's many readers understand in different ways.

No duplicate keys, no NaN, no infinities, no numbers or nesting without end, and within limits of memory.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

from .errors import ManifestLimitError, ManifestSyntaxError

__all__ = [
    "MAX_MANIFEST_BYTES",
    "MAX_RECORDS",
    "MAX_SHARDS",
    "get_field",
    "has_surrogate",
    "json_type",
    "parse_json",
    "shown",
]

MAX_MANIFEST_BYTES = 64 << 20
MAX_RECORDS = 1 << 20
MAX_SHARDS = 1 << 16
#: Objects or arrays in one manifest: one each a record, one each a shard, the rest for metadata.
_MAX_NODES = MAX_RECORDS + MAX_SHARDS + (1 << 16)
#: Commas in one manifest: six each a record are needed.
_MAX_COMMAS = 6 * _MAX_NODES
_MAX_DIGITS = 400  # of one number; float64 has no use for more
_DIGITS_ALONE = bytes(b"0 "[chr(byte) not in "0123456789"] for byte in range(256))
_TOO_LONG = b"0" * (_MAX_DIGITS + 1)  # perhaps in a string


def parse_json(data: bytes) -> Any:
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestLimitError(f"the manifest is larger than {MAX_MANIFEST_BYTES >> 20} MiB")
    # A parsed node takes some 20 times the memory of the two bytes it can be written in.
    if data.count(b"{") > _MAX_NODES or data.count(b"[") > _MAX_NODES or data.count(b",") > _MAX_COMMAS:
        raise ManifestLimitError(f"the manifest has more than {MAX_RECORDS} records, or as much of something else")
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            # Two passes over the bytes cost far less than a call for each number.
            parse_int=_integer if _TOO_LONG in data.translate(_DIGITS_ALONE) else None,
            parse_float=_number,
            parse_constant=_constant,
        )
    except UnicodeDecodeError as error:
        raise ManifestSyntaxError(
            "the manifest is not UTF-8", hint="Give the model's directory or its JSON manifest, not a shard."
        ) from error
    except json.JSONDecodeError as error:
        raise ManifestSyntaxError(f"the manifest is not JSON: {error}", hint=_what_it_is(data)) from error
    except RecursionError as error:
        raise ManifestSyntaxError("the manifest is nested too deeply") from error


def _what_it_is(data: bytes) -> str | None:
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "It is a web page: check the URL, and whether it needs a login."
    if start.startswith(b"version https://git-lfs"):
        return "It is a git-lfs pointer, not the file: fetch the file itself (git lfs pull)."
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ManifestSyntaxError(f"the manifest has the key {shown(key)} twice in one object")
    return value


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ManifestSyntaxError(f"the manifest has a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    if len(text) > _MAX_DIGITS:
        raise ManifestSyntaxError(f"the manifest has a number of {len(text)} digits")
    value = float(text)
    if math.isinf(value):
        raise ManifestSyntaxError(f"the manifest has the number {shown(text)}, which is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise ManifestSyntaxError(f"the manifest has {text}, which is not JSON")


def get_field(value: Mapping[str, Any], key: str, kind: type, where: str, default: Any = ...) -> Any:
    """``value[key]``, which must be exactly of `kind`: a bool is no int here."""
    item: Any = value.get(key, default)
    if item is ...:
        raise ManifestSyntaxError(f"{where} has no {key!r}")
    if type(item) is not kind and item is not default:
        raise ManifestSyntaxError(f"{key!r} of {where} is {json_type(item)}, not {_JSON_TYPES[kind]}")
    if kind is str and item is not default and has_surrogate(str(item)):
        raise ManifestSyntaxError(f"{key!r} of {where} is not Unicode text")
    return item


_JSON_TYPES: dict[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a fractional number",
    bool: "a boolean",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def json_type(value: Any) -> str:
    return _JSON_TYPES[type(value)]


def has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


def shown(text: str) -> str:
    """`text` for a message: quoted, escaped, and not of any length."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
