"""Where a model is: a URL, a Hugging Face repository or a directory."""

from __future__ import annotations

from .resolve import MANIFEST_NAMES, Location, locate, locate_mirror, remote_location

__all__ = ["MANIFEST_NAMES", "Location", "locate", "locate_mirror", "remote_location"]
