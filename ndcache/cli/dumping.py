"""The inputs of ``ndcache dump``: an .npz file, or a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..export.targets import parse_target
from ..format.manifest import Manifest
from ..format.shard_writer import Encoding
from ..format.writer import dump
from .group import UserError, argument_errors
from .npz_files import NpzError, read_npz
from .options import make_loader

__all__ = ["dump_input"]


def dump_input(
    source: str,
    target: str,
    options: Mapping[str, Any],
    encode: Encoding,
    shard_bytes: int,
    *,
    progress: bool,
) -> tuple[Path, Manifest, tuple[str, ...]]:
    """Write the arrays of an .npz file, or a model that a loader with `options` reads, as an NDArray cache.

    Returns
    -------
    directory : pathlib.Path
        That of `target`, which may also be the path of a manifest in it.
    manifest : Manifest
    halved : tuple of str
        The tensors whose float32 was rounded to bfloat16.

    Raises
    ------
    UserError, NdcacheError, OSError
    """
    with argument_errors():
        place = parse_target(target, "tensor-cache").path
    is_folder, path = place == Path(os.path.abspath(target)), Path(source)
    directory = Path(target) if is_folder else Path(target).parent
    if path.suffix.lower() == ".npz" and "://" not in source:
        try:
            manifest = dump(read_npz(path), directory, encode=encode, shard_bytes=shard_bytes)
        except NpzError as error:
            raise UserError(str(error)) from error
        return directory, manifest, tuple(record.name for record in manifest.records if record.is_bf16_encoded)
    if path.is_file() and path.suffix.lower() not in (".safetensors", ".json"):
        raise UserError(f"{path} is neither .safetensors nor .npz, and not the manifest of a model")
    with make_loader(options, source) as loader, make_loader({}) as plain:
        report = loader.convert(
            source, directory, format="tensor-cache", encode=encode, shard_bytes=shard_bytes, progress=progress
        )
        return directory, plain.read_manifest(directory), report.halved
