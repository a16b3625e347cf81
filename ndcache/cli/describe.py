"""Put models, loads and reports into words: labelled facts, rows of tables, and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..devices.gpu.adapters import is_software
from ..devices.torch.framework import is_torch_device
from ..devices.torch.opening import describe_device
from ..format.manifest import Manifest, Record
from ..location import locate
from ..pipeline import VerifyReport
from ..store.inventory import CachedModel
from ..weights import Weights
from .demo import DemoReport

if TYPE_CHECKING:
    import wgpu

__all__ = [
    "adapter_words",
    "demo_rows",
    "device_words",
    "dtype_rows",
    "format_count",
    "format_size",
    "load_facts",
    "manifest_json",
    "model_json",
    "shard_rows",
    "tensor_rows",
    "verify_error",
    "verify_facts",
]

# --- sizes, numbers, devices --------------------------------------------------------------------------


def format_size(nbytes: int) -> str:
    """Return a number of bytes as text: ``"1.5 MiB"``."""
    if nbytes < 1 << 10:
        return f"{nbytes} B"
    unit, name = next((unit, name) for unit, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if nbytes >= 1 << unit)
    return f"{nbytes / (1 << unit):,.1f} {name}"


def format_count(number: int, noun: str) -> str:
    """Return a number of things as text: ``"1 shard"``, ``"2 shards"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _format_checks(checks: Iterable[tuple[str, int]]) -> str:
    """Return the number of shards that passed each check: ``"3 by md5, 1 by size alone"``."""
    words = [f"{number:,} by {'size alone' if check == 'size' else check}" for check, number in checks]
    return ", ".join(words) or "nothing"


def device_words(device: Any) -> str:
    """Return a `Weights.device` in words: the CPU, the adapter's name, kind and backend, or a device of PyTorch."""
    if device == "cpu":
        return "cpu"
    return describe_device(device) if is_torch_device(device) else adapter_words(device.adapter)


def adapter_words(adapter: wgpu.GPUAdapter) -> str:
    """Return an adapter's name, kind and backend."""
    info = adapter.info
    kind = "software" if is_software(adapter) else info["adapter_type"]
    return f"{info['device']}, {kind}, {info['backend_type']}"


# --- a load -------------------------------------------------------------------------------------------


def load_facts(source: str, device: str, weights: Weights[Any]) -> Iterator[tuple[str, str]]:
    """Yield labels and values that describe a load: its source, device, tensors, time, bytes and checks."""
    stats, where, location = weights.stats, device_words(weights.device), locate(source)
    yield "source", str(location)
    yield "device", f"{where} (no hardware GPU was found)" if (device, where) == ("auto", "cpu") else where
    yield "tensors", f"{len(weights):,}, {format_size(weights.nbytes)}"
    rate = stats.gb_per_second * 1e9 / 2**20
    yield "time", f"{stats.seconds['total']:.2f} s, {rate:,.1f} MiB/s"
    if location.is_remote:
        retries = f", {stats.retries:,} of them retries" if stats.retries else ""
        requests = format_count(stats.requests, "request")
        yield "from network", f"{format_size(stats.network_bytes)} in {requests}{retries}"
    if stats.resumed_bytes:
        yield "resumed", f"{format_size(stats.resumed_bytes)} from interrupted downloads"
    yield "from cache" if location.is_remote else "in place", format_size(stats.cache_bytes)
    checks = f"{format_count(stats.shards, 'shard')}: {_format_checks(stats.integrity.most_common())}"
    # A cached file that is unchanged since it was checked is not hashed again.
    was_checked_before = location.is_remote and stats.cache_bytes and not stats.seconds["hash"]
    yield "checked", f"{checks}; cached shards when they were downloaded" if was_checked_before else checks


# --- manifests ----------------------------------------------------------------------------------------


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


def manifest_json(source: str, manifest: Manifest) -> dict[str, object]:
    """Return the JSON value that ``inspect --json`` prints."""
    return {
        "source": source,
        "manifest": manifest.name,
        "metadata": dict(manifest.metadata),
        "nbytes": manifest.nbytes,
        "tensors": len(manifest),
        "dtypes": {
            dtype: {"tensors": number, "nbytes": nbytes} for dtype, (number, nbytes) in _by_dtype(manifest).items()
        },
        "shards": [
            {
                "path": shard.data_path,
                "nbytes": shard.nbytes,
                "md5": shard.md5sum,
                "sha256": shard.sha256sum,
                "tensors": [_record_json(record) for record in shard.records],
            }
            for shard in manifest.shards
        ],
    }


def _record_json(record: Record) -> dict[str, object]:
    return {
        "name": record.name,
        "shape": list(record.shape),
        "dtype": record.dtype,
        "stored_dtype": record.stored_dtype,
        "offset": record.byte_offset,
        "nbytes": record.nbytes,
    }


# --- the cache ----------------------------------------------------------------------------------------


def model_json(model: CachedModel) -> dict[str, object]:
    """Return the JSON value that ``ls --json`` prints for a model."""
    return {"scope": model.scope, "source": model.source, "nbytes": model.nbytes, "path": str(model.path)}


def verify_facts(report: VerifyReport, *, is_remote: bool) -> Iterator[tuple[str, str]]:
    """Yield labels and values that say which shards are good, bad and missing."""
    checks = _format_checks(Counter(report.checked.values()).items())
    yield "good", f"{format_count(len(report.checked), 'shard')}, {format_size(report.nbytes)}: {checks}"
    for name in report.bad:
        yield "bad", name
    if report.missing and is_remote:
        yield "missing", f"{format_count(len(report.missing), 'shard')}, not downloaded yet"
    elif report.missing:
        for name in report.missing:
            yield "missing", name


def verify_error(report: VerifyReport, *, is_remote: bool) -> str | None:
    """Return a model's problem and its remedy, or None if all is well. A cached model may lack shards."""
    number = len(report.bad) if is_remote else len(report.bad) + len(report.missing)
    if number == 0:
        return None
    shards, them = format_count(number, "shard"), "it" if number == 1 else "them"
    if not is_remote:
        return f"{shards} bad or missing; copy {them} again"
    if report.kept:
        return (
            f"{shards} bad; {len(report.kept):,} could not be set aside: "
            "load with --verify always, or use another cache directory"
        )
    return f"{shards} bad and set aside; the next load downloads {them} again"


# --- the demonstration --------------------------------------------------------------------------------


def demo_rows(report: DemoReport) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield the title, workers, seconds, rate and speed-up of each load."""
    nbytes, first = report.manifest.nbytes, report.loads[0].seconds
    for load in report.loads:
        rate, speedup = nbytes / 2**20 / load.seconds, first / load.seconds
        yield load.title, str(load.workers), f"{load.seconds:.2f}", f"{rate:,.1f}", f"{speedup:.1f}x"
