"""The events of a load, read from its trace."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..urls.redact import redact

__all__ = ["Event", "Timeline", "read_timeline"]

#: Events of one tensor each: those of one shard, one after another on a thread, are shown as one.
_MERGED = frozenset({"place"})
#: Seconds between two of these events that are shown as one. More is the caller's own code.
_LEAST_GAP = 1e-4
#: Less is no wait, but the time that it takes to look.
_LEAST_WAIT = 0.001

#: The ID of a process, and of a thread in it.
_Thread = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Event:
    """A phase of a load, on one thread.

    Attributes
    ----------
    phase : str
        A key of `LoadStats.seconds`.
    thread : int
        The index of the thread.
    start, end : float
        Seconds since the load began.
    file : str
        The ``dataPath`` of the shard, or an empty text.
    nbytes : int
        0 if unknown.
    detail : str
        The URL and the byte range of a request.
    parts : dict of str to float
        Seconds of the event that belong to other phases.
    """

    phase: str
    thread: int
    start: float
    end: float
    file: str
    nbytes: int
    detail: str
    parts: dict[str, float]


@dataclass(frozen=True)
class Timeline:
    """All events of a load, in the order of their starts, and what is known of the load.

    Attributes
    ----------
    events : sequence of Event
    threads : sequence of str
        What each thread is called. The caller's is the first, those of helper processes are the last.
    total : float
        Seconds of the whole load.
    facts : mapping
        What the trace says of the load: ``source``, ``outcome``, ``error``, ``seconds``, ``cpu_seconds``, ``cores``,
        ``workers``, ``processes``, ``device``, ``shards`` (by their paths: bytes, where they came from, what they were
        checked by), ``stats``. Any of them may be missing.
    """

    events: Sequence[Event]
    threads: Sequence[str]
    total: float
    facts: Mapping[str, Any]

    @property
    def stats(self) -> Mapping[str, Any]:
        """Return the numbers of the load: fields of `LoadStats`."""
        found = self.facts.get("stats")
        return found if isinstance(found, Mapping) else {}


def read_timeline(content: Any) -> Timeline:
    """Read the content of a trace.

    Raises
    ------
    ValueError
        It is not a trace of ndcache.
    """
    try:
        found = content["traceEvents"]
        raw = [event for event in found if event["ph"] == "X" and event["cat"] == "ndcache"]
        names = {_thread_of(event): str(event["args"]["name"]) for event in found if _names_thread(event)}
        labels = _label_threads(map(_thread_of, raw), names, own=_thread_of(found[0])[0] if found else 0)
        threads = {thread: index for index, thread in enumerate(labels)}
        facts = dict(content.get("otherData") or {})
        owners = _owners(facts.get("shards") or {})
        read = (_read_event(event, threads, owners) for event in raw)
        events = sorted(itertools.chain.from_iterable(map(_split, read)), key=lambda each: each.start)
        total = max([float(facts.get("seconds") or 0.0), *(event.end for event in events)])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError("this is not a trace that ndcache wrote") from error
    return Timeline(list(_merge(events)), list(labels.values()), total, facts)


def _names_thread(event: Mapping[str, Any]) -> bool:
    return (event["ph"], event["name"]) == ("M", "thread_name")


def _thread_of(event: Mapping[str, Any]) -> _Thread:
    return event.get("pid", 0), event["tid"]


def _label_threads(found: Iterable[_Thread], names: Mapping[_Thread, str], own: int) -> dict[_Thread, str]:
    """Return a label for each thread, in the order in which they are shown: process by process, workers last.

    A process's own threads are those that ndcache has not started. There is one, unless several consume a stream.
    """
    order = sorted(
        set(found),
        key=lambda each: (each[0] != own, each[0], _is_worker(each, names), _by_number(names.get(each, ""))),
    )
    helpers = {pid: index for index, pid in enumerate(dict.fromkeys(pid for pid, _ in order if pid != own), 1)}
    counts = Counter[tuple[int, bool]]()
    labels = {}
    for thread in order:
        kind = thread[0], _is_worker(thread, names)
        counts[kind] += 1
        number = counts[kind]
        if thread[0] in helpers:
            labels[thread] = f"helper {helpers[thread[0]]}" + (f".{number}" if kind[1] else "")
        else:
            labels[thread] = f"worker {number}" if kind[1] else f"caller {number}" if number > 1 else "caller"
    return labels


def _is_worker(thread: _Thread, names: Mapping[_Thread, str]) -> bool:
    return names.get(thread, "").startswith("ndcache")


def _by_number(name: str) -> tuple[str, int]:
    text = name.rstrip("0123456789")
    return text, int(name[len(text) :] or 0)


def _owners(shards: Mapping[str, Any]) -> dict[str, str]:
    """Return the shard of each last part of a path, which requests are known by."""
    return {path.rpartition("/")[2]: path for path in shards}


def _read_event(event: Mapping[str, Any], threads: Mapping[_Thread, int], owners: Mapping[str, str]) -> Event:
    args: Mapping[str, Any] = event.get("args") or {}
    url = redact(str(args["url"])) if args.get("url") else ""
    file = str(args.get("file") or owners.get(url.rpartition("/")[2], ""))
    wanted = f", {args['range']}" if args.get("range") else ""
    parts = {name.removesuffix(" (s)"): float(value) for name, value in args.items() if name.endswith(" (s)")}
    start = float(event["ts"]) / 1e6
    return Event(
        phase=str(event["name"]),
        thread=threads[_thread_of(event)],
        start=start,
        end=start + float(event["dur"]) / 1e6,
        file=file,
        nbytes=int(args.get("nbytes") or 0),
        detail=url + wanted,
        parts=parts,
    )


def _split(event: Event) -> Iterator[Event]:
    """Split a request that the server's limits hold up into the time before it is sent, and the rest."""
    waited = event.parts.get("rate_limit", 0.0) if event.phase == "request" else 0.0
    if waited < _LEAST_WAIT:
        yield event
        return
    sent = min(event.start + waited, event.end)
    parts = {phase: seconds for phase, seconds in event.parts.items() if phase != "rate_limit"}
    yield replace(event, phase="rate_limit", end=sent, parts={})
    yield replace(event, start=sent, parts=parts)


def _merge(events: Sequence[Event]) -> Iterator[Event]:
    """Merge events of tensors, and yield the others as they are."""
    last: dict[int, Event] = {}
    for event in events:
        if event.phase not in _MERGED:
            yield event
            continue
        before = last.get(event.thread)
        is_next = before is not None and event.start - before.end < _LEAST_GAP
        if before is not None and is_next and (before.phase, before.file) == (event.phase, event.file):
            last[event.thread] = Event(
                event.phase, event.thread, before.start, event.end, event.file, before.nbytes + event.nbytes, "", {}
            )
            continue
        if before is not None:
            yield before
        last[event.thread] = event
    yield from last.values()
