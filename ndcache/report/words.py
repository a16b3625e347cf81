"""Numbers in words: sizes, rates, times and counts."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["format_checks", "format_count", "format_rate", "format_seconds", "format_size", "format_speed"]


def format_size(nbytes: float) -> str:
    """Return a number of bytes as text: ``"1.5 MiB"``."""
    if nbytes < 1 << 10:
        return f"{nbytes:.0f} B"
    unit, name = next((unit, name) for unit, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if nbytes >= 1 << unit)
    return f"{nbytes / (1 << unit):,.1f} {name}"


def format_rate(nbytes: float, seconds: float) -> str:
    """Return bytes per time as text: ``"165.2 MiB/s"``, ``"42.0 KiB/s"``; a dash if no time has passed."""
    if seconds <= 0:
        return "–"
    rate = nbytes / seconds
    # No larger unit, so that rates can be compared at a glance.
    return f"{rate / (1 << 20):,.1f} MiB/s" if rate >= 1 << 20 else f"{format_size(rate)}/s"


def format_speed(how: str, nbytes: float, seconds: float) -> str:
    """Return the rate of a load as text, or why there is none; `how` is that of `progress.Summary`.

    Files that were mapped, or only found in the cache, were not read, so their rate would be absurd.
    """
    return {"Mapped": "mapped", "Cached": "cached"}.get(how) or format_rate(nbytes, seconds)


def format_seconds(seconds: float) -> str:
    """Return a time as text, with up to three digits: ``"12 ms"``, ``"6.2 s"``, ``"2 min 5 s"``."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms" if seconds >= 0.0005 or not seconds else "under 1 ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest} s"


def format_count(number: int, noun: str) -> str:
    """Return a number of things as text: ``"1 shard"``, ``"2 shards"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_checks(checks: Mapping[str, int]) -> str:
    """Return how many shards passed each check as text, the most frequent first: ``"3 by md5, 1 by size alone"``."""
    ordered = sorted(checks.items(), key=lambda item: -item[1])
    words = [f"{number:,} by {'size alone' if check == 'size' else check}" for check, number in ordered]
    return ", ".join(words) or "nothing"
