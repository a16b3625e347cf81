"""Files that are being written: private to their writers, and of use to whoever comes after.

A part is opened with ``O_EXCL`` under a random name, so that nobody else writes to it, ever, and all of its bytes come
from one version of one file on one server. A note beside it says which. A writer that is interrupted leaves both
behind; the next one copies the bytes into a part of its own, and goes on from there if the server still has that
version.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .digests import feed, new_digest
from .errors import TransferError
from .small_files import NO_LINKS, read_note

__all__ = ["Origin", "Part", "PartsFolder"]

_BUFFER_BYTES = 1 << 20
_NAME = re.compile(r"(?P<name>.+)\.[0-9a-f]{16}", re.DOTALL)
_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


@dataclass(frozen=True)
class Origin:
    """Where the bytes of a part come from.

    Attributes
    ----------
    url : str
        Without secrets.
    etag : str
        The strong ETag of this version.
    claim : str
        What the manifest said of the content when they came; see `Validator.agrees`.
    sha256 : str or None
        What the server said of the content.
    boot : str
        Names the time since the system was started: bytes that were not synced outlive a process, but not that.
    """

    url: str
    etag: str
    claim: str
    sha256: str | None
    boot: str

    @property
    def is_of_this_boot(self) -> bool:
        """Whether all that was written since is still there, so far as can be told."""
        return bool(self.boot) and self.boot == _boot()


class Part:
    """A file being written, private to its writer until it is published.

    Parameters
    ----------
    folder : pathlib.Path
        Where it lies.
    name : str
        What it is a part of, as one component of a path.

    Attributes
    ----------
    file : binary file
        Open for writing at the end of what has come.
    path : pathlib.Path
        Its name for now.
    nbytes : int
        Bytes written.
    furthest : int
        The most that there were, before it was begun anew.
    origin : Origin or None
        Where they come from; None if nobody could go on from here.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self.name = name
        self._digests: dict[str, Any] = {}
        self.furthest = 0
        self.origin: Origin | None = None
        self._spent = {"write": 0.0, "hash": 0.0}
        self._open()

    def write(self, data: bytes) -> None:
        """Append `data`."""
        begun = time.perf_counter()
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) :]  # a disk that fills up takes a part first
        written = time.perf_counter()
        for digest in self._digests.values():
            digest.update(data)
        self._spent["write"] += written - begun
        self._spent["hash"] += time.perf_counter() - written
        self.nbytes += len(data)
        self.furthest = max(self.furthest, self.nbytes)

    def take_spent(self) -> dict[str, float]:
        """Seconds that were spent in `write` since this was asked last: on ``"write"`` and on ``"hash"``."""
        spent, self._spent = self._spent, {"write": 0.0, "hash": 0.0}
        return spent

    def digest(self, algorithm: str) -> str:
        """The hex digest of what was written; see `compute`."""
        return str(self._digests[algorithm].hexdigest())

    @property
    def digests(self) -> dict[str, str]:
        """The hex digests of what was written, by algorithm."""
        return {algorithm: self.digest(algorithm) for algorithm in self._digests}

    def compute(self, algorithm: str, check: Callable[[], None]) -> None:
        """Have this digest of what is written already, read back from the file, and of what will be."""
        if algorithm not in self._digests:
            digest = new_digest(algorithm)
            self.file.seek(0)
            feed({algorithm: digest}, self.file, check)
            self._digests[algorithm] = digest

    def comes_from(self, url: str, etag: str, claim: str, sha256: str | None) -> None:
        """Note where the bytes come from that will be written, or have just been copied."""
        self.origin = Origin(url, etag, claim, sha256, _boot())
        with open(_note(self.path), "x", encoding="utf-8") as file:
            json.dump(asdict(self.origin), file)

    def restart(self) -> None:
        """Throw away what was written, and begin a new file: another version's bytes never come under the same note."""
        self.discard()
        self._digests = {}
        self._open()

    def discard(self) -> None:
        """Close and remove it."""
        self.file.close()
        _remove(self.path)

    def _open(self) -> None:
        self.path = self._folder / f"{self.name}.{secrets.token_hex(8)}"
        self.nbytes = 0
        self.origin = None
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o644)
        self.file: BinaryIO = os.fdopen(handle, "r+b", buffering=0)


