"""The former place of `ndcache.location`, for scripts that import from here."""

from __future__ import annotations

from .location import Location, locate, remote_location

__all__ = ["Location", "locate", "remote_location"]
