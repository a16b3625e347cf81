"""Name the limit of a load, and a remedy, in words."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .limits import GROUP_OF, GROUPS, REST, shares
from .timeline import Event, Timeline
from .words import format_count, format_rate, format_seconds, format_size

__all__ = ["Verdict", "judge"]

#: For each group of phases, or for the longest phase of a group: what was the limit, and what the time was spent on.
_WORDS = {
    "network": ("The network", "waiting for bytes"),
    "rate_limit": ("The server", "waiting because it refuses more requests"),
    "backoff": ("Failed requests", "pausing before retries"),
    "limit_rate": ("limit_rate", "waiting because of it"),
    "lock": ("Another process", "waiting for what it downloads"),
    "hash": ("Checking digests", "computing them"),
    "disk": ("The disk", "reading and writing files"),
    "decode": ("Decoding", "expanding bfloat16 and copying on the CPU"),
    "open_device": ("The device's driver", "opening the device"),
    "device": ("The device", "making tensors on it"),
    REST: ("No step of the load", "in Python between the steps, or in your own code"),
}
#: Below this, there is nothing to gain.
_SHORT_SECONDS = 0.05
#: A load that fails earlier has no limit worth a sentence.
_FAILED_SECONDS = 1.0
#: Workers, or cores, are busy if on average this part of them is.
_BUSY = 0.75
#: Several workers may share a file that is larger than this; see `sources.downloads`.
_SHARED_FILE_BYTES = 64 << 20
#: Files that are smaller than this on average cost their number, not their bytes.
_SMALL_FILE_BYTES = 1 << 20
_MANY_FILES = 32
#: With fewer cores, `processes="auto"` means one process.
_CORES_FOR_PROCESSES = 8


@dataclass(frozen=True)
class Verdict:
    """The limit of a load, in words.

    Attributes
    ----------
    limit : str
        A key of `GROUPS`, or ``"rest"``.
    headline : str
        The limit, and its part of the time.
    advice : tuple of str
        What to try.
    spent : str
        The second half of the headline: what most of the time was spent on.
    """

    limit: str
    headline: str
    advice: tuple[str, ...] = ()
    spent: str = ""


def judge(timeline: Timeline) -> Verdict:
    """Return what limited a load most, and what to try."""
    if not timeline.events:
        return Verdict(REST, "Nothing was loaded.")
    spent, total = shares(timeline), timeline.total
    limit = max(spent, key=lambda group: spent[group])
    is_failed = timeline.facts.get("outcome") in ("failed", "stopped")
    if total < _SHORT_SECONDS and not is_failed:
        return Verdict(limit, f"{format_seconds(total)} in all: there is little to gain.")
    phase, of_group = _longest_phase(limit, timeline)
    is_own = phase in _WORDS and phase != limit and (of_group > 0.5 or limit not in _WORDS)
    subject, doing = _WORDS[phase if is_own else limit]
    small = _small_files(timeline, phase) if (limit, phase) == ("disk", "publish") else ""
    if small:
        subject, doing = "The number of files", f"writing, syncing and naming {small}"
    part = round(spent[limit] * (of_group if is_own else 1) * 100 / total)
    share = f"{part} % of {format_seconds(total)} {doing}."
    if is_failed:
        return Verdict(limit, f"Until then: {share}" if total >= _FAILED_SECONDS else "")
    verb = "were" if phase == "backoff" else "was"
    was_limit = f"{verb} the limit" if part >= 50 or limit == REST else "took the largest part of the time"
    advice = tuple(_advice_for_small_files(timeline) if small else _advice(limit, phase if is_own else "", timeline))
    return Verdict(limit, f"{subject} {was_limit}: {share}", advice, f"It spent {share}")


def _longest_phase(group: str, timeline: Timeline) -> tuple[str, float]:
    """Return the longest phase of a group, and the part of the group's time that it has."""
    spent = {phase: _seconds(timeline, phase) for phase in GROUPS.get(group, (group,))}
    phase = max(spent, key=lambda phase: spent[phase])
    return phase, spent[phase] / (sum(spent.values()) or 1.0)


def _advice(limit: str, phase: str, timeline: Timeline) -> Iterator[str]:
    is_download = any(event.phase == "network" for event in timeline.events)
    if limit in ("hash", "decode") and (others := _busy_elsewhere(timeline)):
        yield others
        return
    match limit, phase:
        case "network", _:
            yield from _advice_for_network(timeline)
        case _, "limit_rate":
            yield "It is your own limit of bytes per second."
        case _, "rate_limit":
            yield "More workers do not help. A token or a mirror may have a higher limit."
        case _, "backoff":
            yield "The logger ndcache has the error of each try."
        case "lock", _:
            yield "Processes that load the same model share one download: nothing is lost."
        case "hash", _ if is_download and _may_have_processes(timeline):
            yield 'Digests take CPU: processes="auto" lets more cores download and check.'
        case "hash", _ if is_download:
            yield 'Digests take CPU. verify="never" compares only sizes, and would not notice wrong bytes.'
        case "hash", _:
            yield 'verify="download", the default, checks what is cached only when it is downloaded.'
        case "disk", _ if is_download:
            yield "Put the cache on a faster disk (cache_dir, or NDCACHE_HOME)."
        case "disk", _:
            yield "Put the model on a faster disk. A second load is faster if the system keeps the files in memory."
        case "decode", _:
            yield "decode=False leaves bfloat16 as it is, which a GPU expands itself; copy=False maps files if it can."
        case "rest", _ if files := _small_files(timeline):
            yield f"There are {files}: fewer, larger shards would help."
        case _, "open_device":
            yield "A process that loads again opens it faster."
        case "device", _ if (seconds := _seconds(timeline, "memory_limit")) > timeline.total / 4:
            yield _advice_for_memory(seconds)


