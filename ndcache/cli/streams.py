"""Standard input, output and error of the command line, which may be missing, closed, full, or of a narrow encoding."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

__all__ = ["own_process"]


@contextmanager
def own_process() -> Iterator[None]:
    """Prepare the process for a command, so that what is printed goes where it belongs, or nowhere.

    In the block, errors of standard output name it as their file, and standard error has none.
    """
    _fill_descriptors()
    _quiet_drivers()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        output, error = _prepared(sys.stdout) or nowhere, _prepared(sys.stderr) or nowhere
        sys.stdout, sys.stderr = cast(TextIO, _Output(output)), cast(TextIO, _Error(error))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in (output, error):
                _flush_or_drop(stream)


def _prepared(stream: TextIO | None) -> TextIO | None:
    """Let `stream` take characters that its encoding lacks; None if it takes nothing at all.

    It may be whatever somebody put in the place of the real one: a notebook, a test, a program with a window.
    """
    try:
        if stream is None or getattr(stream, "closed", False):
            return None
        if isinstance(stream, io.TextIOWrapper):
            is_utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")
    except ValueError:  # it was detached from its file
        return None
    return stream


def _flush(stream: TextIO) -> None:
    getattr(stream, "flush", bool)()  # what stands in for a file may have no such method


def _flush_or_drop(stream: TextIO) -> None:
    """Send what cannot be written nowhere, or it would fail again when the interpreter ends."""
    try:
        _flush(stream)
    except (OSError, ValueError):
        with suppress(OSError, ValueError, AttributeError):  # not a real file
            number, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


class _Output:
    """A text file whose errors have a name."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        try:
            _flush(self._stream)
        except (OSError, ValueError) as error:
            self._fail(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, OSError):
            error.filename = "standard output"
        raise error


class _Error(_Output):
    """That nobody listens, or a disk is full, ends nothing."""

    def _fail(self, error: Exception) -> None:
        pass


def _fill_descriptors() -> None:
    """Give the numbers 0 to 2 away, where they are free: a file or socket with one would receive what others print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest that is free


def _quiet_drivers() -> None:
    """Keep Mesa's Vulkan layer from printing lines when it finds no XDG_RUNTIME_DIR while adapters are listed.

    It takes any absolute path, and nobody can have put a socket in this one.
    """
    if sys.platform == "linux" and threading.active_count() == 1:
        os.environ.setdefault("XDG_RUNTIME_DIR", os.devnull)
