"""ndcache's own notes: small JSON files that anybody may have damaged, or put something else in the place of."""

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
#: What may stand in a header of a request, and is not longer than servers take.
_HEADER = re.compile(r"[!-~\x80-\xff]([ -~\x80-\xff]{0,1022}[!-~\x80-\xff])?")
#: Half of a character, as only an escape in JSON can spell it; a text with one cannot be written anywhere.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_note(folder: Folder, name: str) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file or object."""
    try:
        data = folder.read(name, _MAX_BYTES)
        if data is None:
            return None
        value = json.loads(data)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # a pair of halves is a character
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UnsafeCacheError):
            raise
        check_shortage(error)  # which says nothing of the note
        return None
    return value if isinstance(value, dict) else None


def write_note(folder: Folder, name: str, content: Mapping[str, Any], by_way_of: tuple[Folder, str]) -> None:
    """Write an object to a JSON file, by way of a new file of another folder and name: nobody sees half a note."""
    fresh, fresh_name = by_way_of
    with fresh.held():
        try:
            with open(fresh.create(fresh_name), "wb") as file:
                file.write(json.dumps(content).encode())  # json.dump would write it word by word
            fresh.replace(fresh_name, folder, name)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink(fresh_name)
            raise


def sendable(text: str | None) -> str | None:
    """A text of a note if it can stand in a request's header, else None."""
    return text if text is not None and _HEADER.fullmatch(text) else None
