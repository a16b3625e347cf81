"""Files that are being written: private to their writers, and of use to whoever comes after.

A part is opened with ``O_EXCL`` under a random name, so that nobody else writes to it, ever, and all of its bytes come
from one version of one file on one server. A note beside it says which. A writer that is interrupted leaves both
behind; the next one copies the bytes into a part of its own, and goes on from there if the server still has that
version.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import TransferError
from ..files.folder import Folder, sync
from ..files.notes import read_note, sendable, write_note
from ..format.integrity import new_hasher
from .ranges import ByteRanges

__all__ = ["PartialFile", "PartialFiles", "PartialSource"]

_BUFFER_BYTES = 1 << 20
#: Bytes that may come before a note says which there are: the most that a process that is killed loses.
_NOTE_BYTES = 4 << 20
#: In a note, instead of a boot: the bytes were synced, and outlive the system's crash, too.
_SYNCED = "synced"
#: Where there is no way to read and write at an offset that leaves the file's own position alone.
_one_at_a_time = threading.Lock()
#: Of a part, or of a note of one that was being replaced.
_NAME = re.compile(r"(?P<name>.+?)\.[0-9a-f]{16}(\.json\.[0-9a-f]{16})?", re.DOTALL)


@dataclass(frozen=True)
class PartialSource:
    """Where the bytes of a part come from.

    Attributes
    ----------
    url : str
        Without secrets.
    etag : str
        The strong ETag of this version.
    content_id : str
        What the manifest said of the content when they came; see `FileMetadata.compare_content`.
    sha256 : str or None
        What the server said of the content.
    boot : str
        Names the time since the system was started: bytes that were not synced outlive a process, but not that. Of
        those that were synced it says so.
    """

    url: str
    etag: str
    content_id: str
    sha256: str | None
    boot: str

    def to_note(self) -> dict[str, Any]:
        """Return the fields under the names that they have on disk."""
        note = asdict(self)
        note["claim"] = note.pop("content_id")
        return note

    @classmethod
    def from_note(cls, note: Mapping[str, str]) -> PartialSource:
        """Return what was noted; raise TypeError if a field is missing or unknown."""
        return cls(**{"content_id" if name == "claim" else name: text for name, text in note.items()})

    @property
    def is_trustworthy(self) -> bool:
        """Whether all that was written is still there, so far as can be told."""
        return self.boot == _SYNCED or (bool(self.boot) and self.boot == _boot())


class PartialFile:
    """A file being written, private to its writers until it is published.

    Its bytes may come in any order, from several threads. Digests are computed in order: of what comes when it is its
    turn, as it comes; of the rest later, read back from the file.

    Parameters
    ----------
    folder : Folder
        Where it lies.
    name : str
        What it is a part of, as one component of a path.

    Attributes
    ----------
    folder : Folder
    file : binary file
        Open for reading and writing.
    file_name : str
        Its name in the folder for now.
    ranges : ByteRanges
        What has come.
    furthest : int
        The most bytes that there were, before it was begun anew.
    origin : Origin or None
        Where they come from; None if nobody could go on from here.
    """

    _is_scattered: bool  # whether the note has to say what there is: the size alone does not
    _hashed: int  # up to where all digests are computed
    _not_noted: int  # bytes that have come since the note was written

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder = folder
        self.name = name
        self._digests: dict[str, Any] = {}
        self.furthest = 0
        self.origin: PartialSource | None = None
        self._lock = threading.Lock()
        self._hashing = threading.Lock()
        self._open()

    @property
    def path(self) -> Path:
        """Return where it lies for now."""
        return self.folder.path / self.file_name

    @property
    def nbytes(self) -> int:
        """Bytes from the beginning on that have come."""
        return self.ranges.prefix

    def write(self, data: bytes) -> None:
        """Append `data` to what has come from the beginning on."""
        start = self.nbytes
        self.put(data, start)
        self.feed(data, start)

    def put(self, data: bytes, start: int) -> None:
        """Write `data` where it belongs. Threads must not write to the same place."""
        if start != self.nbytes and not self._is_scattered:
            with self._lock:
                self._is_scattered = True
                self._write_note()  # before its size says more than is there
        rest, at = memoryview(data), start
        while rest:
            count = _write_at(self.file, rest, at)  # a disk that fills up takes a part first
            rest, at = rest[count:], at + count
        with self._lock:
            self.ranges.add(start, at)
            self.furthest = max(self.furthest, self.ranges.nbytes)
            self._not_noted += len(data)
            if self._is_scattered and self._not_noted >= _NOTE_BYTES:
                self._write_note()

    def feed(self, data: bytes, start: int) -> None:
        """Put into the digests what was just written, if it is its turn and no other thread is at it."""
        if self._hashing.acquire(blocking=False):
            try:
                if self._hashed == start:
                    for digest in self._digests.values():
                        digest.update(data)
                    self._hashed += len(data)
            finally:
                self._hashing.release()

    def catch_up(self, check: Callable[[], None], *, wait: bool = False) -> None:
        """Put into the digests, read back from the file, what was written before it was its turn.

        Parameters
        ----------
        check : callable
            Called now and then; may raise to end it.
        wait : bool
            Whether to wait for another thread that is at it, and so to have it done in the end.
        """
        if self._hashing.acquire(blocking=wait):
            try:
                while self._hashed < (end := self.nbytes):
                    check()
                    end = min(end, self._hashed + _BUFFER_BYTES)
                    self._feed_back(self._digests, self._hashed, end)
                    self._hashed = end
            finally:
                self._hashing.release()

    def digest(self, algorithm: str) -> str:
        """The hex digest of what has come; see `compute` and `catch_up`."""
        return str(self._digests[algorithm].hexdigest())

    @property
    def digests(self) -> dict[str, str]:
        """The hex digests of what has come, by algorithm."""
        return {algorithm: self.digest(algorithm) for algorithm in self._digests}

    def compute(self, algorithm: str, check: Callable[[], None]) -> None:
        """Have this digest of what is written already, read back from the file, and of what will be."""
        if algorithm in self._digests:
            return
        with self._hashing:
            digest = new_hasher(algorithm)
            for start in range(0, self._hashed, _BUFFER_BYTES):
                check()
                self._feed_back({algorithm: digest}, start, min(self._hashed, start + _BUFFER_BYTES))
            self._digests[algorithm] = digest

    def comes_from(self, url: str, etag: str, content_id: str, sha256: str | None) -> None:
        """Note where the bytes come from that will be written, or have just been copied."""
        self.origin = PartialSource(url, etag, content_id, sha256, _boot())
        with self._lock:
            self._write_note()

    def keep_with_holes(self, nbytes: int) -> BinaryIO:
        """Keep what has come of a file of `nbytes` bytes, for good; it comes back open for reading, with its holes."""
        assert self.origin is not None
        with self._lock:
            self._is_scattered = True
            self._write_note()  # before its size says more than is there
            self.file.truncate(nbytes)
            sync(self.file.fileno())
            self.origin = replace(self.origin, boot=_SYNCED)
            self._write_note()
        file = self.folder.open(self.file_name)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "a file that is being written is gone", str(self.path))
        return file

    def restart(self) -> None:
        """Throw away what was written, and begin a new file: another version's bytes never come under the same note."""
        self.discard()
        self._digests = {}
        self._open()

    def close(self) -> None:
        """Write no more."""
        with contextlib.suppress(OSError), self._lock:
            if self._is_scattered and self.folder.status(self.file_name) is not None:
                self._write_note()
        self.file.close()

    def discard(self) -> None:
        """Close and remove it."""
        self.file.close()
        _remove(self.folder, self.file_name)

    def _open(self) -> None:
        self.file_name = f"{self.name}.{secrets.token_hex(8)}"
        self.ranges = ByteRanges()
        self.origin = None
        self._is_scattered = False
        self._hashed = self._not_noted = 0
        self.file = self._create()

    def _create(self) -> BinaryIO:
        return os.fdopen(self.folder.create(self.file_name), "r+b", buffering=0)

    def _feed_back(self, digests: Mapping[str, Any], start: int, end: int) -> None:
        while digests and start < end:
            data = _read_at(self.file, end - start, start)
            if not data:
                raise OSError(errno.EIO, "a file that is being written was cut", str(self.path))
            for digest in digests.values():
                digest.update(data)
            start += len(data)

    def _write_note(self) -> None:
        if self.origin is None:
            return
        content = {**self.origin.to_note(), **({"spans": list(self.ranges)} if self._is_scattered else {})}
        note = _note(self.file_name)
        write_note(self.folder, note, content, (self.folder, f"{note}.{secrets.token_hex(8)}"))
        self._not_noted = 0


