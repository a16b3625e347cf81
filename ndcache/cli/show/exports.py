"""Reports of conversions in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...export.conversion import ConvertReport
from ...report.words import format_count, format_size
from ...urls.redact import printable

__all__ = ["convert_lines", "halved_lines"]


def convert_lines(report: ConvertReport) -> Iterator[str]:
    """Yield lines that say what was written, and which tensors lost bits."""
    yield f"{printable(str(report.path))}: {format_count(len(report.tensors), 'tensor')}, {format_size(report.nbytes)}"
    yield from halved_lines(report.halved)


def halved_lines(names: Sequence[str]) -> Iterator[str]:
    """Yield a line that says which tensors lost bits, if some did."""
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        yield f"float32 became bfloat16 in {format_count(len(names), 'tensor')}: {printable(shown)}"
