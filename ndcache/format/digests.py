"""Digests of files that lie on disk, and digests as callers pin them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

__all__ = ["Mismatch", "feed", "mismatch", "new_digest", "parse_sri"]

_BUFFER_BYTES = 1 << 20
#: What Subresource Integrity allows, the strongest first.
_SRI_ALGORITHMS = ("sha512", "sha384", "sha256")

#: An algorithm, the expected hex digest and the actual one.
Mismatch = tuple[str, str, str]


def new_digest(algorithm: str) -> Any:
    """An empty digest; for finding damage, so that a FIPS build gives md5, too."""
    return hashlib.new(algorithm, usedforsecurity=False)


def mismatch(file: BinaryIO, expected: Mapping[str, str], check: Callable[[], None]) -> Mismatch | None:
    """The first of the expected digests that a file does not have; None if it has them all, or none is expected.

    Parameters
    ----------
    file : binary file
        Read from its start to its end, once.
    expected : mapping
        Hex digests by algorithm.
    check : callable
        Called now and then; may raise to end it.
    """
    digests = {algorithm: new_digest(algorithm) for algorithm in expected}
    if digests:
        file.seek(0)
        feed(digests, file, check)
    for algorithm, digest in digests.items():
        if digest.hexdigest() != expected[algorithm]:
            return algorithm, expected[algorithm], digest.hexdigest()
    return None


def feed(digests: Mapping[str, Any], file: BinaryIO, check: Callable[[], None]) -> None:
    """Put the rest of a file into all `digests`."""
    while data := file.read(_BUFFER_BYTES):
        check()
        for digest in digests.values():
            digest.update(data)


def parse_sri(text: str) -> tuple[str, str]:
    """The algorithm and hex digest of a Subresource Integrity value, the strongest if there are several.

    Parameters
    ----------
    text : str
        ``"sha256-"``, ``"sha384-"`` or ``"sha512-"`` and the digest in base64; several are set apart by spaces. As in
        https://www.w3.org/TR/SRI/ and in web-llm's ``integrity``.

    Raises
    ------
    ValueError
        It has another form.
    """
    found: dict[str, str] = {}
    for item in text.split():
        algorithm, _, rest = item.partition("-")
        encoded = rest.partition("?")[0]  # options, of which none is defined
        try:
            digest = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            digest = b""
        if algorithm not in _SRI_ALGORITHMS or len(digest) != hashlib.new(algorithm).digest_size:
            raise ValueError(
                f"not a digest in SRI form, such as 'sha256-…' with 44 characters of base64: {item[:120]!r}"
            )
        found[algorithm] = digest.hex()
    for algorithm in _SRI_ALGORITHMS:
        if algorithm in found:
            return algorithm, found[algorithm]
    raise ValueError(f"no digest in {re.sub(chr(10), ' ', text)[:120]!r}")
