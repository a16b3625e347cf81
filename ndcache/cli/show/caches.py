"""Cached models, and their checks, in words and as JSON."""

from __future__ import annotations

import dataclasses
import errno
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from ...loaders.verification import VerifyReport
from ...report.words import format_checks, format_count, format_size
from ...store.housekeeping.listing import CachedModel
from ...store.housekeeping.pruning import PruneReport
from ...urls.redact import printable
from ..group import error_json

__all__ = [
    "denied_json",
    "denied_words",
    "format_age",
    "model_columns",
    "model_json",
    "model_name",
    "model_rows",
    "prune_json",
    "prune_lines",
    "prune_total",
    "total_words",
    "verify_error",
    "verify_facts",
    "verify_gap",
]


def model_json(model: CachedModel) -> dict[str, object]:
    """Return the JSON value that ``ls --json`` prints for a model."""
    fields = {**dataclasses.asdict(model), "path": str(model.path), "manifests": list(model.manifests)}
    fields |= {"created": model.created.isoformat(), "last_used": model.last_used.isoformat()}
    return {**fields, "complete": model.complete, "state": model.state}


def denied_json(path: Path) -> dict[str, object]:
    """Return the JSON value of a folder of the cache that this account may not read."""
    error = PermissionError(errno.EACCES, "this account may not read it", str(path))
    return {"path": str(path), **error_json(None, error)}


def denied_words(denied: Sequence[Path]) -> str:
    """Return a sentence about the folders of the cache that this account may not read."""
    them = "it" if len(denied) == 1 else "them"
    shown = ", ".join(map(str, denied[:3])) + (", ..." if len(denied) > 3 else "")
    folders = format_count(len(denied), "folder")
    return printable(f"{folders} of the cache left out, as this account may not read {them}: {shown}")


def model_name(model: CachedModel) -> str:
    """Return a model's source, and its scope if that is not the usual one."""
    scope = "" if model.scope == "default" else f" (scope {model.scope})"
    return printable(f"{model.source}{scope}")


def model_columns(found: Sequence[CachedModel], *, has_paths: bool) -> list[str]:
    """Return the columns of a list of models: those that say something about these."""
    columns = ["scope"] if any(model.scope != "default" for model in found) else []
    columns += ["source", "state", "size "]
    columns += ["shared "] if any(model.shared for model in found) else []
    return [*columns, "age", "last use", *(["path"] if has_paths else [])]


def model_rows(found: Iterable[CachedModel], columns: Sequence[str]) -> Iterator[list[str]]:
    """Yield the cells of each model's row."""
    now = datetime.now(timezone.utc)
    for model in found:
        used = format_age((now - model.last_used).total_seconds())
        cells = {
            "scope": model.scope,
            "source": model.source,
            "state": model.state,
            "size ": format_size(model.size),
            "shared ": format_size(model.shared) if model.shared else "",
            "age": format_age((now - model.created).total_seconds()),
            "last use": "in use" if model.in_use else "now" if used == "now" else f"{used} ago",
            "path": str(model.path),
        }
        yield [cells[column] for column in columns]


def total_words(found: Collection[CachedModel], everything: Collection[CachedModel]) -> str:
    """Return the number and size of the listed models, and of all if there are more."""
    text = f"{format_count(len(found), 'model')}, {format_size(sum(model.size for model in found))}"
    if len(found) == len(everything):
        return text
    return f"{text}, of {len(everything):,}, {format_size(sum(model.size for model in everything))}"


def format_age(seconds: float) -> str:
    """Return a time that has passed, in its largest unit: ``"3 days"``, ``"1 hour"``, or ``"now"``."""
    for unit, noun in ((365 * 86400, "year"), (86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= unit:
            return format_count(int(seconds // unit), noun)
    return "now"


def prune_json(report: PruneReport, denied: Sequence[Path]) -> dict[str, object]:
    """Return the JSON value of ``rm`` and ``prune``."""
    removed = zip(report.removed, report.freed_each, strict=True)
    return {
        "removed": [{**_name_json(model), "freed": freed} for model, freed in removed],
        "in_use": [_name_json(model) for model in report.in_use],
        "cleaned": [_name_json(model) for model in report.cleaned],
        "unmatched": list(report.unmatched),
        "unreadable": list(map(str, denied)),
        "errors": [str(error) for error in report.failed],
        "freed": report.freed,
        "size": report.size,
        "dry_run": report.dry_run,
    }


def _name_json(model: CachedModel) -> dict[str, object]:
    return {"source": model.source, "scope": model.scope, "path": str(model.path)}


def prune_lines(report: PruneReport) -> Iterator[str]:
    """Yield a line for each model that was removed, or would be, and for each from which files were."""
    verb = "would be freed" if report.dry_run else "freed"
    for model, freed in zip(report.removed, report.freed_each, strict=True):
        yield f"{model_name(model)}: {format_size(freed)} {verb}"
    kept = "would be kept" if report.dry_run else "kept"
    for model in report.cleaned:
        yield f"{model_name(model)}: {kept} without its leftovers"


def prune_total(report: PruneReport) -> str:
    """Return how many bytes were freed in all, or would be, and how many the cache has then."""
    if report.dry_run:
        return f"{format_size(report.freed)} would be freed, and {format_size(report.size)} kept"
    return f"{format_size(report.freed)} freed, {format_size(report.size)} kept"


def verify_facts(report: VerifyReport, *, is_remote: bool) -> Iterator[tuple[str, str]]:
    """Yield labels and values that say which files are good, bad and missing."""
    checks = format_checks(Counter(report.checked.values()))
    files = sum(name in report.files for name in report.checked)
    if not report.has_manifest:
        good = format_count(files, "file")
    else:
        good = format_count(len(report.checked) - files, "shard")
        good += f" and {format_count(files, 'companion file')}" if files else ""
    yield "good", f"{good}, {format_size(report.nbytes)}: {checks}"
    for name in report.bad:
        yield "bad", name
    if report.missing and is_remote:
        yield "missing", f"{_format_files(report.missing, report)}, not downloaded yet"
    elif report.missing:
        for name in report.missing:
            yield "missing", name


def _format_files(names: Collection[str], report: VerifyReport) -> str:
    """Return how many these are: ``"2 shards"``, or ``"2 files"`` if companion files are among them."""
    return format_count(len(names), "file" if any(name in report.files for name in names) else "shard")


def verify_error(report: VerifyReport, *, is_remote: bool) -> str | None:
    """Return a model's problem and its remedy, or None if all is well. A cached model may lack shards."""
    number = len(report.bad) if is_remote else len(report.bad) + len(report.missing)
    if number == 0:
        return None
    bad = report.bad if is_remote else (*report.bad, *report.missing)
    shards, them = _format_files(bad, report), "it" if number == 1 else "them"
    if not is_remote:
        return f"{shards} bad or missing; copy {them} again"
    if report.kept:
        return (
            f"{shards} bad; {len(report.kept):,} could not be set aside: "
            "load with --verify always, or use another cache directory"
        )
    return f"{shards} bad and set aside; the next load downloads {them} again"


def verify_gap(report: VerifyReport) -> str | None:
    """Return what is missing of a cached model, or may be; None if all is there."""
    if not report.missing:
        return None if report.has_manifest else "there is no manifest that says which shards there should be"
    total = len(report.missing) + len(report.checked) + len(report.bad)
    return (
        f"the model is not complete: {len(report.missing):,} of {format_count(total, 'file')}"
        f" {'is' if len(report.missing) == 1 else 'are'} missing, and the next load downloads"
        f" {'it' if len(report.missing) == 1 else 'them'}"
    )
