"""Sizes, rates and durations as people write them: ``50GB``, ``10MB/s``, ``30d``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import timedelta

__all__ = ["parse_duration", "parse_rate", "parse_size"]

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", re.ASCII)
_SIZES = {"": 1, "b": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgtp", 1)
    for unit, base in ((letter, 1000), (f"{letter}b", 1000), (f"{letter}i", 1024), (f"{letter}ib", 1024))
}
_SECONDS = {
    name: seconds
    for seconds, *names in (
        (1, "s", "sec", "second", "seconds"),
        (60, "m", "min", "minute", "minutes"),
        (3600, "h", "hour", "hours"),
        (86400, "d", "day", "days"),
        (7 * 86400, "w", "week", "weeks"),
        (365 * 86400, "y", "year", "years"),
    )
    for name in names
}


def parse_size(value: int | float | str) -> int:
    """Return a number of bytes.

    Parameters
    ----------
    value : int, float or str
        ``"50GB"`` is 50 · 10⁹ bytes and ``"50GiB"`` 50 · 2³⁰. A number without a unit is one of bytes.

    Raises
    ------
    ValueError, TypeError
        It is no size, or negative.
    """
    if not isinstance(value, (int, float, str)):
        raise TypeError(f"a size must be a number of bytes or a text such as '50GB', not {value!r}")
    nbytes = _multiply(value, _SIZES) if isinstance(value, str) else value
    if nbytes is None:
        raise ValueError(f"{value!r} is no size: write 50GB, 1.5TiB, or a number of bytes")
    if not 0 <= nbytes < math.inf:
        raise ValueError(f"{value!r} is no size")
    return int(nbytes)


def parse_duration(value: timedelta | int | float | str) -> float:
    """Return a number of seconds.

    Parameters
    ----------
    value : datetime.timedelta, int, float or str
        ``"30d"``, ``"12h"``, ``"90m"``, ``"45s"``, ``"2 weeks"``, ``"1y"`` or ``"0"``. A number that is not a text has
        the unit seconds.

    Raises
    ------
    ValueError, TypeError
        It is no duration, or negative.
    """
    if not isinstance(value, (timedelta, int, float, str)):
        raise TypeError(f"a duration must be a timedelta, a number of seconds or a text such as '30d', not {value!r}")
    if isinstance(value, timedelta):
        value = value.total_seconds()
    seconds = _multiply(value, _SECONDS) if isinstance(value, str) else value
    if seconds is None:
        raise ValueError(f"{value!r} is no duration: write 30d, 12h, 90m or 45s")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{value!r} is no duration")
    return float(seconds)


def parse_rate(value: int | float | str) -> float:
    """Return a number of bytes per second.

    Parameters
    ----------
    value : int, float or str
        ``"10MB/s"``, ``"500kB/s"``, ``"1.5MiB"``. A number without a unit is one of bytes per second.

    Raises
    ------
    ValueError
        It is no rate, or not positive.
    """
    rate = _multiply(value.strip().removesuffix("/s"), _SIZES) if isinstance(value, str) else value
    if rate is None or not 0 < rate < math.inf:
        raise ValueError(f"{value!r} is no rate: write 10MB/s, 500kB/s, or a number of bytes per second")
    return float(rate)


def _multiply(text: str, units: Mapping[str, int]) -> float | None:
    """Return the number that a text begins with, times the unit that follows; None if it has another form."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    number, unit = float(match[1]), units.get(match[2].lower())
    if unit is None and not match[2] and number == 0:
        return 0.0  # is the same in all units
    return None if unit is None else number * unit
