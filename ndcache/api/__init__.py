"""The functions `load`, `stream` and `fetch`, which use a `Loader` of their own."""

from __future__ import annotations

from .fetching import fetch
from .loading import load
from .streaming import stream

__all__ = ["fetch", "load", "stream"]
