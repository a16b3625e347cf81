"""Numbers in words."""

from __future__ import annotations

import pytest

from ndcache.report.words import format_rate, format_speed

_MIB = 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "seconds", "text"),
    [
        (0, 0, "–"),
        (0, 1, "0 B/s"),
        (300, 2, "150 B/s"),
        (42 << 10, 1, "42.0 KiB/s"),  # not 0.0 MiB/s while bytes come
        (_MIB, 1, "1.0 MiB/s"),
        (3 << 30, 2, "1,536.0 MiB/s"),
    ],
)
def test_a_rate(nbytes: int, seconds: float, text: str) -> None:
    assert format_rate(nbytes, seconds) == text


@pytest.mark.parametrize(
    ("how", "text"), [("", "8.0 MiB/s"), ("Loaded", "8.0 MiB/s"), ("Mapped", "mapped"), ("Cached", "cached")]
)
def test_what_was_not_read_has_no_rate(how: str, text: str) -> None:
    assert format_speed(how, 4 * _MIB, 0.5) == text
