"""Digests of files that lie on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import BinaryIO

from .manifest import Shard

__all__ = ["digest_of", "mismatch"]

_BUFFER_BYTES = 1 << 20


def mismatch(file: BinaryIO, shard: Shard, check: Callable[[], None]) -> tuple[str, str] | None:
    """The expected and the actual digest of a file, if they differ. Without a digest in the manifest they cannot.

    Parameters
    ----------
    file : binary file
        Read from its start to its end.
    shard : Shard
    check : callable
        Called now and then; may raise to end it.
    """
    for algorithm, expected in (("sha256", shard.sha256sum), ("md5", shard.md5sum)):
        if expected is not None:
            actual = digest_of(file, algorithm, check)
            return None if actual == expected else (expected, actual)
    return None


def digest_of(file: BinaryIO, algorithm: str, check: Callable[[], None]) -> str:
    """The hex digest of a file's content."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    file.seek(0)
    while data := file.read(_BUFFER_BYTES):
        check()
        digest.update(data)
    return digest.hexdigest()
