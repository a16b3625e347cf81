"""Loads, and those of the demonstration, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...report.words import format_checks, format_count, format_size
from ...weights import Weights
from ..demo import DemoReport
from ..values import locate_source, location_words
from .devices import device_words

__all__ = ["demo_rows", "load_facts"]


def load_facts(source: str, device: str, weights: Weights[Any]) -> Iterator[tuple[str, str]]:
    """Yield labels and values that describe a load: its source, device, tensors, time, bytes and checks."""
    stats, where, location = weights.stats, device_words(weights.device), locate_source(source)
    yield "source", location_words(location)
    yield "device", f"{where} (no hardware GPU was found)" if (device, where) == ("auto", "cpu") else where
    yield "tensors", f"{len(weights):,}, {format_size(weights.nbytes)}"
    yield "time", f"{stats.seconds['total']:.2f} s, {stats.speed}"
    if location.is_remote:
        retries = (
            f", {stats.retries:,} of them {'a retry' if stats.retries == 1 else 'retries'}" if stats.retries else ""
        )
        requests = format_count(stats.requests, "request")
        yield "from network", f"{format_size(stats.network_bytes)} in {requests}{retries}"
    if stats.resumed_bytes:
        yield "resumed", f"{format_size(stats.resumed_bytes)} from interrupted downloads"
    yield "from cache" if location.is_remote else "in place", format_size(stats.cache_bytes)
    checks = f"{format_count(stats.shards, 'shard')}: {format_checks(stats.integrity)}"
    # A cached file that is unchanged since it was checked is not hashed again.
    was_checked_before = location.is_remote and stats.cache_bytes and not stats.seconds["hash"]
    yield "checked", f"{checks}; cached shards when they were downloaded" if was_checked_before else checks


def demo_rows(report: DemoReport) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield the title, workers, seconds, rate and speed-up of each load."""
    nbytes, first = report.manifest.nbytes, report.loads[0].seconds
    for load in report.loads:
        rate, speedup = nbytes / 2**20 / load.seconds, first / load.seconds
        yield load.title, str(load.workers), f"{load.seconds:.2f}", f"{rate:,.1f}", f"{speedup:.1f}x"
