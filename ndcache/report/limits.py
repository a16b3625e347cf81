"""Compute the share of a load's time that each limit took."""

from __future__ import annotations

from collections.abc import Iterator

from .timeline import Event, Timeline

__all__ = ["GROUPS", "GROUP_OF", "REST", "shares"]

#: The limits that a load can wait for, and the phases in which it does.
GROUPS = {
    "network": ("request", "network"),
    "limits": ("rate_limit", "backoff", "limit_rate"),
    "lock": ("lock",),
    "hash": ("hash",),
    "disk": ("write", "publish", "read"),
    "decode": ("decode",),
    "device": ("open_device", "place", "wait_buffers", "shader", "copy", "finish", "staging", "buffers"),
}
#: Time in which no phase of a worker ran, such as that of your own code between the tensors of a stream.
REST = "rest"
GROUP_OF = {phase: group for group, phases in GROUPS.items() for phase in phases}


def shares(timeline: Timeline) -> dict[str, float]:
    """Return the seconds of the load by what it waited for; they add up to the total.

    At each moment, the phases that run at that moment share the time equally. Waiting for workers is no phase of its
    own: the time belongs to what the workers do.
    """
    steps: list[tuple[float, str, float]] = []
    for event in timeline.events:
        for group, weight in _weights(event):
            steps += [(event.start, group, weight), (event.end, group, -weight)]
    steps.sort(key=lambda step: step[0])
    found = dict.fromkeys((*GROUPS, REST), 0.0)
    active: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
    before, running = 0.0, 0.0
    for moment, group, weight in steps:
        if (passed := moment - before) > 0:
            if running > 1e-6:
                for name, part in active.items():
                    if part > 1e-9:
                        found[name] += passed * part / running
            else:
                found[REST] += passed
            before = moment
        active[group] += weight
        running += weight
    found[REST] += max(timeline.total - before, 0.0)
    return found


def _weights(event: Event) -> Iterator[tuple[str, float]]:
    """Yield the groups that an event belongs to, and the part of it that is theirs."""
    group, seconds = GROUP_OF.get(event.phase), event.end - event.start
    if group is None or seconds <= 0:
        return
    rest = 1.0
    for phase, spent in event.parts.items():
        part = min(spent / seconds, rest)
        rest -= part
        if part > 0 and phase in GROUP_OF:
            yield GROUP_OF[phase], part
    yield group, rest
