"""ndcache's own notes: small JSON files, which others may have damaged or replaced."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from ..errors import UnsafeCacheError
from .descriptors import check_shortage
from .folder import Folder

__all__ = ["read_note", "sendable", "write_note"]

_MAX_BYTES = 1 << 16
#: A text that can be sent in a request's header, and is not longer than servers accept.
_HEADER = re.compile(r"[!-~\x80-\xff]([ -~\x80-\xff]{0,1022}[!-~\x80-\xff])?")
#: A surrogate, which JSON can spell only as an escape. A text with half a pair cannot be encoded.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_note(folder: Folder, name: str) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if there is no such file or object."""
    try:
        data = folder.read(name, _MAX_BYTES)
        if data is None:
            return None
        value = json.loads(data)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # raises unless all surrogates come in pairs
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UnsafeCacheError):
            raise
        check_shortage(error)  # which says nothing about the note
        return None
    return value if isinstance(value, dict) else None


def write_note(folder: Folder, name: str, content: Mapping[str, Any], temporary: tuple[Folder, str]) -> None:
    """Write an object to a JSON file, so that nobody sees half of it.

    Parameters
    ----------
    folder : Folder
    name : str
    content : mapping
    temporary : tuple of Folder and str
        Where to write it first, under a name that nobody else uses.
    """
    fresh, fresh_name = temporary
    with fresh.held():
        try:
            # Without a buffer, which would ask the system what kind of file it is.
            with open(fresh.create(fresh_name), "wb", buffering=0) as file:
                data = json.dumps(content).encode()  # json.dump would write it token by token
                while data:
                    data = data[file.write(data) :]
            fresh.replace(fresh_name, folder, name)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink(fresh_name)
            raise


def sendable(text: str | None) -> str | None:
    """Return a text from a note if it can be sent in a request's header, else None."""
    return text if text is not None and _HEADER.fullmatch(text) else None
