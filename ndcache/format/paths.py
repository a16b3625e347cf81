"""Check that shard paths are safe: each names the same file in a URL and on every file system."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from urllib.parse import unquote

from ..errors import UnsafePathError

__all__ = ["STATE_DIRECTORY", "check_path", "collision_key", "flatten", "unflatten"]

#: ndcache's own folder in a model directory; no shard may lie there.
STATE_DIRECTORY = ".ndcache"
#: The most bytes of a shard's path. The cache makes one file name of it and appends to that; most file systems allow
#: 255 bytes.
_MAX_PATH = 200
_WINDOWS_NAMES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{device}{digit}" for device in ("com", "lpt") for digit in "0123456789¹²³"
}
#: A file name of ASCII letters, digits and a few signs, which is safe unless Windows reserves it.
_PLAIN_NAME = re.compile(r"([A-Za-z0-9_-]+)(\.[A-Za-z0-9_-]+)*", re.ASCII)
#: The most bytes of a name in ndcache's own folders, before up to 39 are appended: some file systems allow only 143.
_MAX_NAME_BYTES = 100


def check_path(path: str) -> None:
    """Raise `UnsafePathError` unless `path` names a file below its directory, on every system.

    The path comes from a manifest, is appended to a URL and becomes a file name. It must mean the same in all three,
    however often percent signs are decoded, and never be ndcache's own directory.
    """
    if (match := _PLAIN_NAME.fullmatch(path)) and len(path) <= _MAX_PATH and match[1].lower() not in _WINDOWS_NAMES:
        return  # nearly every manifest has such names only, and may have many
    shown = ascii(path if len(path) <= 80 else path[:77] + "...")
    for text in _percent_decodings(path):
        reason = _unsafe(text)
        if reason:
            raise UnsafePathError(
                f"the shard path {shown} {reason}",
                hint="The manifest is damaged or hostile; nothing was requested.",
            )


def _percent_decodings(path: str) -> Iterator[str]:
    """Yield `path`, and the result of each round of percent-decoding that still changes it."""
    for _ in range(8):
        yield path
        decoded = unquote(path, errors="surrogateescape")
        if decoded == path:
            return
        path = decoded
    yield "\0"  # refused: no file name is encoded eight times


#: Short second names that Windows gives to files with long names: PARAMS~1.BIN.
_SHORT_NAME = re.compile(r"[^.]{1,6}~\d{1,6}(\.[^.]{0,3})?")


def _unsafe(path: str) -> str | None:
    """Return why `path` is not safe as it stands, or None if it is."""
    # Slashes and percent signs become three characters each in the cache.
    if (
        len(path) > _MAX_PATH
        or len(path.encode("utf-8", "surrogatepass")) + 2 * (path.count("/") + path.count("%")) > _MAX_PATH
    ):
        return f"is longer than {_MAX_PATH} bytes"
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in path):
        return "has control, invisible or surrogate characters"
    if any(c in '\\:*?"<>|' for c in path):
        return "has a character that not every file system can hold"
    if path.startswith("/"):
        return "is absolute"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return "has an empty, '.' or '..' component"
        if part.endswith((" ", ".")) or part.startswith(" "):
            return "has a component that begins with a space or ends in a space or dot"
        if collision_key(part) == STATE_DIRECTORY:
            return "lies in ndcache's own folder"
        if collision_key(part.partition(".")[0].rstrip(" ")) in _WINDOWS_NAMES or _SHORT_NAME.fullmatch(part):
            return "has a name that Windows reserves"
    return None


def collision_key(path: str) -> str:
    """Return a key that is equal for all spellings that some file system treats as one name."""
    if path.isascii():
        return path.lower()
    # Unicode's canonical caseless matching. It normalises twice, as case folding can undo a normal form.
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())


def flatten(name: str) -> str:
    """Return a file name for a path, in which ``/`` and ``%`` are percent-encoded.

    A long name is cut, and its digest takes the place of the rest: some file systems would refuse it with a suffix.
    """
    flat = name.replace("%", "%25").replace("/", "%2F")
    if len(flat.encode()) <= _MAX_NAME_BYTES:
        return flat
    return f"{flat.encode()[:60].decode(errors='ignore')}%~{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def unflatten(name: str) -> str:
    """Return the path from which `flatten` made this name, unless it cut the name."""
    return name.replace("%2F", "/").replace("%25", "%")
