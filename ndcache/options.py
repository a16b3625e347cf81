"""The options of a loader: their types, and what is said of mistakes in them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import requests

from .http.retry import RetryPolicy

__all__ = ["Options", "check_options"]


class Options(TypedDict, total=False):
    """The keyword arguments of `Loader`."""

    max_workers: int
    cache_dir: str | os.PathLike[str] | None
    scope: str
    timeout: float | tuple[float, float]
    retries: int | RetryPolicy
    verify: Literal["download", "always", "never"]
    offline: bool
    session: requests.Session | None
    mirrors: Sequence[str]
    integrity: Mapping[str, str] | None
    memory_limit: int
    cancel: threading.Event | None


def check_options(options: Mapping[str, Any]) -> None:
    """Find mistakes at the start, rather than on the way at the first failure.

    Raises
    ------
    TypeError, ValueError
        An option is of another type than it must be, or has a value that it must not have.
    """
    for name, (types, what, is_right) in _CHECKS.items():
        value = options[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeError(f"{name} is {what}, not {value!r}")
        if not is_right(value):
            raise ValueError(f"{name} is {what}, not {value!r}")


def _are_seconds(value: Any) -> bool:
    both = value if isinstance(value, tuple) else (value, value)
    return len(both) == 2 and all(isinstance(part, (int, float)) and 0 < part < math.inf for part in both)


_NONE = type(None)
#: Of each option: the types that it may have, what it is in words, and whether a value is that.
_CHECKS: dict[str, tuple[tuple[type, ...], str, Callable[[Any], bool]]] = {
    "max_workers": ((int,), "a number of at least 1", lambda value: value >= 1),
    "cache_dir": ((str, os.PathLike, _NONE), "a path or None", lambda value: value != ""),
    "scope": ((str,), "a name that does not begin with a dot", lambda value: value[:1] not in ("", ".")),
    "timeout": ((int, float, tuple), "seconds, or (seconds to connect, seconds to wait for bytes)", _are_seconds),
    "retries": (
        (int, RetryPolicy),
        "a number of at least 0, or a RetryPolicy",
        lambda value: isinstance(value, RetryPolicy) or value >= 0,
    ),
    "verify": ((str,), "'download', 'always' or 'never'", lambda value: value in ("download", "always", "never")),
    "offline": ((bool,), "True or False", lambda value: True),
    "session": ((requests.Session, _NONE), "a requests.Session", lambda value: True),
    "integrity": (
        (Mapping, _NONE),
        "a mapping from file names to digests such as 'sha256-…'",
        lambda value: all(isinstance(item, str) for pair in (value or {}).items() for item in pair),
    ),
    "memory_limit": ((int,), "a positive number of bytes", lambda value: value > 0),
    "cancel": ((object,), "a threading.Event", lambda value: value is None or callable(getattr(value, "is_set", None))),
}
