"""ndcache's own notes: small JSON files that anybody may have damaged, or put something else in the place of."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .descriptors import check_shortage

__all__ = ["NO_LINKS", "read_note", "write_note"]

_MAX_BYTES = 1 << 16
#: For `os.open`: not through a symbolic link, and not waiting for whoever writes to a pipe.
NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def read_note(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file or object."""
    try:
        handle = os.open(path, os.O_RDONLY | NO_LINKS | getattr(os, "O_BINARY", 0))
        try:
            data = os.read(handle, _MAX_BYTES) if stat.S_ISREG(os.fstat(handle).st_mode) else b""
        finally:
            os.close(handle)
        value = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        check_shortage(error)  # which says nothing of the note
        return None
    return value if isinstance(value, dict) else None


def write_note(path: Path, content: Mapping[str, Any], fresh: Path) -> None:
    """Write an object to a JSON file, by way of the new file `fresh` beside it: nobody sees half a note."""
    try:
        with open(fresh, "xb") as file:
            file.write(json.dumps(content).encode())  # json.dump would write it word by word
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise
