"""Put sizes, numbers and checks into words."""

from __future__ import annotations

from ...report.words import format_checks, format_count, format_size

__all__ = ["format_checks", "format_count", "format_size"]
