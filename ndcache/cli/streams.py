"""Standard streams that can always be written, even if they are missing, closed, full, or of a narrow encoding."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

__all__ = ["safe_streams"]


@contextmanager
def safe_streams() -> Iterator[None]:
    """Make the standard streams safe in the block: a command's output arrives where it belongs, or is dropped.

    An error of standard output says so in its ``filename``. Standard error raises no errors.
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
    """Return `stream`, made to escape characters that its encoding lacks, or None if it cannot be written at all.

    A notebook, a test or a GUI may have replaced the real stream with any object.
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
    getattr(stream, "flush", bool)()  # a stand-in may lack the method


def _flush_or_drop(stream: TextIO) -> None:
    """Flush the stream, or drop text that cannot be written: it would fail again when the interpreter exits."""
    try:
        _flush(stream)
    except (OSError, ValueError):
        with suppress(OSError, ValueError, AttributeError):  # not a real file
            number, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


class _Output:
    """Standard output, which its errors name as their file."""

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

    @property
    def encoding(self) -> str:
        """Return the encoding, but not ASCII: to such a stream, click would write UTF-8."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return "latin-1" if encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968", "646") else encoding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, OSError):
            error.filename = "standard output"
        raise error


class _Error(_Output):
    """Standard error, which ignores its own errors, such as a missing reader or a full disk."""

    def _fail(self, error: Exception) -> None:
        pass


def _fill_descriptors() -> None:
    """Open the null device as descriptors 0 to 2 where they are free.

    Otherwise a file or socket might get such a number, and receive what C libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def _quiet_drivers() -> None:
    """Keep Mesa's Vulkan layer from printing lines about a missing XDG_RUNTIME_DIR when adapters are listed.

    It accepts any absolute path, and this one cannot contain a socket that somebody planted.
    """
    if sys.platform == "linux" and threading.active_count() == 1:
        os.environ.setdefault("XDG_RUNTIME_DIR", os.devnull)
