"""The texts of bars and of lines in a log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..report.words import format_count, format_rate, format_seconds, format_size
from ..urls.redact import printable
from .reports import ProgressReport

__all__ = ["Summary", "at_end", "bar_line", "bar_parts", "log_line", "summary_line"]

#: The least columns of a bar.
_LEAST_BAR = 8
#: The least columns of a name that is cut, and those that it gets before the number of shards.
_LEAST_NAME, _GOOD_NAME = 12, 24
#: The most columns of a name in a notebook, whose width is not known.
_NOTEBOOK_NAME = 32

#: Draws a bar: how much is done, from 0 to 1, and its columns.
DrawBar = Callable[[float, int], str]


@dataclass(frozen=True)
class Summary:
    """The result of a load.

    Attributes
    ----------
    how : str
        ``"Fetched"``; for a cached model ``"Mapped"``, ``"Loaded"``, ``"Cached"`` or ``"Checked"``.
    nbytes, shards : int
        What the load wanted, or `verify` found.
    absent : int
        How many shards more `verify` wanted, which are missing.
    received : int
        Bytes that came; fewer than `nbytes` if some were there before.
    seconds : float
    """

    how: str
    nbytes: int
    shards: int
    received: int
    seconds: float
    absent: int = 0


def summary_line(summary: Summary, model: str) -> str:
    """Return the last line about a load."""
    shards = format_count(summary.shards + summary.absent, "shard")
    if summary.absent:
        shards = f"{summary.shards:,} of {shards}"
    start = f"{summary.how} {_name(model)}: {format_size(summary.nbytes)} in {shards}"
    if summary.how == "Cached":  # nothing was done
        return start
    start = f"{start}, {format_seconds(summary.seconds)}"
    if summary.how == "Mapped":  # nothing was read, so a rate would be absurd
        return start
    if not summary.received:  # others brought all of it
        return start
    came = f", {format_size(summary.received)} of it now" if summary.received < 0.99 * summary.nbytes else ""
    return f"{start}, {format_rate(summary.received, summary.seconds)}{came}"


def at_end(report: ProgressReport) -> ProgressReport:
    """Return what a bar shows after a load that failed: no more bytes come, so there is no rate and no time left."""
    return replace(report, bytes_per_second=0.0, seconds_left=None)


def log_line(report: ProgressReport, verb: str) -> str:
    """Return a line about a load that goes on, or about what it waits for before it begins."""
    if report.waiting and not report.shards_total:
        return f"{verb} {_name(report.model)}: {report.waiting}"
    parts = [
        f"{verb} {_name(report.model)}: {_percent(report)}% of {format_size(report.bytes_total)}",
        f"{report.shards_here}/{format_count(report.shards_total, 'shard')}",
    ]
    if report.waiting:
        parts.append(report.waiting)
    elif report.bytes_per_second > 0:
        parts += [_rate(report), *_left(report)]
    return ", ".join(parts)


def bar_parts(report: ProgressReport) -> tuple[str, str]:
    """Return what stands on the left of a bar in a notebook, and on the right."""
    name = _cut_middle(_name(report.model), _NOTEBOOK_NAME, "…")
    _, *right = _parts(report)
    return f"{name} {_percent(report):3}%", printable(report.waiting) if report.waiting else "  ".join(
        filter(None, right)
    )


def bar_line(report: ProgressReport, columns: int, draw: DrawBar, ellipsis: str) -> str:
    """Return a line with a bar that is not wider than `columns`; leave out what does not fit.

    The bar becomes short before the name is cut. In its middle: names of models differ at both ends.

    Parameters
    ----------
    report : ProgressReport
    columns : int
    draw : callable
    ellipsis : str
        Stands where a text is cut.
    """
    if report.waiting:
        rest = f" {_percent(report):3}%  {printable(report.waiting)}"
        name = _cut_middle(_name(report.model), max(_LEAST_NAME, columns - _width(rest)), ellipsis)
        return _cut(name + rest, columns, ellipsis)
    _, amount, left, rate, shards = _parts(report)
    # So that the name does not move when the amount gets another digit.
    to_grow = max(0, len(_parts(replace(report, bytes_done=report.bytes_total))[1]) - len(amount))
    # The parts in the order in which they stand, from the most that may fit to the least.
    choices = [amount, rate, left, shards], [amount, rate, left], [amount, left], [left or amount]
    for parts in choices:
        right = "  ".join(part for part in parts if part)
        room = columns - len(right) - len(" 100% || ") - _LEAST_BAR - (to_grow if amount in parts else 0)
        least = _GOOD_NAME if shards in parts else _LEAST_NAME
        if room >= min(least, _width(_name(report.model))) or parts is choices[-1]:
            break
    name = _cut_middle(_name(report.model), max(room, _LEAST_NAME), ellipsis)
    start, width = f"{name} {_percent(report):3}% ", columns - _width(name) - len(right) - len(" 100% || ")
    if width < _LEAST_BAR:
        return _cut(start + right, columns, ellipsis)
    return f"{start}|{draw(report.progress, width)}| {right}"


def _parts(report: ProgressReport) -> tuple[str, str, str, str, str]:
    """Return name and percentage; amount; time left; rate; shards."""
    total = format_size(report.bytes_total)
    done = format_size(report.bytes_done)
    if done.rpartition(" ")[2] == total.rpartition(" ")[2]:
        done = done.rpartition(" ")[0]
    return (
        f"{_name(report.model)} {_percent(report):3}%",
        f"{done}/{total}",
        "".join(_left(report)),
        _rate(report) if report.bytes_per_second > 0 else "",
        f"{report.shards_here}/{format_count(report.shards_total, 'shard')}",
    )


def _name(model: str) -> str:
    return printable(model) or "model"


def _percent(report: ProgressReport) -> int:
    """Return the percentage, computed in integers: as a float, 29 % may be rounded down to 28."""
    if report.bytes_total and report.shards_done < report.shards_total:
        return report.bytes_done * 100 // report.bytes_total
    return int(report.progress * 100)


def _rate(report: ProgressReport) -> str:
    return format_rate(report.bytes_per_second, 1.0)


def _left(report: ProgressReport) -> list[str]:
    """Return the time that is left, if it is known and not over."""
    seconds = report.seconds_left
    if seconds is None or seconds >= 1e6 or report.bytes_done >= report.bytes_total:
        return []
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return [f"{hours}:{minutes:02}:{rest:02} left" if hours else f"{minutes}:{rest:02} left"]


def _width(text: str) -> int:
    """Return the columns that a text takes."""
    from tqdm.utils import disp_len  # takes a while to import, and loads without a bar do not need it

    return int(disp_len(text))


def _cut(text: str, columns: int, ellipsis: str) -> str:
    """Return `text`, with its end left out if it has more columns."""
    if _width(text) <= columns:
        return text
    while text and _width(text) + len(ellipsis) > columns:
        text = text[:-1]
    return text + ellipsis


def _cut_middle(text: str, columns: int, ellipsis: str) -> str:
    """Return `text`, with its middle left out if it has more columns."""
    if _width(text) <= columns:
        return text
    room = columns - len(ellipsis)
    end = text[::-1]
    while end and _width(end) > room // 2:
        end = end[:-1]
    return _cut(text, columns - _width(end), ellipsis) + end[::-1]
