"""Fields of untrusted JSON, each of exactly the type that it must have; how large a manifest may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ManifestSyntaxError

__all__ = [
    "MAX_MANIFEST_BYTES",
    "MAX_RECORDS",
    "MAX_SHARDS",
    "WEB_PAGE",
    "get_field",
    "has_surrogate",
    "json_type",
    "shown",
]

MAX_MANIFEST_BYTES = 64 << 20
MAX_RECORDS = 1 << 20
MAX_SHARDS = 1 << 16
#: The hint of an error about a file that turned out to be one.
WEB_PAGE = "It is a web page: check the URL, and whether it needs a login."


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