@dataclass(frozen=True)
class PartialFiles:
    """The folder that has the parts of one model, if it exists."""

    folder: Folder

    @contextlib.contextmanager
    def new(self, name: str) -> Iterator[PartialFile]:
        """A new part of the file `name`, closed at the end of the block, and kept if somebody could go on from it."""
        part = PartialFile(self.folder, name)
        try:
            yield part
        except OSError as error:
            if not isinstance(error, TransferError):
                part.origin = None  # room may be needed more than this, and on a disk that fails it may not be right
            raise
        finally:
            part.close()
            if not part.ranges.nbytes or part.origin is None:
                part.discard()

    def copy_longest(
        self, part: PartialFile, limit: int, is_usable: Callable[[PartialSource], bool], check: Callable[[], None]
    ) -> list[str]:
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
        list of str
            The names of the parts that are of no use any more, unless their writers still live.
        """
        found = sorted(self._left_by_others(part, limit, is_usable), key=lambda item: item.ranges.nbytes, reverse=True)
        for left in found:
            if left.origin is not None and left.ranges.nbytes and not part.ranges.nbytes:
                _copy(self.folder, part, left, check)
        return [left.file_name for left in found]

    def open_with(
        self, name: str, wanted: ByteRanges, nbytes: int, is_usable: Callable[[PartialSource], bool]
    ) -> BinaryIO | None:
        """A part of the file `name` that has all that is wanted, and the whole file's size; None if there is none."""
        for file_name in self.of(name):
            left = _look(self.folder, file_name, nbytes, is_usable)
            if left is not None and left.origin is not None and not wanted.without(left.ranges):
                file = _open(self.folder, file_name)
                if file is not None:
                    if os.fstat(file.fileno()).st_size == nbytes:
                        return file
                    file.close()
        return None

    def _left_by_others(
        self, part: PartialFile, limit: int, is_usable: Callable[[PartialSource], bool]
    ) -> Iterator[_FoundPartial]:
        for file_name in self.of(part.name):
            if file_name != part.file_name:
                left = _look(self.folder, file_name, limit, is_usable)
                if left is not None:
                    yield left

    def of(self, name: str) -> list[str]:
        """The parts of the file `name`, whoever's."""
        return [file_name for file_name, owner in self._entries() if owner == name]

    def progress(self, name: str) -> frozenset[tuple[str, int, int]]:
        """Something that changes as long as somebody writes a part of `name`."""
        seen = set()
        for file_name in self.of(name):
            with contextlib.suppress(OSError):
                status = self.folder.status(file_name)
                if status is not None:
                    seen.add((file_name, status.st_size, status.st_mtime_ns))
        return frozenset(seen)

    def remove(self, file_name: str) -> None:
        """Remove a part. A writer that still lives notices when it publishes."""
        _remove(self.folder, file_name)

    def remove_all(self, name: str) -> None:
        """Remove all parts of `name`."""
        for file_name in self.of(name):
            _remove(self.folder, file_name)

    def remove_idle(self, name: str, seconds: float, content_id: str | None = None) -> None:
        """Remove the parts of `name` that nobody has written to for so long, or that have this claim."""
        for file_name in self.of(name):
            origin, _ = _read_note(self.folder, file_name)
            if self._idle_seconds(file_name) > seconds or (origin is not None and origin.content_id == content_id):
                _remove(self.folder, file_name)

    def names(self) -> set[str]:
        """Of which files there are parts."""
        return {name for _, name in self._entries()}

    def _entries(self) -> Iterator[tuple[str, str]]:
        """The parts, or what would be their names if only their notes are left, and what they are parts of."""
        seen = set()
        for entry in self.folder.entries():
            match = _NAME.fullmatch(entry.removesuffix(".json")) or _NAME.fullmatch(entry)
            if match and match[0] not in seen:
                seen.add(match[0])
                yield match[0], match["name"]

    def _idle_seconds(self, file_name: str) -> float:
        for written in (file_name, _note(file_name)):
            with contextlib.suppress(OSError):
                status = self.folder.status(written)
                if status is not None:
                    return time.time() - status.st_mtime
        return 0.0


