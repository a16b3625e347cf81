"""Digests of files that lie on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from .manifest import Shard

__all__ = ["digest_of", "mismatch"]

_BUFFER_BYTES = 1 << 20


def mismatch(path: Path, shard: Shard, check: Callable[[], None]) -> tuple[str, str] | None:
    """The expected and the actual digest of a file, if they differ. Without a digest in the manifest they cannot.

    Parameters
    ----------
    path : pathlib.Path
    shard : Shard
    check : callable
        Called now and then; may raise to end it.
    """
    for algorithm, expected in (("sha256", shard.sha256sum), ("md5", shard.md5sum)):
        if expected is not None:
            actual = digest_of(path, algorithm, check)
            return None if actual == expected else (expected, actual)
    return None


def digest_of(path: Path, algorithm: str, check: Callable[[], None]) -> str:
    """The hex digest of a file."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            check()
            digest.update(buffer[:count])
    return digest.hexdigest()
