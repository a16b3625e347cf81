"""Plans of downloads in words."""

from __future__ import annotations

from collections.abc import Iterator

from ...loaders.plan import FetchPlan, PlannedFile
from ...report.words import format_size

__all__ = ["plan_error", "plan_facts", "plan_rows"]

_ACTIONS = {"keep": "there already", "copy": "copied"}


def plan_rows(plan: FetchPlan) -> Iterator[tuple[str, str, str]]:
    """Yield the name, the size, and the bytes to fetch of each file."""
    for file in plan.files:
        yield file.name, _size(file.nbytes), _to_fetch(file)


def plan_facts(source: str, plan: FetchPlan) -> Iterator[tuple[str, str]]:
    """Yield labels and values that describe a plan: where, how many bytes, and whether there is room."""
    unknown = " and files of unknown size" if any(file.to_fetch is None for file in plan.files) else ""
    yield "source", source
    yield "directory", str(plan.directory)
    yield "to fetch", f"{format_size(plan.bytes_to_fetch)} of {format_size(plan.nbytes)}{unknown}"
    free = "unknown" if plan.free_bytes is None else format_size(plan.free_bytes)
    yield "free", f"{free}, {format_size(plan.bytes_to_write)} needed"


def plan_error(plan: FetchPlan) -> str | None:
    """Return what is missing on the disk; None if there is room."""
    if plan.has_room or plan.free_bytes is None:
        return None
    return f"no room: {format_size(plan.bytes_to_write)} needed, {format_size(plan.free_bytes)} free"


def _size(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else format_size(nbytes)


def _to_fetch(file: PlannedFile) -> str:
    return _ACTIONS[file.action] if file.action in _ACTIONS else _size(file.to_fetch)