@dataclass(frozen=True)
class _FoundPartial:
    """A part that somebody left, or still writes. It has no origin if it is of no use."""

    file_name: str
    origin: PartialSource | None
    ranges: ByteRanges


def _look(
    folder: Folder, file_name: str, limit: int, is_usable: Callable[[PartialSource], bool]
) -> _FoundPartial | None:
    """What there is of a part; None if there is none."""
    origin, noted = _read_note(folder, file_name)
    status = folder.status(file_name)
    if status is None or not stat.S_ISREG(status.st_mode):
        return None
    ranges = ByteRanges([(0, status.st_size)]) if noted is None else noted
    if origin is None or not origin.etag or not is_usable(origin) or ranges.end > min(limit, status.st_size):
        return _FoundPartial(file_name, None, ByteRanges())
    return _FoundPartial(file_name, origin, ranges)


def _copy(folder: Folder, part: PartialFile, left: _FoundPartial, check: Callable[[], None]) -> None:
    file = _open(folder, left.file_name)
    if file is None:
        return
    assert left.origin is not None
    with file:
        part.comes_from(left.origin.url, left.origin.etag, left.origin.content_id, left.origin.sha256)
        for start, end in left.ranges:
            at = start
            while at < end:
                check()
                data = _read_at(file, min(_BUFFER_BYTES, end - at), at)
                if not data:
                    return
                part.put(data, at)
                at += len(data)


