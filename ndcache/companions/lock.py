"""Lock files: the SHA-256 of every file of a model, as JSON.

::

    {
      "version": 1,
      "source": "https://host/model/",
      "files": {
        "tensor-cache.json": {"nbytes": 1234, "sha256": "…64 hex digits…"},
        …
      }
    }

``source`` is for readers. Other fields are ignored, so that later versions may add some.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import IntegrityError, NotFoundError
from ..files.staging import staged_file
from ..format.integrity import Integrity, Lock, parse_sri

__all__ = ["as_sri", "lock_text", "new_lock", "read_lock", "required_digests", "write_lock"]

_VERSION = 1
_MAX_BYTES = 64 << 20
_SHA256 = re.compile("[0-9a-f]{64}")


def required_digests(option: Mapping[str, str] | str | os.PathLike[str] | None) -> Integrity:
    """Return the digests that the ``integrity`` option requires.

    Raises
    ------
    ValueError
        A digest has another form than that of Subresource Integrity.
    NotFoundError, IntegrityError
        See `read_lock`.
    """
    if isinstance(option, (str, os.PathLike)):
        return read_lock(option)
    return {name: parse_sri(text) for name, text in (option or {}).items()}


def as_sri(algorithm: str, digest: str) -> str:
    """Return a hex digest in the form of Subresource Integrity."""
    return f"{algorithm}-{base64.b64encode(bytes.fromhex(digest)).decode()}"


def read_lock(path: str | os.PathLike[str]) -> Lock:
    """Read a lock file.

    Raises
    ------
    NotFoundError
        It cannot be read.
    IntegrityError
        It is not a lock file.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise NotFoundError(f"the lock file {os.fspath(path)} cannot be read: {error.strerror}") from error
    try:
        value: Any = json.loads(data) if len(data) <= _MAX_BYTES else None
        if value["version"] != _VERSION:
            raise ValueError(f"it has version {value['version']!r}, and this ndcache reads {_VERSION}")
        digests = {str(name): ("sha256", _digest(name, entry)) for name, entry in value["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else "it is not JSON of the form that ndcache lock writes"
        raise IntegrityError(
            f"the lock file {os.fspath(path)} cannot be used: {reason}",
            hint="Make it again with ndcache lock.",
            retryable=False,
        ) from error
    return Lock(digests)


def lock_text(lock: Mapping[str, Any]) -> str:
    """Return the text of a lock file."""
    return json.dumps(lock, indent=2, ensure_ascii=False) + "\n"


def write_lock(path: Path, lock: Mapping[str, Any]) -> None:
    """Write a lock file, which appears complete or not at all; or write into a device or pipe."""
    text = lock_text(lock)
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        with staged_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        error.filename = str(path)  # not the temporary name, or none
        raise


def new_lock(source: str, files: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    """Return a lock from the bytes and the SHA-256 of each file."""
    entries = {name: {"nbytes": nbytes, "sha256": digest} for name, (nbytes, digest) in files.items()}
    return {"version": _VERSION, "source": source, "files": entries}


def _digest(name: str, entry: Mapping[str, Any]) -> str:
    digest = entry["sha256"]
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError(f"the SHA-256 of {name!a} is not 64 hex digits")
    return digest