@dataclass(frozen=True)
class PartsFolder:
    """The folder that has the parts of one model, if it exists."""

    path: Path

    @contextlib.contextmanager
    def new(self, name: str) -> Iterator[Part]:
        """A new part of the file `name`, closed at the end of the block, and kept if somebody could go on from it."""
        part = Part(self.path, name)
        try:
            yield part
        except OSError as error:
            if not isinstance(error, TransferError):
                part.origin = None  # room may be needed more than this, and on a disk that fails it may not be right
            raise
        finally:
            part.file.close()
            if part.nbytes == 0 or part.origin is None:
                part.discard()

    def copy_longest(
        self, part: Part, limit: int, is_usable: Callable[[Origin], bool], check: Callable[[], None]
    ) -> list[Path]:
        """Copy into the new `part` the longest one that somebody left of the same file.

        Parameters
        ----------
        part : Part
        limit : int
            The size of the whole file.
        is_usable : callable
            Whether the bytes of an origin are what is wanted.
        check : callable
            Called now and then; may raise to end it.

        Returns
        -------
        list of pathlib.Path
            The parts that are of no use any more, unless their writers still live.
        """
        found = []
        for path in self.of(part.name):
            origin = _read_note(path)
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                if path != part.path and stat.S_ISREG(status.st_mode):
                    usable = origin is not None and is_usable(origin) and 0 < status.st_size <= limit
                    found.append((status.st_size if usable else -1, path, origin))
        found.sort(key=lambda item: item[0], reverse=True)
        for size, path, origin in found:
            if size > 0 and origin is not None and part.nbytes == 0:
                _append(part, path, limit, check)
                if part.nbytes:
                    part.comes_from(origin.url, origin.etag, origin.claim, origin.sha256)
        return [path for _, path, _ in found]

    def of(self, name: str) -> list[Path]:
        """The parts of the file `name`, whoever's."""
        return [path for path, owner in self._entries() if owner == name]

    def progress(self, name: str) -> frozenset[tuple[str, int]]:
        """Something that changes as long as somebody writes a part of `name`."""
        seen = set()
        for path in self.of(name):
            with contextlib.suppress(OSError):
                seen.add((path.name, os.lstat(path).st_size))
        return frozenset(seen)

    @staticmethod
    def remove(path: Path) -> None:
        """Remove a part. A writer that still lives notices when it publishes."""
        _remove(path)

    def remove_all(self, name: str) -> None:
        """Remove all parts of `name`."""
        for path, owner in self._entries():
            if owner == name:
                _remove(path)

    def remove_idle(self, name: str, seconds: float, claim: str | None = None) -> None:
        """Remove the parts of `name` that nobody has written to for so long, or that have this claim."""
        for path, owner in self._entries():
            if owner == name:
                origin = _read_note(path)
                if _idle_seconds(path) > seconds or (origin is not None and origin.claim == claim):
                    _remove(path)

    def names(self) -> set[str]:
        """Of which files there are parts."""
        return {name for _, name in self._entries()}

    def _entries(self) -> Iterator[tuple[Path, str]]:
        """The parts, or what would be their paths if only their notes are left, and what they are parts of."""
        seen = set()
        with contextlib.suppress(OSError):
            for entry in os.listdir(self.path):
                match = _NAME.fullmatch(entry.removesuffix(".json")) or _NAME.fullmatch(entry)
                if match and match[0] not in seen:
                    seen.add(match[0])
                    yield self.path / match[0], match["name"]


def _idle_seconds(path: Path) -> float:
    for written in (path, _note(path)):
        with contextlib.suppress(OSError):
            return time.time() - os.lstat(written).st_mtime
    return 0.0


def _append(part: Part, path: Path, limit: int, check: Callable[[], None]) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | NO_LINKS | _FLAGS)
    except OSError:
        return  # gone, or a link by now
    with open(handle, "rb", buffering=0) as file:
        while data := file.read(min(_BUFFER_BYTES, limit - part.nbytes)):
            check()
            part.write(data)


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_note(path: Path) -> Origin | None:
    note = read_note(_note(path))
    texts = {name: text for name, text in (note or {}).items() if isinstance(text, str) or name == "sha256"}
    try:
        return Origin(**texts)
    except TypeError:
        return None


def _remove(path: Path) -> None:
    for leftover in (path, _note(path)):
        with contextlib.suppress(OSError):
            os.unlink(leftover)


@functools.cache
def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""  # who cannot tell goes on only where a digest will show what is wrong
