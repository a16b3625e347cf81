"""Digests that the caller demands of a model's files: the ``integrity`` option."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from ..errors import ChecksumError, ManifestLayoutError
from .manifest import Manifest
from .parse import parse_manifest

__all__ = ["Pins", "check_manifest_pin", "manifest_names_to_try", "open_manifest"]

#: By file name: the algorithm and the hex digest.
Pins: TypeAlias = Mapping[str, tuple[str, str]]


def manifest_names_to_try(names: Sequence[str], pins: Pins) -> tuple[str, ...]:
    """Of the names that the manifest may have, those that are pinned; all of them if no manifest is.

    Raises
    ------
    ValueError
        Manifests are pinned, but none of these: nothing unpinned is taken in their place.
    """
    pinned = tuple(name for name in names if name in pins)
    others = sorted(name for name in pins if _is_manifest(name))
    if others and not pinned:
        raise ValueError(f"integrity is given for {' and '.join(others)}, and not for {' or '.join(names)}")
    return pinned or tuple(names)


def open_manifest(
    data: bytes, *, name: str, url: str, pins: Pins, check: Callable[[], None] = lambda: None
) -> Manifest:
    """Parse a manifest, which must be what the caller has pinned, and give its shards their pins.

    `check` is called now and then; it may raise to end it.

    Raises
    ------
    ChecksumError
        It is not what was pinned.
    ManifestError
        It cannot be used, or a pin is of no file of this model.
    """
    check_manifest_pin(data, name, url, pins)
    manifest = parse_manifest(data, name=name, url=url, check=check)
    if not pins:
        return manifest
    files = {shard.data_path for shard in manifest.shards}
    for pinned in pins:
        if pinned not in files and not _is_manifest(pinned):
            raise ManifestLayoutError(
                f"integrity is given for {pinned!r}, which is no file of this manifest", url=url, shard=name
            )
    return replace(manifest, shards=tuple(replace(shard, pin=pins.get(shard.data_path)) for shard in manifest.shards))


def _is_manifest(name: str) -> bool:
    return "/" not in name and name.endswith(".json")  # as no shard's path does


def check_manifest_pin(data: bytes, name: str, url: str, pins: Pins) -> None:
    """Raise `ChecksumError` unless a manifest is what the caller has pinned, if it is pinned."""
    if name not in pins:
        return
    algorithm, expected = pins[name]
    actual = hashlib.new(algorithm, data).hexdigest()
    if actual != expected:
        raise ChecksumError(
            f"the manifest has the {algorithm} {actual}, and should have {expected}",
            url=url,
            shard=name,
            expected=expected,
            received=actual,
            hint="It is not the version that the integrity option names.",
        )
