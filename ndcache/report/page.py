"""A page about a load, for a browser: one file that needs no network."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from .._version import __version__
from .limits import GROUP_OF, shares
from .timeline import Event, Timeline, read_timeline
from .verdict import judge
from .words import format_checks, format_count, format_seconds, format_size, format_speed

__all__ = ["render_page", "write_text"]

#: Smaller parts of an event are not drawn, as its bar has a height of 16 pixels.
_LEAST_PART = 0.05


def render_page(content: Any, rates: Sequence[tuple[str, str, str]] = (), remark: str = "") -> str:
    """Return the HTML page of a trace.

    Parameters
    ----------
    content : mapping
        The content of a trace.
    rates : sequence of (str, str, str)
        What this machine can do: the name, the rate, and how it was measured.
    remark : str
        A sentence about the rates.

    Raises
    ------
    ValueError
        It is not a trace of ndcache.
    """
    timeline = read_timeline(content)
    parts = {name: _part(f"page.{name}") for name in ("html", "css", "js")}
    # As JSON has no "<" outside of texts, the element of the page cannot end early.
    values = {**_page_data(timeline), "rates": rates, "remark": remark}
    data = json.dumps(values, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    page = parts["html"].replace("{title}", escape(_title(timeline))).replace("{css}", parts["css"])
    return page.replace("{js}", parts["js"]).replace("{data}", data)


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole, or leave it as it was. A link, device or pipe stays, and what it leads to is written."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = Path(os.path.realpath(path))
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except BaseException as error:
        fresh.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # not the temporary name, or none
        raise


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _title(timeline: Timeline) -> str:
    return f"Load of {timeline.facts.get('source') or 'a model'}"


def _page_data(timeline: Timeline) -> dict[str, Any]:
    """Return what the page shows. Events are rows of numbers, as there may be many."""
    verdict, spent = judge(timeline), shares(timeline)
    known: Mapping[str, Any] = timeline.facts.get("shards") or {}
    phases = list(dict.fromkeys(phase for event in timeline.events for phase in (event.phase, *event.parts)))
    files = list(dict.fromkeys([*known, *(event.file for event in timeline.events if event.file)]))
    details = list(dict.fromkeys(event.detail for event in timeline.events))
    at = {name: {text: index for index, text in enumerate(texts)} for name, texts in (("f", files), ("d", details))}
    phase_at = {phase: index for index, phase in enumerate(phases)}
    return {
        "title": _title(timeline),
        "outcome": timeline.facts.get("outcome") or "",
        "error": timeline.facts.get("error") or "",
        "headline": verdict.headline,
        "advice": verdict.advice,
        "facts": list(_facts(timeline)),
        "total": timeline.total,
        "shares": [[group, seconds] for group, seconds in spent.items()],
        "threads": timeline.threads,
        "workers": timeline.facts.get("workers") or 0,
        "phases": [[phase, GROUP_OF.get(phase, "wait")] for phase in phases],
        "files": files,
        "details": details,
        "events": [
            [
                event.thread,
                phase_at[event.phase],
                round(event.start * 1e6),
                round((event.end - event.start) * 1e6),
                at["f"].get(event.file, -1),
                event.nbytes,
                at["d"][event.detail],
                [[phase_at[phase], part] for phase, part in _parts(event)],
            ]
            for event in timeline.events
        ],
        "shards": [[at["f"][path], *row] for path, row in known.items()],
        "version": __version__,
    }


def _parts(event: Event) -> Iterator[tuple[str, float]]:
    """Yield the other phases in an event, and which part of it each has, if that can be seen."""
    for phase, seconds in event.parts.items():
        if (part := seconds / ((event.end - event.start) or 1.0)) >= _LEAST_PART:
            yield phase, round(part, 3)


def _facts(timeline: Timeline) -> Iterator[tuple[str, str]]:
    facts, stats = timeline.facts, timeline.stats
    total = timeline.total
    if started := facts.get("started"):
        yield "started", datetime.fromtimestamp(float(started)).strftime("%Y-%m-%d %H:%M:%S")
    if stats:
        nbytes = int(stats["nbytes"])
        yield "time", format_seconds(total)
        speed = format_speed(facts.get("how") or "", nbytes, total)
        yield "loaded", f"{format_size(nbytes)}, {speed}" if nbytes else "nothing"
        if known := facts.get("shards"):
            yield "shards", f"{stats['shards']:,} of {len(known):,}"
        if stats["tensors"]:
            yield "tensors", f"{stats['tensors']:,}"
        words = "a retry" if stats["retries"] == 1 else "retries"
        retries = f", {stats['retries']:,} of them {words}" if stats["retries"] else ""
        requests = format_count(int(stats["requests"]), "request")
        yield "network", f"{format_size(int(stats['network_bytes']))} in {requests}{retries}"
        yield "cache", format_size(int(stats["cache_bytes"]))
        yield "checked", format_checks(stats["integrity"])
        yield "most in flight", format_size(int(stats["peak_bytes_in_flight"]))
    if workers := facts.get("workers"):
        processes = facts.get("processes")
        yield "workers", f"{processes} processes with {workers} each" if processes else f"{workers}"
    if (cpu_seconds := facts.get("cpu_seconds")) and (cores := facts.get("cores")):
        yield "cores busy", f"{cpu_seconds / total if total else 0:.1f} of {cores}"
    if facts.get("device"):
        yield "device", str(facts["device"])
