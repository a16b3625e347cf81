"""Check the types of arguments, so that a wrong one is named at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

__all__ = ["as_texts", "check_flags", "check_mapping", "check_path", "check_positive", "is_url"]


def check_flags(**flags: object) -> None:
    """Raise a TypeError that names the first argument that is not True or False, if there is one."""
    for name, value in flags.items():
        if value is not True and value is not False:
            more = "; NumPy or PyTorch converts the loaded tensors" if name == "decode" else ""
            raise TypeError(f"{name} must be True or False, not {value!r}{more}")


def check_path(name: str, value: object, *, may_be_none: bool = False) -> None:
    """Raise a TypeError or a ValueError if an argument is not a path on this machine."""
    if not (isinstance(value, (str, os.PathLike)) or (value is None and may_be_none)):
        raise TypeError(f"{name} must be a path{' or None' if may_be_none else ''}, not {value!r}")
    if value == "":  # as from a variable that is not set: the working directory would be meant
        raise ValueError(f"{name} is empty")
    if is_url(value):
        raise ValueError(f"{name} must be a path on this machine, not {value!r}")


def is_url(value: object) -> bool:
    """Return whether an argument is a text that begins as a URL does."""
    return isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", value) is not None


def as_texts(name: str, value: object) -> tuple[str, ...]:
    """Return an argument that is a text, or several ones; raise a TypeError if it is neither."""
    texts = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if isinstance(value, bytes) or not all(isinstance(each, str) for each in texts):
        raise TypeError(f"{name} must be a text or several texts, not {value!r}")
    return texts


def check_positive(name: str, value: object, noun: str) -> None:
    """Raise a TypeError or a ValueError if an argument is not a whole number of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a number of {noun}, not {value!r}")
    if value.__index__() < 1:
        raise ValueError(f"{name} must be a positive number of {noun}, not {value!r}")


def check_mapping(name: str, value: object) -> None:
    """Raise a TypeError if an argument is not a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, not {type(value).__name__}")
