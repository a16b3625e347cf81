"""Warnings that point to the caller's line."""

from __future__ import annotations

import sys
import warnings
from typing import Any

__all__ = ["warn_caller"]


def warn_caller(message: str) -> None:
    """Issue a `RuntimeWarning` for the line that called ndcache."""
    warnings.warn(message, RuntimeWarning, stacklevel=_depth_below_caller())


def _depth_below_caller() -> int:
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and (_is_ours(frame.f_globals) or frame.f_globals.get("__name__") == "contextlib"):
        depth, frame = depth + 1, frame.f_back
    return depth


def _is_ours(module: dict[str, Any]) -> bool:
    return (module.get("__package__") or "").partition(".")[0] == "ndcache"
