"""The location of a model: a URL, a Hugging Face repository or a directory."""

from __future__ import annotations

from .resolve import (
    MANIFEST_NAMES,
    NDARRAY_CACHE_NAMES,
    Location,
    cached_location,
    locate,
    locate_mirror,
    remote_location,
)

__all__ = [
    "MANIFEST_NAMES",
    "NDARRAY_CACHE_NAMES",
    "Location",
    "cached_location",
    "locate",
    "locate_mirror",
    "remote_location",
]
