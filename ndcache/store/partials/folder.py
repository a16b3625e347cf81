"""The partial files of one model: new ones, and those that others left or still write."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from ...errors import TransferError
from ...files.folder import Folder
from ...format.manifest import Shard
from ...format.paths import flatten
from ..layout import Layout
from .file import PartialFile, read_at, remove_partial
from .hasher import BUFFER_BYTES
from .note import PartialNote, PartialSource, note_name
from .ranges import ByteRanges

__all__ = ["PartialFiles"]

#: The name of a partial file, or of a note that was being replaced.
_NAME = re.compile(r"(?P<flat>.+?)\.[0-9a-f]{16}(\.json\.[0-9a-f]{16})?", re.DOTALL)


@dataclass(frozen=True)
class PartialFiles:
    """The partial files of one model.

    Methods that take `flat` want the flat name of the file that is downloaded; see `flatten`.
    """

    layout: Layout

    @property
    def folder(self) -> Folder:
        """Return their folder, which need not exist."""
        return self.layout.partials

    # --- those of this load

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[PartialFile]:
        """Create a partial file of the file `name`; close it after the block, and keep it if others can continue."""
        with self.layout.translate_errors(name):
            self.layout.make(self.folder)
            # Held until the file is published, so that each step need not go down from the root once more.
            with _closing(PartialFile.open_new(self.folder, flatten(name))) as partial:
                yield partial

    @contextlib.contextmanager
    def reopen(self, name: str, file_name: str) -> Iterator[PartialFile]:
        """Open a partial file again, which its last writer has closed; do as `create` does after the block."""
        with (
            self.layout.translate_errors(name),
            _closing(PartialFile.open_existing(self.folder, flatten(name), file_name)) as partial,
        ):
            yield partial

    def copy_longest(
        self,
        partial: PartialFile,
        shard: Shard,
        content_id: str,
        check: Callable[[], None],
        *,
        is_checked: bool,
        is_exclusive: bool,
    ) -> None:
        """Copy the longest usable partial file of a shard into a new one.

        Parameters
        ----------
        partial : PartialFile
            The new one.
        shard : Shard
        content_id : str
            Identifies the shard's content; partial files of other content are not used.
        check : callable
            Called now and then; may raise to stop.
        is_checked : bool
            Whether a digest will show the damage that a crash of the system may have done.
        is_exclusive : bool
            Whether nobody else downloads this shard now, so that the old partial files can be removed.
        """

        def is_usable(source: PartialSource) -> bool:
            return source.content_id == content_id and (is_checked or source.is_trustworthy)

        with self.layout.translate_errors(shard.data_path):
            others = [file_name for file_name in self.find(flatten(shard.data_path)) if file_name != partial.file_name]
            examined = [self._examine(file_name, shard.nbytes, is_usable) for file_name in others]
            found = sorted(filter(None, examined), key=lambda one: one.ranges.nbytes, reverse=True)
            for one in found:
                if one.source is not None and one.ranges.nbytes and not partial.ranges.nbytes:
                    self._copy(one.file_name, one.source, one.ranges, partial, check)
                    partial.ensure_note()  # before the other file is removed
        if is_exclusive:
            for one in found:
                self.remove(one.file_name)

    def longest(self, shard: Shard, content_id: str, *, is_checked: bool) -> int:
        """Return the most bytes that `copy_longest` would find in a partial file."""

        def is_usable(source: PartialSource) -> bool:
            return source.content_id == content_id and (is_checked or source.is_trustworthy)

        with self.layout.translate_errors(shard.data_path):
            names = self.find(flatten(shard.data_path))
            found = [self._examine(file_name, shard.nbytes, is_usable) for file_name in names]
        return max((one.ranges.nbytes for one in found if one is not None), default=0)

    def open_covering(self, shard: Shard, content_id: str, wanted: ByteRanges) -> BinaryIO | None:
        """Open a partial file that was kept with holes and has the wanted bytes; None if there is none.

        It has the shard's size. Its bytes were not compared with a digest.
        """

        def is_usable(source: PartialSource) -> bool:
            return source.content_id == content_id and source.is_trustworthy

        with self.layout.translate_errors(shard.data_path):
            for file_name in self.find(flatten(shard.data_path)):
                found = self._examine(file_name, shard.nbytes, is_usable)
                if found is not None and found.source is not None and not wanted.without(found.ranges):
                    file = self._open(file_name)
                    if file is not None:
                        if os.fstat(file.fileno()).st_size == shard.nbytes:
                            return file
                        file.close()
        return None

    # --- those of any process

    def find(self, flat: str) -> list[str]:
        """Return the names of a file's partial files."""
        return [file_name for file_name, owner in self._entries() if owner == flat]

    def flat_names(self) -> set[str]:
        """Return the flat names of the files that have partial files."""
        return {flat for _, flat in self._entries()}

    def progress(self, flat: str) -> frozenset[tuple[str, int, int]]:
        """Return a value that changes as long as somebody writes one of a file's partial files."""
        seen = set()
        for file_name in self.find(flat):
            with contextlib.suppress(OSError):
                status = self.folder.status(file_name)
                if status is not None:
                    seen.add((file_name, status.st_size, status.st_mtime_ns))
        return frozenset(seen)

    def remove(self, file_name: str) -> None:
        """Remove a partial file. A writer that is still at work notices when it publishes."""
        remove_partial(self.folder, file_name)

    def remove_all(self, flat: str) -> None:
        """Remove all of a file's partial files."""
        for file_name in self.find(flat):
            self.remove(file_name)

    def idle_seconds(self, file_name: str) -> float:
        """Return the seconds since a partial file was written to; 0 if it is gone."""
        for written in (file_name, note_name(file_name)):
            with contextlib.suppress(OSError):
                status = self.folder.status(written)
                if status is not None:
                    return time.time() - status.st_mtime
        return 0.0

    def source(self, file_name: str) -> PartialSource | None:
        """Return where the bytes of a partial file come from, if its note says so."""
        note = PartialNote.read(self.folder, file_name)
        return None if note is None else note.source

    def _entries(self) -> Iterator[tuple[str, str]]:
        """Yield the name of each partial file, and the flat name of the file that it will become.

        If only the note is left, yield the name that the partial file had.
        """
        seen = set()
        for entry in self.folder.entries():
            match = _NAME.fullmatch(entry.removesuffix(".json")) or _NAME.fullmatch(entry)
            if match and match[0] not in seen:
                seen.add(match[0])
                yield match[0], match["flat"]

    def _examine(self, file_name: str, limit: int, is_usable: Callable[[PartialSource], bool]) -> _FoundPartial | None:
        """Return a partial file of at most `limit` bytes with its source and ranges; None if it is gone."""
        note, status = PartialNote.read(self.folder, file_name), self.folder.status(file_name)
        if status is None or not stat.S_ISREG(status.st_mode):
            return None
        if note is not None and note.source.etag and is_usable(note.source):
            ranges = ByteRanges([(0, status.st_size)]) if note.ranges is None else note.ranges
            if ranges.end <= min(limit, status.st_size):
                return _FoundPartial(file_name, note.source, ranges)
        return _FoundPartial(file_name, None, ByteRanges())

    def _copy(
        self, file_name: str, source: PartialSource, ranges: ByteRanges, target: PartialFile, check: Callable[[], None]
    ) -> None:
        file = self._open(file_name)
        if file is None:
            return
        with file:
            target.set_source(source.url, source.etag, source.content_id, source.sha256)
            for start, end in ranges:
                at = start
                while at < end:
                    check()
                    data = read_at(file, min(BUFFER_BYTES, end - at), at)
                    if not data:
                        return
                    target.write_at(data, at)
                    at += len(data)

    def _open(self, file_name: str) -> BinaryIO | None:
        """Open a partial file; return None if it is gone, or belongs to another account that does not share it."""
        try:
            return self.folder.open(file_name)
        except PermissionError:
            return None


@contextlib.contextmanager
def _closing(partial: PartialFile) -> Iterator[PartialFile]:
    """Close a partial file after the block, and remove it unless others can continue it."""
    try:
        yield partial
    except OSError as error:
        if not isinstance(error, TransferError):
            # Do not keep the file: a full disk needs the room, and a failing disk may have wrong bytes.
            partial.source = None
        raise
    finally:
        partial.close()
        if not partial.ranges.nbytes or partial.source is None:
            partial.delete()


@dataclass(frozen=True)
class _FoundPartial:
    """A partial file that somebody left or still writes. Its source is None if it cannot be used."""

    file_name: str
    source: PartialSource | None
    ranges: ByteRanges
