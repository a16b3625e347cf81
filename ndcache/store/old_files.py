"""Files that a load wants anew although they are cached."""

from __future__ import annotations

from .layout import Layout

__all__ = ["OldFiles"]


class OldFiles:
    """The files of a directory that count as missing until they are published anew. By default there are none.

    A file is old if it was there when it was looked up first.

    Parameters
    ----------
    layout : Layout, optional
        The directory's folders.
    versions : dict of str to list of int, optional
        The versions that another process has found.

    Attributes
    ----------
    versions : dict of str to list of int
        The size and the time of each old file, and an empty list for one that was not there.
    """

    def __init__(self, layout: Layout | None = None, versions: dict[str, list[int]] | None = None) -> None:
        self.versions = versions or {}
        self._layout = layout

    def has(self, name: str) -> bool:
        """Return whether the file that has this name now is an old one."""
        if self._layout is None:
            return False
        status = self._layout.status(name)
        version = [] if status is None else [status.st_size, status.st_mtime_ns]
        return self.versions.setdefault(name, version) == version != []
