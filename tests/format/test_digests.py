"""Digests of files, and digests in SRI form."""

from __future__ import annotations

import base64
import hashlib
import io
from typing import BinaryIO

import pytest

import ndcache
from ndcache.format.integrity import find_mismatch, new_hasher, parse_sri, update_from_file
from ndcache.workers.cancellation import Cancellation

DATA = bytes(range(256)) * (5 << 12)  # more than one read


@pytest.fixture
def file() -> BinaryIO:
    return io.BytesIO(DATA)


def shard(*, md5: str | None = None, sha256: str | None = None) -> ndcache.Shard:
    return ndcache.Shard("file", len(DATA), md5, sha256, "raw-shard", ())


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_update_from_file(file: BinaryIO, algorithm: str) -> None:
    hasher = new_hasher(algorithm)
    update_from_file({algorithm: hasher}, file, lambda: None)
    assert hasher.hexdigest() == hashlib.new(algorithm, DATA).hexdigest()


MD5, SHA256 = hashlib.md5(DATA).hexdigest(), hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize(
    ("md5", "sha256", "expected"),
    [
        (None, None, None),
        (MD5, None, None),
        (None, SHA256, None),
        ("0" * 32, None, ("md5", "0" * 32, MD5)),
        (None, "0" * 64, ("sha256", "0" * 64, SHA256)),
        ("0" * 32, SHA256, ("md5", "0" * 32, MD5)),
        (MD5, "0" * 64, ("sha256", "0" * 64, SHA256)),
    ],
)
def test_find_mismatch(
    file: BinaryIO, md5: str | None, sha256: str | None, expected: tuple[str, str, str] | None
) -> None:
    assert find_mismatch(file, shard(md5=md5, sha256=sha256).digests, lambda: None) == expected


def test_row_36_hashing_can_be_cancelled(file: BinaryIO) -> None:
    cancellation = Cancellation()
    cancellation.set()
    with pytest.raises(ndcache.CancelledError):
        find_mismatch(file, shard(md5=MD5).digests, cancellation.check)


def sri(algorithm: str, data: bytes = DATA) -> str:
    return f"{algorithm}-{base64.b64encode(hashlib.new(algorithm, data).digest()).decode()}"


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_sri(algorithm: str) -> None:
    assert parse_sri(sri(algorithm)) == (algorithm, hashlib.new(algorithm, DATA).hexdigest())
    assert parse_sri(f"  {sri(algorithm)}?foo\n") == (algorithm, hashlib.new(algorithm, DATA).hexdigest())


def test_the_strongest_of_several_digests_counts() -> None:
    assert parse_sri(f"{sri('sha256')} {sri('sha512')} {sri('sha384')}")[0] == "sha512"


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "sha256", "sha256-", "sha256-abc", "sha256-" + "0" * 64, "md5-" + "A" * 22 + "==", "\n"),
        *(SHA256, sri("sha256").replace("sha256", "SHA256"), sri("sha256").replace("sha256", "sha512")),
        sri("sha256") + " sha256-x",
        "sha256-" + "é" * 44,
    ],
)
def test_other_forms_than_sri_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="digest"):
        parse_sri(text)
