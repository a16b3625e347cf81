"""One process at a time draws bars on a terminal; others print lines, because their bars would overwrite each other."""

from __future__ import annotations

import contextlib
import os
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["CLEAR_LINE", "can_redraw", "leave_terminal", "take_terminal"]

#: Removes what stands in the line of the cursor, such as the bar of another process.
CLEAR_LINE = "\r\x1b[K"
#: The bars of this process on each terminal.
_bars: dict[int, int] = {}


def can_redraw(file: TextIO) -> bool:
    """Return whether a line of the file can be written again."""
    is_terminal = getattr(file, "isatty", bool)()  # a replacement of standard error may not have the method
    return bool(is_terminal) and os.environ.get("TERM") != "dumb"


def take_terminal(file: TextIO) -> bool:
    """Return whether a bar may be drawn, because no other process draws one; call `leave_terminal` afterwards.

    Processes tell each other by a lock of the terminal's device. `flock` would not do: processes of one shell have the
    same open file. Where there are no locks, everybody draws.
    """
    with contextlib.suppress(AttributeError, ValueError, OSError):
        number = file.fileno()
        terminal = os.fstat(number).st_rdev
        if not _bars.get(terminal) and fcntl is not None:
            try:
                fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return False
        _bars[terminal] = _bars.get(terminal, 0) + 1
    return True


def leave_terminal(file: TextIO) -> None:
    """Let other processes draw again when the last bar of this one is over."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        number = file.fileno()
        terminal = os.fstat(number).st_rdev
        if terminal in _bars:
            _bars[terminal] -= 1
            if not _bars[terminal]:
                del _bars[terminal]
                if fcntl is not None:
                    fcntl.lockf(number, fcntl.LOCK_UN)
