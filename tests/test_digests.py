"""Digests of files on disk."""

from __future__ import annotations

import hashlib
import io
from typing import BinaryIO

import pytest

import ndcache
from ndcache.digests import digest_of, mismatch
from ndcache.stop import Stop

DATA = bytes(range(256)) * (5 << 12)  # more than one read


@pytest.fixture
def file() -> BinaryIO:
    return io.BytesIO(DATA)


def shard(*, md5: str | None = None, sha256: str | None = None) -> ndcache.Shard:
    return ndcache.Shard("file", len(DATA), md5, sha256, "raw-shard", ())


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_the_digest_of_a_file(file: BinaryIO, algorithm: str) -> None:
    assert digest_of(file, algorithm, lambda: None) == hashlib.new(algorithm, DATA).hexdigest()


MD5, SHA256 = hashlib.md5(DATA).hexdigest(), hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize(
    ("md5", "sha256", "expected"),
    [
        (None, None, None),
        (MD5, None, None),
        (None, SHA256, None),
        ("0" * 32, None, ("0" * 32, MD5)),
        (None, "0" * 64, ("0" * 64, SHA256)),
        ("0" * 32, SHA256, None),  # the stronger one decides
        (MD5, "0" * 64, ("0" * 64, SHA256)),
    ],
)
def test_what_differs(file: BinaryIO, md5: str | None, sha256: str | None, expected: tuple[str, str] | None) -> None:
    assert mismatch(file, shard(md5=md5, sha256=sha256), lambda: None) == expected


def test_row_36_it_can_be_ended(file: BinaryIO) -> None:
    stop = Stop()
    stop.set()
    with pytest.raises(ndcache.CancelledError):
        mismatch(file, shard(md5=MD5), stop.check)
