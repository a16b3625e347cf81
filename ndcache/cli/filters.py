"""The filters and orders of ``ndcache ls``: ``size>1GB``, ``used>30d``, ``partial``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, TypeAlias

from ..store.housekeeping.listing import CachedModel
from ..store.housekeeping.quantities import parse_duration, parse_size

__all__ = ["SORT_KEYS", "Filter", "has_form_of_filter", "parse_filter"]

#: Tells whether a model is listed.
Filter: TypeAlias = Callable[[CachedModel], bool]

_COMPARISON = re.compile(r"\s*(?P<name>\w*)\s*(?P<sign>[<>]=?|==?)\s*(?P<value>.*)", re.DOTALL)
_FORMS = "size>1GB, used>30d, age<2w, partial, complete or in-use"
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "==": operator.eq,
}
_WORDS: dict[str, Filter] = {
    "complete": lambda model: model.complete,
    "partial": lambda model: model.is_partial,
    "in-use": lambda model: model.in_use,
}

#: How to sort: the largest, the one used last, and the youngest first.
SORT_KEYS: dict[str, Callable[[CachedModel], Any]] = {
    "source": lambda model: (model.source, model.scope),
    "size": lambda model: -model.size,
    "used": lambda model: -model.last_used.timestamp(),
    "age": lambda model: -model.created.timestamp(),
    "state": lambda model: (model.complete, model.state),
}


def has_form_of_filter(text: str) -> bool:
    """Return whether a text can only be meant as a filter, and not as a source: URLs have neither ``<`` nor ``>``."""
    return text.strip().lower() in _WORDS or "<" in text or ">" in text or _compares_known(text) is not None


def parse_filter(text: str) -> Filter:
    """Return the filter that a text describes.

    Raises
    ------
    ValueError
        It is no filter; the message says where it goes wrong.
    """
    if (word := _WORDS.get(text.strip().lower())) is not None:
        return word
    if (match := _compares_known(text)) is None:
        start = len(text) - len(text.lstrip()) + 1
        raise ValueError(f"{text!r} is no filter, at character {start}: write {_FORMS}")
    name, compare, value = match["name"].lower(), _OPERATORS[match["sign"]], match["value"]
    try:
        limit = parse_size(value) if name == "size" else parse_duration(value)
    except ValueError as error:
        raise ValueError(f"in {text!r}, at character {match.start('value') + 1}: {error}") from error
    return lambda model: compare(_value(model, name), limit)


def _compares_known(text: str) -> re.Match[str] | None:
    match = _COMPARISON.fullmatch(text)
    return match if match is not None and match["name"].lower() in ("size", "used", "age") else None


def _value(model: CachedModel, name: str) -> float:
    """Return a model's size in bytes; or the seconds since it was used, or since it came to the cache."""
    if name == "size":
        return model.size
    since = model.last_used if name == "used" else model.created
    return (datetime.now(timezone.utc) - since).total_seconds()
