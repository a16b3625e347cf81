"""The JSON values that commands print; docs/guide/json.rst describes each field."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...export.conversion import ConvertReport
from ...format.manifest import Manifest
from ...loaders.plan import FetchPlan
from ...loaders.verification import VerifyReport
from ...weights import Weights
from ..values import locate_source, location_words
from .devices import device_words

if TYPE_CHECKING:
    from ..demo import DemoReport

__all__ = [
    "convert_json",
    "demo_json",
    "doctor_json",
    "dump_json",
    "fetch_json",
    "load_json",
    "plan_json",
    "verify_json",
]


def load_json(source: str, weights: Weights[Any]) -> dict[str, object]:
    """Return the value of ``load``."""
    stats = weights.stats
    return {
        "source": location_words(locate_source(source)),
        "device": device_words(weights.device),
        "tensors": len(weights),
        "nbytes": weights.nbytes,
        "seconds": round(stats.seconds["total"], 6),
        "network_bytes": stats.network_bytes,
        "cache_bytes": stats.cache_bytes,
        "resumed_bytes": stats.resumed_bytes,
        "requests": stats.requests,
        "retries": stats.retries,
        "shards": stats.shards,
        "checked": dict(stats.integrity),
        "files": list(stats.files),
        "failed_files": dict(stats.failed_files),
    }


def fetch_json(source: str, directory: Path) -> dict[str, object]:
    """Return the value of ``fetch`` for a source."""
    return {"source": location_words(locate_source(source)), "path": str(directory)}


def plan_json(source: str, plan: FetchPlan) -> dict[str, object]:
    """Return the value of ``fetch --dry-run`` for a source."""
    return {
        **fetch_json(source, plan.directory),
        "nbytes": plan.nbytes,
        "bytes_to_fetch": plan.bytes_to_fetch,
        "bytes_to_write": plan.bytes_to_write,
        "free_bytes": plan.free_bytes,
        "has_room": plan.has_room,
        "files": [
            {"name": file.name, "nbytes": file.nbytes, "action": file.action, "to_fetch": file.to_fetch}
            for file in plan.files
        ],
    }


def verify_json(name: str, report: VerifyReport) -> dict[str, object]:
    """Return the value of ``verify`` for a source, whose name has no secrets."""
    return {
        "source": name,
        "ok": report.ok,
        "complete": report.complete,
        "nbytes": report.nbytes,
        "checked": dict(report.checked),
        "bad": list(report.bad),
        "missing": list(report.missing),
        "kept": list(report.kept),
        "files": list(report.files),
        "has_manifest": report.has_manifest,
    }


def convert_json(report: ConvertReport) -> dict[str, object]:
    """Return the value of ``convert``."""
    return {
        "path": str(report.path),
        "format": report.format,
        "tensors": len(report.tensors),
        "nbytes": report.nbytes,
        "halved": list(report.halved),
    }


def dump_json(directory: Path, manifest: Manifest, halved: Sequence[str]) -> dict[str, object]:
    """Return the value of ``dump``."""
    return {
        "path": str(directory),
        "tensors": len(manifest),
        "nbytes": manifest.nbytes,
        "shards": len(manifest.shards),
        "halved": list(halved),
    }


def doctor_json(facts: Iterable[tuple[str, str]]) -> dict[str, object]:
    """Return the value of ``doctor``."""
    return {label: value for label, value in facts if label}


def demo_json(report: DemoReport) -> dict[str, object]:
    """Return the value of ``demo``."""
    return {
        "ok": report.ok,
        "tensors": len(report.manifest),
        "nbytes": report.manifest.nbytes,
        "loads": [
            {
                "title": load.title,
                "workers": load.workers,
                "seconds": round(load.seconds, 6),
                "wrong": list(load.wrong),
            }
            for load in report.loads
        ],
    }