def _open(folder: Folder, file_name: str) -> BinaryIO | None:
    """A part, open for reading; None if it is gone, or is of another account that keeps it for itself."""
    try:
        return folder.open(file_name)
    except PermissionError:
        return None


def _write_at(file: BinaryIO, data: memoryview, start: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file.fileno(), data, start)
    with _one_at_a_time:
        file.seek(start)
        return file.write(data)


def _read_at(file: BinaryIO, nbytes: int, start: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), nbytes, start)
    with _one_at_a_time:
        file.seek(start)
        return file.read(nbytes)


def _note(file_name: str) -> str:
    return f"{file_name}.json"


def _read_note(folder: Folder, file_name: str) -> tuple[PartialSource | None, ByteRanges | None]:
    """Where a part's bytes come from, and which there are if its size does not say so."""
    note = dict(read_note(folder, _note(file_name)) or {})
    ranges = note.pop("spans", None)
    sha256 = note.get("sha256")
    is_digest = sha256 is None or (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) is not None)
    texts = {name: text for name, text in note.items() if isinstance(text, str) or (name == "sha256" and is_digest)}
    try:
        origin = PartialSource.from_note(texts)
        noted = None if ranges is None else _checked_spans(ranges)
    except (TypeError, ValueError):
        return None, None
    if not is_digest:
        return None, None
    return replace(origin, etag=sendable(origin.etag) or ""), noted


def _checked_spans(noted: Iterable[Iterable[int]]) -> ByteRanges:
    ranges = [(start, end) for start, end in noted]
    if not all(type(start) is type(end) is int and 0 <= start <= end for start, end in ranges):
        raise ValueError("not a list of stretches")
    return ByteRanges(ranges)


def _remove(folder: Folder, file_name: str) -> None:
    for leftover in (file_name, _note(file_name)):
        with contextlib.suppress(OSError):
            folder.unlink(leftover)


@functools.cache
def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""  # who cannot tell goes on only where a digest will show what is wrong
