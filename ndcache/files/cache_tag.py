"""Mark the cache as a directory that backups can leave out: https://bford.info/cachedir/."""

from __future__ import annotations

import contextlib
import os
import re

from .folder import Folder

__all__ = ["may_tag", "write_tag"]

_NAME = "CACHEDIR.TAG"
_TEXT = b"""Signature: 8a477f597d28d172789f06886806bc55
# This directory is a cache of ndcache. What is in it can be downloaded again, so backups can leave it out.
"""


def may_tag(root: Folder, own: re.Pattern[str]) -> bool:
    """Return whether a cache's directory, to which a model will be added, is to be marked, and is not yet.

    The directory of the user's choice may have other things in it, which backups must not leave out: anything but the
    names that `own` matches.
    """
    entries = root.entries()
    return _NAME not in entries and (root.is_private or all(map(own.fullmatch, entries)))


def write_tag(root: Folder) -> None:
    """Mark the cache's directory, if that is possible."""
    with contextlib.suppress(OSError):
        handle = root.create(_NAME)
        try:
            os.write(handle, _TEXT)
        finally:
            os.close(handle)