def _advice_for_network(timeline: Timeline) -> Iterator[str]:
    shards = timeline.facts.get("shards") or {}
    network = [
        event
        for event in timeline.events
        if GROUP_OF.get(event.phase) == "network" and (event.file in shards or not shards)
    ]
    bodies = [event for event in network if event.phase == "network"]
    labels = {timeline.threads[event.thread] for event in network}
    processes = 1 + len({label.partition(".")[0] for label in labels if label.startswith("helper")})
    workers = int(timeline.facts.get("workers") or len({event.thread for event in network})) * processes
    mean = _mean_running(network)
    received = sum(event.end - event.start for event in bodies)
    waited = sum(event.end - event.start for event in network) - received
    if waited > received:
        yield f"The server took {format_seconds(waited / (len(network) - len(bodies) or 1))} to answer a request."
    elif received and (nbytes := sum(event.nbytes for event in bodies)):
        yield f"One connection gave {format_rate(nbytes, received)} on average, {mean:.1f} at a time."
    if (retries := int(timeline.stats.get("retries") or 0)) > 0:
        yield f"{format_count(retries, 'request')} had to be made again."
    if not bodies:  # there were only requests for the manifest
        return
    useful = _useful_connections(shards, bodies)
    busy_cores, cores = _busy_cores(timeline), int(timeline.facts.get("cores") or 0)
    if (seconds := _seconds(timeline, "memory_limit")) > timeline.total / 4:
        yield _advice_for_memory(seconds)
    elif useful is not None and useful <= workers:
        yield f"{format_count(useful, 'file')} came from the network, for {workers} workers: more would not help."
    elif cores and busy_cores >= _BUSY * cores:
        yield f"{busy_cores:.1f} cores were busy, of {cores}: more workers would hardly help."
    elif useful is not None and useful < 2 * workers and mean < _BUSY * workers and _most_running(network) >= workers:
        yield f"{useful} files came from the network, for {workers} workers: the last ones came alone."
        yield f"With max_workers={-(-useful // processes)}, all would come at once."
    elif mean >= _BUSY * workers:
        most = min(2 * workers, useful or 2 * workers)
        yield (
            f"All {workers} workers were busy: try more workers (max_workers={-(-most // processes)})."
            " If they get no more in all, the line or the server is at its limit."
        )
    else:
        yield f"{mean:.1f} of {workers} workers were busy on average: more would not help."


def _may_have_processes(timeline: Timeline) -> bool:
    """Return whether `processes="auto"` could start some."""
    return not timeline.facts.get("processes") and int(timeline.facts.get("cores") or 0) >= _CORES_FOR_PROCESSES


def _busy_elsewhere(timeline: Timeline) -> str:
    """Return a sentence if threads had work for the CPU and did not get it."""
    cores, busy = int(timeline.facts.get("cores") or 0), _busy_cores(timeline)
    had_work = (_seconds(timeline, "hash") + _seconds(timeline, "decode")) / timeline.total
    if not busy or busy >= min(cores, had_work) / 2:
        return ""
    return f"It got {busy:.1f} of {cores} cores, and had work for more: other programs may have kept them busy."


def _small_files(timeline: Timeline, phase: str | None = None) -> str:
    """Return how many files there are, or have this phase, and how small they are; nothing if few, or not small."""
    shards = timeline.facts.get("shards") or {}
    files = [event.file for event in timeline.events if event.phase == phase] if phase else list(shards)
    sizes = [int(shards[file][0]) for file in files if file in shards]
    if len(sizes) < _MANY_FILES or sum(sizes) >= _SMALL_FILE_BYTES * len(sizes):
        return ""
    return f"{format_count(len(sizes), 'file')} of {format_size(sum(sizes) / len(sizes))} on average"


def _advice_for_small_files(timeline: Timeline) -> Iterator[str]:
    yield "Fewer, larger shards would help."
    if (busy := _busy_cores(timeline)) >= _BUSY:
        yield f"{busy:.1f} cores were busy: a faster disk would hardly help."


def _busy_cores(timeline: Timeline) -> float:
    return float(timeline.facts.get("cpu_seconds") or 0.0) / timeline.total


def _advice_for_memory(seconds: float) -> str:
    return f"Workers waited {format_seconds(seconds)} because of memory_limit: try a larger one."


def _useful_connections(shards: Mapping[str, Any], bodies: Sequence[Event]) -> int | None:
    """Return the number of files received, of which each takes one connection; None if several may share a file."""
    files = {event.file for event in bodies}
    largest = max((int(shards[file][0]) for file in files if file in shards), default=0)
    return None if largest > _SHARED_FILE_BYTES else len(files)


def _seconds(timeline: Timeline, phase: str) -> float:
    """Return the seconds of a phase, also as a part of others."""
    whole = sum(event.end - event.start for event in timeline.events if event.phase == phase)
    return whole + sum(event.parts.get(phase, 0.0) for event in timeline.events)


def _most_running(events: Sequence[Event]) -> int:
    """Return how many of these events run at once at most."""
    steps = sorted(step for event in events for step in ((event.start, 1), (event.end, -1)))
    return max(itertools.accumulate(step for _, step in steps), default=0)


def _mean_running(events: Sequence[Event]) -> float:
    """Return how many of these events run at once, on average over the time in which any does."""
    busy = sum(event.end - event.start for event in events)
    covered, end = 0.0, 0.0
    for event in events:  # in the order of their starts
        covered += max(event.end - max(event.start, end), 0.0)
        end = max(end, event.end)
    return busy / covered if covered else 0.0
