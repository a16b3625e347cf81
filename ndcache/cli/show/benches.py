"""Measurements of this machine beside a load, in words and as JSON."""

from __future__ import annotations

from collections.abc import Iterator

from ...report.timeline import read_timeline
from ...report.verdict import judge
from ...report.words import format_rate, format_seconds, format_size
from ..bench.rates import BenchReport, Rate
from ..values import locate_source
from .devices import device_words

__all__ = ["bench_json", "bench_rows", "limit_sentence", "page_rates", "rates_sentence"]

_SUBJECTS = {
    "network": "the network gives",
    "disk, write": "the disk writes",
    "disk, read": "the disk reads",
    "device": "the device takes",
}
#: More connections are worth it if they give so many times as much.
_WORTH_IT = 1.2


def bench_rows(report: BenchReport) -> Iterator[tuple[str, str, str, str]]:
    """Yield the name, MiB/s, the load's share of it, and how it was measured; first of the load."""
    size, seconds = format_size(report.nbytes), format_seconds(report.seconds)
    opening = float(report.trace["otherData"]["seconds"]) - report.seconds
    after = f", after {format_seconds(opening)} to open the device" if opening > 0.1 * report.seconds else ""
    yield "load", _mib(report.nbytes / report.seconds), "", f"{size} in {seconds}{after}"
    for rate in report.rates:
        yield rate.name, _mib(rate.bytes_per_second), _percent(rate), rate.how


def page_rates(report: BenchReport) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the table on the page of the load."""
    for rate in report.rates:
        text = "–" if rate.bytes_per_second is None else format_rate(rate.bytes_per_second, 1)
        share = f"; the load used {_percent(rate)} of it" if rate.share is not None else ""
        yield rate.name, text, f"{rate.how}{share}"


def limit_sentence(report: BenchReport) -> str:
    """Return what limited the load, in words, or what it spent its time on."""
    found = rates_sentence(report)
    if report.limit is None:
        verdict = judge(read_timeline(report.trace))
        found = " ".join((found, verdict.spent or verdict.headline, *verdict.advice))
    return found


def rates_sentence(report: BenchReport) -> str:
    """Return which of the rates limited the load, in words."""
    limit, nearest = report.limit, report.nearest
    if limit is None:
        most = f": the load used at most {_percent(nearest)}, of what {_SUBJECTS[nearest.name]}" if nearest else ""
        return f"None of them was the limit{most}."
    is_own = limit.name == "network" and report.is_limited
    name = "--limit-rate" if is_own else f"The {limit.name.partition(',')[0]}"
    gives = "it lets through" if is_own else _SUBJECTS[limit.name]
    sentences = [f"{name} was the limit: the load used {_percent(limit)} of what {gives}."]
    more = next((rate for rate in report.rates if rate.name == "network, more"), None)
    if limit.name == "network" and more is not None:
        sentences += _more_words(limit, more)
    return " ".join(sentences)


def _more_words(limit: Rate, more: Rate) -> Iterator[str]:
    """Yield whether more connections would help."""
    if limit.bytes_per_second and more.bytes_per_second:
        times = more.bytes_per_second / limit.bytes_per_second
        if times >= _WORTH_IT:
            count = more.connections
            yield f"{count} connections give {times:.1f} times as much: try --max-workers {count}."
        else:
            yield f"{more.connections} connections give hardly more: the line or the server is at its limit."


def bench_json(source: str, report: BenchReport) -> dict[str, object]:
    """Return the value of ``bench``."""
    return {
        "source": str(locate_source(source)),
        "device": device_words(report.device),
        "tensors": report.tensors,
        "nbytes": report.nbytes,
        "seconds": round(report.seconds, 6),
        "network_bytes": report.stats.network_bytes,
        "limit": None if report.limit is None else report.limit.name,
        "rates": [
            {
                "name": rate.name,
                "bytes_per_second": None if rate.bytes_per_second is None else round(rate.bytes_per_second),
                "share": None if rate.share is None else round(rate.share, 4),
                "at_least": rate.is_least,
                "how": rate.how,
            }
            for rate in report.rates
        ],
    }


def _mib(rate: float | None) -> str:
    return "none" if rate is None else f"{rate / (1 << 20):,.1f}"


def _percent(rate: Rate) -> str:
    return "" if rate.share is None else f"{rate.share:.0%}".replace("%", " %")
