"""Digests of a model's files, and those that the caller requires with the ``integrity`` option."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import BinaryIO, NamedTuple, Protocol, TypeAlias

from ..errors import ChecksumError, IntegrityError, ManifestLayoutError
from .manifest import Manifest, Shard
from .parse import parse_manifest

__all__ = [
    "Hasher",
    "Integrity",
    "Lock",
    "Mismatch",
    "check_manifest_digest",
    "check_names",
    "find_mismatch",
    "has_right_header",
    "is_manifest_name",
    "manifest_names_to_try",
    "new_hasher",
    "parse_sri",
    "update_from_file",
    "verify_and_parse",
]

#: The digests that the caller requires: file name → (algorithm, hex digest).
Integrity: TypeAlias = Mapping[str, tuple[str, str]]


class Lock(dict[str, tuple[str, str]]):
    """The digests of a lock file, which names every file of its model: those that it does not name are refused."""


_BUFFER_BYTES = 1 << 20
#: The algorithms of Subresource Integrity, strongest first.
_SRI_ALGORITHMS = ("sha512", "sha384", "sha256")


class Hasher(Protocol):
    """A hash object of `hashlib`."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class Mismatch(NamedTuple):
    """A digest that a file should have, and the one that it has."""

    algorithm: str
    expected: str
    received: str


# --- digests of files ---------------------------------------------------------------------------------


def new_hasher(algorithm: str) -> Hasher:
    """Return a new hash object, marked as not for security, so that FIPS builds of Python allow md5, too."""
    return hashlib.new(algorithm, usedforsecurity=False)


def update_from_file(
    hashers: Mapping[str, Hasher],
    file: BinaryIO,
    check: Callable[[], None],
    count: Callable[[int], None] = lambda _: None,
) -> None:
    """Read the rest of a file into all `hashers`; for each buffer call `check`, which may raise, and `count`."""
    while data := file.read(_BUFFER_BYTES):
        check()
        for hasher in hashers.values():
            hasher.update(data)
        count(len(data))


def find_mismatch(
    file: BinaryIO,
    expected: Mapping[str, str],
    check: Callable[[], None],
    count: Callable[[int], None] = lambda _: None,
) -> Mismatch | None:
    """Return the first expected digest that a file does not have, or None if it has all of them.

    Parameters
    ----------
    file : binary file
        Read once from start to end, unless `expected` is empty.
    expected : mapping
        Hex digests by algorithm.
    check : callable
        Called for each buffer; may raise to cancel.
    count : callable
        Called with the number of bytes of each buffer.
    """
    hashers = {algorithm: new_hasher(algorithm) for algorithm in expected}
    if hashers:
        file.seek(0)
        update_from_file(hashers, file, check, count)
    for algorithm, hasher in hashers.items():
        if (received := hasher.hexdigest()) != expected[algorithm]:
            return Mismatch(algorithm, expected[algorithm], received)
    return None


def has_right_header(file: BinaryIO, shard: Shard) -> bool:
    """Return whether a file begins with the header from which its records come, if it is a safetensors file."""
    if shard.header is None:
        return True
    length, digest = shard.header
    file.seek(0)
    start = b""
    while len(start) < length and (more := file.read(length - len(start))):
        start += more
    return hashlib.sha256(start).hexdigest() == digest


# --- digests that the caller requires -----------------------------------------------------------------


def parse_sri(text: str) -> tuple[str, str]:
    """Return the algorithm and hex digest of a Subresource Integrity value, the strongest if there are several.

    Parameters
    ----------
    text : str
        ``"sha256-"``, ``"sha384-"`` or ``"sha512-"`` and the digest in base64; several are separated by spaces. As in
        https://www.w3.org/TR/SRI/ and in web-llm's ``integrity``.

    Raises
    ------
    ValueError
        The text has another form.
    """
    found: dict[str, str] = {}
    for item in text.split():
        algorithm, _, rest = item.partition("-")
        encoded = rest.partition("?")[0]  # the standard allows options here, but defines none
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
    raise ValueError(f"no digest in {text[:120]!r}")


def manifest_names_to_try(names: Sequence[str], integrity: Integrity) -> tuple[str, ...]:
    """Return those of `names` that have a required digest, or all if no digest of a manifest is required.

    Raises
    ------
    ValueError
        Digests are required of other manifests only. An unverified manifest must not take their place.
    """
    required = tuple(name for name in names if name in integrity)
    others = sorted(name for name in integrity if is_manifest_name(name))
    if isinstance(integrity, Lock) and not required:
        raise ValueError(f"the lock is of another model: it does not name {' or '.join(names)}")
    if others and not required:
        raise ValueError(f"integrity is given for {' and '.join(others)}, and not for {' or '.join(names)}")
    return required or tuple(names)


def verify_and_parse(
    data: bytes,
    *,
    name: str,
    url: str,
    integrity: Integrity,
    check: Callable[[], None] = lambda: None,
    retryable: bool = True,
) -> Manifest:
    """Check a manifest's required digest, parse it, and attach their required digests to its shards.

    `check` is called now and then while parsing; it may raise to cancel. `retryable` says whether another attempt may
    get other bytes.

    Raises
    ------
    ChecksumError
        The manifest does not have its required digest.
    ManifestError
        The manifest cannot be used, or a digest is required of a file that the model does not have.
    """
    check_manifest_digest(data, name, url, integrity, retryable=retryable)
    manifest = parse_manifest(data, name=name, url=url, check=check)
    if not integrity:
        return manifest
    check_names(manifest.shards, integrity, name, url)
    shards = (replace(shard, required_digest=integrity.get(shard.data_path)) for shard in manifest.shards)
    return replace(manifest, shards=tuple(shards))


def check_manifest_digest(data: bytes, name: str, url: str, integrity: Integrity, *, retryable: bool = True) -> None:
    """Raise `ChecksumError` unless the manifest has its required digest, if there is one."""
    if name not in integrity:
        return
    algorithm, expected = integrity[name]
    received = hashlib.new(algorithm, data).hexdigest()
    if received != expected:
        demand = "lock file" if isinstance(integrity, Lock) else "integrity option"
        raise ChecksumError(
            f"the manifest's {algorithm} is {received} instead of {expected}",
            url=url,
            shard=name,
            expected=expected,
            received=received,
            hint=f"It is not the version that the {demand} names.",
            retryable=retryable,
        )


def check_names(shards: Iterable[Shard], integrity: Integrity, name: str, url: str | None = None) -> None:
    """Check that the digests that the caller requires are of files of the manifest, or may be of companion files.

    Raises
    ------
    ManifestLayoutError
        A digest is required of a shard that the manifest does not have.
    IntegrityError
        The manifest has a shard that a lock does not name.
    """
    files = {shard.data_path for shard in shards}
    for file in integrity:
        if file not in files and file.endswith((".bin", ".safetensors")) and not isinstance(integrity, Lock):
            raise ManifestLayoutError(
                f"integrity is given for {file!r}, which is not a file of this manifest", url=url, shard=name
            )
    if isinstance(integrity, Lock) and (unnamed := sorted(files - integrity.keys())):
        raise IntegrityError(
            f"{unnamed[0]!a} is a file of the model, and the lock does not name it",
            url=url,
            shard=unnamed[0],
            hint="If it is right, make a new lock.",
            retryable=False,
        )


def is_manifest_name(name: str) -> bool:
    """Return whether a file is a manifest or an index by its name, and so not a companion file."""
    return re.fullmatch(r"(tensor|ndarray)-cache[^/]*\.json|[^/]*\.safetensors\.index\.json", name) is not None
