"""The form in which `LimitState` lies in a file, where others may have damaged it, or written what they like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ...files.system import ProcessId
from .state import LimitState, Member

__all__ = ["from_note", "to_note"]

#: Changes with the form and the meaning of the fields. Notes of another format are not read.
FORMAT = 1

#: The fields with numbers, and the smallest and the largest value of each.
_COUNTS = {"refusals": (0, 1 << 40), "successes": (0, 64), "starts": (0, 1 << 60), "accepted_count": (-1, 1 << 60)}
_AMOUNTS = {"max_in_flight": (1.0, math.inf), "interval": (0.0, 300.0), "trial_wait": (0.0, 3600.0)}
#: The fields with times, and how far in the future they may lie: clocks are read a moment before a lock is there.
_TIMES = {
    **dict.fromkeys(("served", "used", "last_start", "last_cut", "accepted_since"), 1.0),
    **dict.fromkeys(("pause_until", "trial_at"), 86400.0),
}


def to_note(state: LimitState) -> dict[str, Any]:
    """Return a state as it is stored."""
    note = {each.name: getattr(state, each.name) for each in fields(state)}
    del note["unit"], note["longest_pause"]
    note["trial"] = None if state.trial is None else list(state.trial)
    note["members"] = {
        name: [list(member.process), member.seen, member.in_flight, member.waiting_since]
        for name, member in state.members.items()
    }
    return {"format": FORMAT, **note}


def from_note(note: Mapping[str, Any] | None, now: float) -> LimitState | None:
    """Return the state in a note, or None if the note does not have the right form, or is not of this time."""
    try:
        if note is None or note["format"] != FORMAT:
            return None
        counts: dict[str, Any] = {name: _count(note[name], *bounds) for name, bounds in _COUNTS.items()}
        amounts: dict[str, Any] = {name: _number(note[name], *bounds) for name, bounds in _AMOUNTS.items()}
        times: dict[str, Any] = {name: _number(note[name], -math.inf, now + ahead) for name, ahead in _TIMES.items()}
        return LimitState(
            **counts,
            **amounts,
            **times,
            is_max_known=note["is_max_known"] is True,
            is_interval_known=note["is_interval_known"] is True,
            trial=_trial(note["trial"]),
            members={name: _member(value, now) for name, value in note["members"].items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _number(value: Any, low: float, high: float) -> float:
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"not a number from {low} to {high}")
    return float(value)


def _count(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"not an integer from {low} to {high}")
    return value


def _trial(value: Any) -> tuple[str, int] | None:
    if value is None:
        return None
    name, number = value
    return str(name), int(number)


def _member(value: Any, now: float) -> Member:
    (pid, started, namespace), seen, in_flight, waiting_since = value
    return Member(
        ProcessId(_count(pid, 0, 1 << 31), str(started), str(namespace)),
        _number(seen, -math.inf, now + 1),
        _count(in_flight, 0, 1 << 16),
        None if waiting_since is None else _number(waiting_since, -math.inf, now + 1),
    )
