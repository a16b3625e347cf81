"""Count the bytes of files on disk: those with several names count once."""

from __future__ import annotations

import contextlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

__all__ = ["Balance", "DiskUse", "FileId", "disk_bytes", "disk_use"]

#: A file, whatever its names: its device and inode number.
FileId: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class LinkedFile:
    """A file with several names.

    Attributes
    ----------
    nbytes : int
        Its bytes on disk.
    names : int
        How many names it has in the directory.
    links : int
        How many it has anywhere.
    """

    nbytes: int
    names: int
    links: int


@dataclass(frozen=True)
class DiskUse:
    """The files below a directory.

    Attributes
    ----------
    own : int
        Bytes on disk of the files with one name.
    linked : mapping
        The other files.
    """

    own: int = 0
    linked: Mapping[FileId, LinkedFile] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Return the bytes on disk of all files, each counted once."""
        return self.own + sum(file.nbytes for file in self.linked.values())

    def without(self, part: DiskUse) -> DiskUse:
        """Return the rest after a folder in the directory was removed."""
        linked = dict(self.linked)
        for file, removed in part.linked.items():
            if file in linked:
                linked[file] = replace(linked[file], names=linked[file].names - removed.names)
        return DiskUse(max(0, self.own - part.own), linked)


def disk_use(directory: Path) -> DiskUse:
    """Return the files below a directory."""
    own, linked = 0, dict[FileId, LinkedFile]()
    for status in _files(directory):
        nbytes, links = _on_disk(status), status.st_nlink
        if links <= 1:  # some file systems give all files the same inode number
            own += nbytes
            continue
        file = status.st_dev, status.st_ino
        names = linked[file].names if file in linked else 0
        linked[file] = LinkedFile(nbytes, names + 1, links)
    return DiskUse(own, linked)


def disk_bytes(directory: Path) -> int:
    """Return how many bytes the files below a directory take on disk."""
    return disk_use(directory).nbytes


class Balance:
    """Count the bytes of some directories, and those that become free as they are removed, one after the other.

    A file that has names elsewhere stays until the last of them is removed.

    Attributes
    ----------
    size : int
        The bytes of the directories that are left; those that several of them share count once.
    freed : int
        The bytes that have become free.
    """

    def __init__(self, uses: Iterable[DiskUse]) -> None:
        self.size = self.freed = 0
        self._names, self._removed = Counter[FileId](), Counter[FileId]()
        for use in uses:
            self.size += use.own
            for file, linked in use.linked.items():
                self.size += 0 if self._names[file] else linked.nbytes
                self._names[file] += linked.names

    def remove(self, use: DiskUse, *, frees: bool = True) -> int:
        """Count one more directory, or folder in one, as removed; return the bytes that frees.

        With `frees` False, somebody else has removed it, and its bytes count as theirs.
        """
        freed = use.own
        self.size -= use.own
        for file, linked in use.linked.items():
            self._names[file] -= linked.names
            self._removed[file] += linked.names
            if not self._names[file]:
                self.size -= linked.nbytes
                freed += linked.nbytes if self._removed[file] >= linked.links else 0
        self.freed += freed if frees else 0
        return freed

    def remove_part(self, nbytes: int) -> None:
        """Count so many bytes as removed, of a directory that could not be removed whole."""
        self.size -= nbytes
        self.freed += nbytes


def _files(directory: Path) -> Iterator[os.stat_result]:
    """Yield the status of each regular file below a directory."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(folder, name))
                if stat.S_ISREG(status.st_mode):
                    yield status


def _on_disk(status: os.stat_result) -> int:
    # Fewer bytes if it has holes; not every system reports them.
    return min(status.st_size, 512 * getattr(status, "st_blocks", 0) or status.st_size)
