"""The messages between a parent and its helper processes: one request, then reports, each a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..format.manifest import Manifest, Shard
from ..stats import LoadStats

__all__ = ["HelperReport", "HelperRequest", "Wanted", "wanted_shards"]

#: A wanted shard: its index in the manifest, and the index, offset and bytes of each wanted record, of which only a
#: slice may be wanted; or None for the whole shard.
Wanted = tuple[int, "list[tuple[int, int, int]] | None"]
_COUNTS = ("network_bytes", "resumed_bytes", "requests", "retries")


@dataclass(frozen=True)
class HelperRequest:
    """Tell a helper how to download shards. It may hold secrets, so it goes through a pipe only.

    Attributes
    ----------
    package_root : str
        The directory from which the parent imported ndcache.
    source : str
    options : dict
        The options of a `Loader`; `retries` as the fields of a `RetryPolicy`.
    environ : dict of str to str
        The parent's environment.
    manifest_name, manifest_text : str
        The manifest that the parent uses.
    commits : dict of str to str
        The commits of branches on Hugging Face, by `Client.commits`.
    wanted : list
        The shards that were missing when the parent looked; see `Wanted`.
    log_level : int
        The least level of log records that the parent wants to have.
    local_dir : str or None
        Where files go instead of the cache.
    bucket : int or None
        The descriptor of the load's `TokenBucket`, which the helper inherits.
    old_files : dict or None
        The versions of files to download again; see `OldFiles`. None if none is.
    trace_started : float or None
        When the load's `Trace` began; None if there is none.
    """

    package_root: str
    source: str
    options: dict[str, Any] = field(repr=False)
    environ: dict[str, str] = field(repr=False)
    manifest_name: str
    manifest_text: str = field(repr=False)
    commits: dict[str, str]
    wanted: list[Wanted] = field(repr=False)
    log_level: int
    local_dir: str | None = None
    bucket: int | None = None
    old_files: dict[str, list[int]] | None = None
    trace_started: float | None = None

    def encode(self) -> bytes:
        """Return the request as a line."""
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"

    def shards(self, manifest: Manifest) -> list[Shard]:
        """Return the wanted shards, with the wanted bytes of the wanted records only."""
        return [_part(manifest.shards[index], records) for index, records in self.wanted]


def _part(shard: Shard, wanted: Sequence[tuple[int, int, int]] | None) -> Shard:
    if wanted is None:
        return shard
    # A slice keeps the shape of the whole tensor here, at which no download looks.
    records = ((shard.records[place], start, nbytes) for place, start, nbytes in wanted)
    return replace(
        shard,
        records=tuple(
            record if record.nbytes == nbytes else replace(record, byte_offset=start, nbytes=nbytes)
            for record, start, nbytes in records
        ),
    )


def wanted_shards(manifest: Manifest, shards: Iterable[Shard]) -> list[Wanted]:
    """Describe shards of a manifest, which may have some of their records only."""
    indices = {shard.data_path: index for index, shard in enumerate(manifest.shards)}
    wanted: list[Wanted] = []
    for shard in shards:
        index = indices[shard.data_path]
        whole = manifest.shards[index]
        records = None
        if shard.records != whole.records:
            places = {record.name: place for place, record in enumerate(whole.records)}
            records = [(places[record.name], record.byte_offset, record.nbytes) for record in shard.records]
        wanted.append((index, records))
    return wanted


@dataclass(frozen=True)
class HelperReport:
    """Count the work of a helper so far.

    Attributes
    ----------
    counts : dict of str to int
        Bytes, requests and retries since its start, by the names in `LoadStats`.
    seconds : dict of str to float
        Seconds since its start, by phase.
    published : list of str
        The shards that it has put into the cache since the last report.
    log : list of (int, str)
        Levels and texts of log records since the last report.
    events : list of dict
        Events since the last report, for the load's `Trace`.
    coming : dict of str to int
        The bytes of each shard that it receives now.
    pause : tuple of bool and str, or None
        Why its requests have to wait; see `Arrivals.first_pause`.
    is_done : bool
        Whether nothing is left for it to begin.
    """

    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    published: list[str] = field(default_factory=list)
    log: list[tuple[int, str]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    coming: dict[str, int] = field(default_factory=dict)
    pause: tuple[bool, str] | None = None
    is_done: bool = False

    @classmethod
    def of(cls, stats: LoadStats, **news: Any) -> HelperReport:
        """Return a report of a helper's statistics."""
        seconds = {phase: round(spent, 6) for phase, spent in stats.seconds.items() if spent}
        return cls({name: getattr(stats, name) for name in _COUNTS}, seconds, **news)

    @classmethod
    def decode(cls, line: bytes) -> HelperReport:
        """Return the report of a line.

        Raises
        ------
        ValueError
            It is none.
        """
        try:
            report = json.loads(line)
            return cls(**{each.name: report[each.name] for each in fields(cls)})
        except (KeyError, TypeError) as error:
            raise ValueError("this is no report") from error

    def encode(self) -> bytes:
        """Return the report as a line."""
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"

    def since(self, earlier: HelperReport) -> tuple[dict[str, int], dict[str, float]]:
        """Return counts and seconds, less those of an earlier report."""
        counts = {name: count - earlier.counts.get(name, 0) for name, count in self.counts.items()}
        return counts, {phase: spent - earlier.seconds.get(phase, 0.0) for phase, spent in self.seconds.items()}
