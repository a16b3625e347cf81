"""Count the shards that the manifests of a model directory describe, and those that are there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import NdcacheError
from ...format.paths import check_path
from ...format.safetensors.headers import Headers, is_kept_header
from ...format.strict_json import MAX_KEPT_BYTES
from ..companion_note import CompanionNote
from ..directory import ModelDirectory

__all__ = ["Contents", "read_contents"]


@dataclass(frozen=True)
class Contents:
    """The shards of a model's directory.

    Attributes
    ----------
    manifests : tuple of str
        The names of the manifests in it.
    shards : int
        How many of the shards that they describe are there, with the right size.
    shards_total : int
        How many they describe.
    """

    manifests: tuple[str, ...]
    shards: int
    shards_total: int


def read_contents(directory: ModelDirectory) -> Contents:
    """Read all manifests in a model's directory, without checking more than the sizes of files."""
    manifests, sizes = [], dict[str, int]()
    with contextlib.suppress(OSError):  # of another account, or deleted just now
        companions = CompanionNote.read(directory.layout).files
        for file in sorted(directory.manifest_names()):
            if file not in companions and (found := _read_manifest(directory, file)) is not None:
                manifests.append(found[0])
                sizes.update(found[1])
    present = 0
    for name, nbytes in sizes.items():
        with contextlib.suppress(OSError):
            present += directory.size(name) == nbytes
    return Contents(tuple(manifests), present, len(sizes))


def _read_manifest(directory: ModelDirectory, file: str) -> tuple[str, Mapping[str, int]] | None:
    """Return a manifest's name and the sizes of its shards; None if the file is something else."""
    try:
        data = directory.read(file, MAX_KEPT_BYTES) or b""
        if is_kept_header(file):
            headers = Headers.decode(data)
            known = {each.name: each.nbytes for each in headers.files if each.nbytes is not None}
            if len(known) < len(headers.files):  # the server has not said how large the files are
                known = {shard.data_path: shard.nbytes for shard in headers.manifest(str, {}).shards}
            return headers.name, known
        if b'"records"' not in data:  # a tokenizer, say, which may be large
            return None
        sizes = {shard["dataPath"]: shard["nbytes"] for shard in json.loads(data)["records"]}
        for name, nbytes in sizes.items():
            check_path(name)
            if type(nbytes) is not int:
                return None
    except (NdcacheError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return file, sizes
