"""Measure the network over as many connections as the load had, and over more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import NdcacheError
from ...format.manifest import NameFilter
from ...loader import Loader
from ...loaders.probe import NetworkRate, measure_network
from ...report.words import format_count, format_size
from ..group import one_line
from .rates import Rate, Used, per_second

__all__ = ["network_rates"]

_MOST_BYTES = 256 << 20
_MOST_SECONDS = 10.0
#: The second measurement has this many times as many connections as the load, but no more than so many.
_TIMES = 4
_MOST_CONNECTIONS = 64
#: Several workers may share a file that is larger than this; see `sources.downloads`.
_SHARED_FILE_BYTES = 64 << 20
#: A process that keeps this much of a core busy may have no time to receive more.
_BUSY = 0.75


def network_rates(
    loader: Loader, source: str, names: NameFilter, trace: Any, sizes: Sequence[int], used: Used, *, is_limited: bool
) -> list[Rate]:
    """Return the rates of the network; none if the source is local.

    More connections than a load could use, given the sizes of the files, are not tried.
    """
    facts = trace["otherData"]
    workers = int(facts["workers"])
    connections = workers * int(facts.get("processes") or 1)

    def measure(count: int | None) -> NetworkRate | None:
        return measure_network(
            loader, source, names, connections=count, max_bytes=_MOST_BYTES, max_seconds=_MOST_SECONDS
        )

    try:
        # None lets the probe have fewer threads if file descriptors are scarce, as the load had.
        found = measure(None if connections == workers else connections)
    except NdcacheError as error:
        return [Rate("network", None, None, f"not measured: {one_line(error)}")]
    if found is None:
        return []
    first = _rate(found, used, ", within --limit-rate" if is_limited else "")
    useful = _MOST_CONNECTIONS if max(sizes, default=0) > _SHARED_FILE_BYTES else len(sizes)
    most = min(connections * _TIMES, _MOST_CONNECTIONS, useful)
    if is_limited or first.is_least or found.connections < connections or most <= connections:
        return [first]
    try:
        more = measure(most)
    except NdcacheError as error:  # some servers refuse so many
        return [first, Rate("network, more", None, None, f"not measured: {one_line(error)}")]
    assert more is not None
    return [first, _more_rate(more, found)] if more.connections > found.connections else [first]


def _rate(found: NetworkRate, used: Used, limited: str) -> Rate:
    rate = per_second(found.nbytes, found.seconds)
    is_least = found.busy_cores >= _BUSY
    share = used.share(used.stats.network_bytes, rate)
    how = f"{_over(found)}, neither checked nor kept{limited}"
    if is_least:
        how += f"; this process used {found.busy_cores:.1f} cores for it: the network may give more"
    return Rate("network", rate, share, how, is_least, found.connections)


def _more_rate(more: NetworkRate, found: NetworkRate) -> Rate:
    rate, before = per_second(more.nbytes, more.seconds), per_second(found.nbytes, found.seconds)
    times = f": {rate / before:.1f} times as much" if rate and before else ""
    return Rate("network, more", rate, None, f"{_over(more)}{times}", connections=more.connections)


def _over(found: NetworkRate) -> str:
    return f"{format_size(found.nbytes)} over {format_count(found.connections, 'connection')}"
