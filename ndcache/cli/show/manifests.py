"""Manifests as rows of tables and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ...format.manifest import Manifest, Record
from ...report.words import format_size

__all__ = ["dtype_rows", "manifest_json", "shard_rows", "tensor_rows"]


def shard_rows(manifest: Manifest) -> Iterator[tuple[str, str, str, str]]:
    """Yield the path, size, number of tensors and digest of each shard."""
    for shard in manifest.shards:
        digest = "none" if shard.integrity == "size" else shard.integrity
        yield shard.data_path, format_size(shard.nbytes), f"{len(shard.records):,}", digest


def tensor_rows(manifest: Manifest) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield the name, shape, dtype, size and shard of each tensor."""
    for shard in manifest.shards:
        for record in shard.records:
            size = format_size(record.nbytes)
            yield record.name, str(list(record.shape)), _dtype_words(record), size, shard.data_path


def dtype_rows(manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    """Yield each dtype with the number and stored size of its tensors, the largest first."""
    for dtype, (number, nbytes) in _by_dtype(manifest).items():
        yield dtype, f"{number:,}", format_size(nbytes)


def _dtype_words(record: Record) -> str:
    return f"{record.dtype} as {record.stored_dtype}" if record.is_bf16_encoded else record.dtype


def _by_dtype(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Return the number and stored bytes of the tensors of each dtype, the largest first."""
    numbers, nbytes = Counter[str](), Counter[str]()
    for record in manifest.records:
        numbers[_dtype_words(record)] += 1
        nbytes[_dtype_words(record)] += record.nbytes
    return {dtype: (numbers[dtype], size) for dtype, size in nbytes.most_common()}


def manifest_json(source: str, manifest: Manifest, *, has_shards: bool = True) -> dict[str, object]:
    """Return the JSON value that ``inspect --json`` prints."""
    value: dict[str, object] = {
        "source": source,
        "manifest": manifest.name,
        "metadata": dict(manifest.metadata),
        "nbytes": manifest.nbytes,
        "tensors": len(manifest),
        "dtypes": {
            dtype: {"tensors": number, "nbytes": nbytes} for dtype, (number, nbytes) in _by_dtype(manifest).items()
        },
    }
    if has_shards:
        value["shards"] = [
            {
                "path": shard.data_path,
                "nbytes": shard.nbytes,
                "md5": shard.md5sum,
                "sha256": shard.sha256sum,
                "tensors": [_record_json(record) for record in shard.records],
            }
            for shard in manifest.shards
        ]
    return value


def _record_json(record: Record) -> dict[str, object]:
    return {
        "name": record.name,
        "shape": list(record.shape),
        "dtype": record.dtype,
        "stored_dtype": record.stored_dtype,
        "offset": record.byte_offset,
        "nbytes": record.nbytes,
    }
