"""A file that is read while it is being written."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, TypeAlias

from ...errors import RemoteChangedError
from ...format.integrity import has_right_header
from ...format.manifest import Shard
from ...workers.outcomes import Task
from ...workers.pool import WorkerPool
from ...workers.postponed import Gate, Postponed
from .hasher import BUFFER_BYTES
from .ranges import ByteRanges

__all__ = ["GrowingFile"]

#: The bytes that a task waits for, and the gate that holds it.
_Waiting: TypeAlias = tuple[ByteRanges, Gate[Task[Any]]]


class GrowingFile:
    """A shard's file, of which tasks read what is there while the rest is being downloaded.

    The writer calls `begin` once a server has confirmed the version and the size, and if no digest is to be compared.
    Tasks that want more than is there are held back, without a worker, until it has been written.

    What is read is read through a descriptor of the partial file, in which a byte is written once and never again, and
    which is never cut: so its pages can be mapped, and stay what they are when the file gets its name or loses it. If
    the writer has to start over, in another file, nothing more can be read early. Then `check` tells whether all of
    what was read is in the complete file, too.

    Parameters
    ----------
    shard : Shard
    pool : WorkerPool
        Runs the tasks that read.
    """

    #: Whether the system reads at an offset without moving a position that copies of a descriptor share.
    is_possible = hasattr(os, "preadv")

    def __init__(self, shard: Shard, pool: WorkerPool) -> None:
        self._shard = shard
        self._pool = pool
        self._file: BinaryIO | None = None
        self._ranges: ByteRanges | None = None  # what can be read of it; None while nothing can
        self._has_right_header = False
        self._read = ByteRanges()
        self._waiting: list[_Waiting] = []
        self._has_ended = False
        # Reentrant: the garbage collector, which closes generators, may call `end` in a thread that has the lock.
        self._lock = threading.RLock()

    @property
    def was_read(self) -> bool:
        """Return whether something of it was read."""
        return bool(self._read)

    # --- for the writer

    def begin(self, ranges: ByteRanges, open_file: Callable[[], BinaryIO]) -> bool:
        """Let tasks read what is there, and what will be; return False if they must wait for the complete file.

        Parameters
        ----------
        ranges : ByteRanges
            The bytes that have been written; the writer adds to it before it calls `note_written`.
        open_file : callable
            Open the file that has them, for reading.
        """
        with self._lock:
            if ranges is self._ranges:
                return True
            if self._has_ended or self.was_read:
                return False
            self._close()
            self._file, self._ranges, self._has_right_header = open_file(), ranges, False
        self.note_written(0, self._shard.nbytes)
        return True

    def note_written(self, start: int, end: int) -> None:
        """Run the tasks that have waited for these bytes, if all that they want is there now."""
        ready: list[_Waiting] = []
        with self._lock:  # always: a task that does not see these bytes may be about to wait
            waiting: list[_Waiting] = []
            for each in self._waiting:
                (ready if self._has_now(each[0], start, end) else waiting).append(each)
            self._waiting = waiting
        self._open_gates(ready)

    def stop(self) -> None:
        """Let nothing more be read: the writer begins another file."""
        with self._lock:
            self._ranges = None

    # --- for those who read

    def open(self, wanted: ByteRanges) -> BinaryIO | None:
        """Open the file for reading these bytes; return None once only the complete file is to be read.

        Raises
        ------
        Postponed
            They are not there yet.
        """
        with self._lock:
            if self._has_ended:
                return None
            if not self._has(wanted):
                gate = Gate[Task[Any]]()
                self._waiting.append((wanted, gate))
                raise Postponed(gate=gate)
            assert self._file is not None
            opened = os.fdopen(os.dup(self._file.fileno()), "rb", buffering=0)
            for start, end in wanted:
                self._read.add(start, end)
            return opened

    def check(self, file: BinaryIO, check: Callable[[], None]) -> None:
        """Compare what was read with the complete file.

        Parameters
        ----------
        file : binary file
            The complete file, open for reading.
        check : callable
            Called now and then; may raise to stop.

        Raises
        ------
        RemoteChangedError
            Something else was read: the file is of another version.
        """
        self.stop()
        if not self._read or self._file is None or os.path.sameopenfile(file.fileno(), self._file.fileno()):
            return
        for start, end in self._read:
            for at in range(start, end, BUFFER_BYTES):
                check()
                nbytes = min(BUFFER_BYTES, end - at)
                if os.pread(file.fileno(), nbytes, at) != os.pread(self._file.fileno(), nbytes, at):
                    raise RemoteChangedError(
                        "the file changed on the server after some of its tensors had been given out",
                        shard=self._shard.data_path,
                        hint="Begin again: all tensors should be of one version.",
                        retryable=False,
                    )

    def end(self) -> None:
        """Let tasks read only the complete file from now on, and run those that have waited."""
        with self._lock:
            self._has_ended, self._ranges = True, None
            waiting, self._waiting = self._waiting, []
            self._close()
        self._open_gates(waiting)

    def _has(self, wanted: ByteRanges) -> bool:
        """Return whether these bytes can be read, of a file whose header is the one that is known."""
        if self._ranges is None or wanted.without(self._ranges):
            return False
        if not self._has_right_header:
            header = ByteRanges([(0, 0 if self._shard.header is None else self._shard.header[0])])
            if header.without(self._ranges):
                return False
            assert self._file is not None
            self._has_right_header = has_right_header(self._file, self._shard)
            if not self._has_right_header:
                self._ranges = None  # another version: the writer will notice
        return self._has_right_header

    def _has_now(self, wanted: ByteRanges, start: int, end: int) -> bool:
        """Return whether these bytes can be read, which could not be before the bytes from `start` to `end` came."""
        is_touched = not wanted or any(first < end and start < last for first, last in wanted)
        return (is_touched or not self._has_right_header) and self._has(wanted)

    def _open_gates(self, waiting: list[_Waiting]) -> None:
        for _, gate in waiting:
            self._pool.open_gate(gate)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
