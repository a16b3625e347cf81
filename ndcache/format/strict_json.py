"""Typed fields of untrusted JSON, and limits for the size of a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, overload

from ..errors import ManifestSyntaxError

__all__ = [
    "MAX_KEPT_BYTES",
    "MAX_MANIFEST_BYTES",
    "MAX_RECORDS",
    "MAX_SHARDS",
    "WEB_PAGE_HINT",
    "get_field",
    "has_surrogate",
    "json_type",
    "quote",
]

T = TypeVar("T")
D = TypeVar("D")

MAX_MANIFEST_BYTES = 64 << 20
#: The limit of what the cache keeps of a model: a manifest, or headers with what the server said of their files.
MAX_KEPT_BYTES = MAX_MANIFEST_BYTES + (16 << 20)
MAX_RECORDS = 1 << 20
MAX_SHARDS = 1 << 16
#: The hint of an error about a file that is a web page.
WEB_PAGE_HINT = "It is a web page: check the URL, and whether it needs a login."


@overload
def get_field(value: Mapping[str, Any], key: str, kind: type[T], where: str) -> T: ...
@overload
def get_field(value: Mapping[str, Any], key: str, kind: type[T], where: str, default: D) -> T | D: ...
def get_field(value: Mapping[str, Any], key: str, kind: type, where: str, default: Any = ...) -> Any:
    """Return ``value[key]``, and raise unless its type is exactly `kind`: a bool is not an int here."""
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
    """Return the name of a value's JSON type, with its article."""
    return _JSON_TYPES[type(value)]


def has_surrogate(text: str) -> bool:
    """Return whether a text has surrogates, which make it invalid as Unicode text."""
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


def quote(text: str) -> str:
    """Return `text` for a message: quoted, escaped, and shortened."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
