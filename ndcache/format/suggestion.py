"""A suggestion for a name or pattern of tensors that matches none."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection

__all__ = ["suggest"]

_SPECIAL = frozenset("*?[")
#: A text is compared with so many names at most: that takes up to a second.
_MAX_COMPARED = 20_000


def suggest(pattern: str, names: Collection[str], *, may_be_pattern: bool = True) -> str:
    """Return words that suggest a name or pattern, such as ``"; did you mean 'layers.*' (24 tensors)?"``, or none.

    Parameters
    ----------
    pattern : str
        The text that matches no name.
    names : collection of str
        The names of all tensors.
    may_be_pattern : bool, default True
        Whether to suggest patterns, too, and not only names.
    """
    found = _wider_pattern(pattern, names) if may_be_pattern else None
    if found is None:
        compared = set(itertools.islice(names, _MAX_COMPARED))
        if may_be_pattern:
            compared |= {f"{prefix}.*" for prefix in _prefixes(compared)}
        close = difflib.get_close_matches(pattern, compared, n=1)
        if not close:
            return ""
        found = close[0]
    number = _count(found, names)
    return f"; did you mean {found!r}{f' ({number:,} tensors)' if number > 1 else ''}?"


def _wider_pattern(text: str, names: Collection[str]) -> str | None:
    """Return a pattern for the names that begin with, end with or contain a text; None if there are none."""
    if not text or _SPECIAL & set(text):
        return None
    stem = text.rstrip(".")
    patterns = (f"{stem}.*", f"{text}*", f"*.{text.lstrip('.')}", f"*.{text.strip('.')}.*", f"*{text}*")
    return next((pattern for pattern in patterns if _count(pattern, names)), None)


def _prefixes(names: Collection[str]) -> set[str]:
    """Return the parts of names that end before a dot."""
    found: set[str] = set()
    for name in names:
        prefix = name.rpartition(".")[0]
        while prefix and not _SPECIAL & set(prefix) and prefix not in found:
            found.add(prefix)
            prefix = prefix.rpartition(".")[0]
    return found


def _count(pattern: str, names: Collection[str]) -> int:
    """Return how many names a name matches, or a pattern with ``*`` only at its ends."""
    begins, ends, text = pattern.endswith("*"), pattern.startswith("*"), pattern.strip("*")
    if begins and ends:
        return sum(text in name for name in names)
    if begins or ends:
        return sum(name.startswith(text) if begins else name.endswith(text) for name in names)
    return int(pattern in names)
