"""The limits of an origin, as its responses show them, and the time of the next request.

- A refusal means that one of two settings was too high: the requests in flight, or their rate. A setting that was
  accepted before is not to blame, so the other one is cut: to the requests in flight, or to half the rate.
- Then one request at a time tries a little more than is known to be accepted. If it is accepted, the next one goes
  further; if not, the next trial waits twice as long. So a short disturbance is soon forgotten, and a lasting limit is
  met closely.
- After a refusal all requests wait, for the time of Retry-After if there is one, and then start at intervals.
- What is known of an origin is forgotten a minute after the last request.

The state neither waits nor reads the clock. Several processes may share it: see `limits.shared`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from ...files.system import ProcessId

__all__ = ["LimitState", "Member", "Start", "Trial"]

#: Factors by which a trial of a higher rate shortens the interval: the first trial, then those after each success.
_FASTER = (0.85, 0.8, 0.6, 0.5)
#: Seconds after the last request, or the end of the last pause, until the limits are forgotten.
_MEMORY = 60.0
#: Seconds after its last sign in which a member counts. It gives a sign at each request, and while it receives
#: something. After the shorter time, its process is looked for.
_LEASE, _DOUBT = 10.0, 0.5
#: Seconds that one member may go first although another one has waited longer.
_PRECEDENCE = 0.5

Trial = Literal["more", "faster"]


@dataclass
class Member:
    """One of those who share the state: an `OriginLimit`, of which a process has one for each `Loader`.

    Attributes
    ----------
    process : ProcessId
    seen : float
        When it last gave a sign of life.
    in_flight : int
        Its requests that have begun and are not over.
    waiting_since : float or None
        Since when the first of its requests waits.
    """

    process: ProcessId
    seen: float
    in_flight: int = 0
    waiting_since: float | None = None

    def counts(self, now: float) -> bool:
        """Return whether its requests count: not if it is certainly, or probably, dead."""
        silent = now - self.seen
        return silent <= _DOUBT or (silent <= _LEASE and not self.process.has_ended())


class Start(NamedTuple):
    """The start of one request.

    Attributes
    ----------
    member : str
        Whose request it is.
    number : int
        Different from those of other starts.
    time : float
    others_in_flight : int
        Other requests to the origin that were in flight at that time.
    previous : float
        The start of the last request before it that was not refused.
    trial : str or None
        What the request tries beyond what is known to be accepted: "more" requests in flight, or a "faster" rate.
    """

    member: str
    number: int
    time: float
    others_in_flight: int
    previous: float
    trial: Trial | None = None

    @property
    def gap(self) -> float:
        """Return the seconds since the previous start."""
        return self.time - self.previous


@dataclass
class LimitState:
    """The limits of one origin, as far as its responses show them.

    Times are seconds of ``time.monotonic()``, which all processes share until the system starts again.

    Parameters
    ----------
    unit : float
        Seconds between requests after the first refusal; other times are multiples of it.
    longest_pause : float
        Longer pauses that a server asks for are ignored, because the load then ends anyway.

    Attributes
    ----------
    max_in_flight : float
        Requests that may be in flight at once.
    interval : float
        Seconds from the start of one request to that of the next.
    refusals : int
        Refusals in a row; those of requests that were in flight together count as one.
    served : float
        When the origin last sent something. Noted now and then, and only where there is a limit.
    used : float
        When the state was last asked or changed.
    members : dict of str to Member
        Those who share the state.
    """

    unit: float = 0.125
    longest_pause: float = 300.0
    max_in_flight: float = math.inf
    interval: float = 0.0
    refusals: int = 0
    served: float = -math.inf
    used: float = -math.inf
    members: dict[str, Member] = field(default_factory=dict)
    #: Whether `max_in_flight` requests, or the rate of `interval`, have been accepted since this setting changed.
    is_max_known: bool = False
    is_interval_known: bool = False
    starts: int = 0
    last_start: float = -math.inf
    pause_until: float = -math.inf
    last_cut: float = -math.inf  # when a setting was cut last
    #: The current trial (its member and number), when the next one may be, the wait after a refused one, and how many
    #: succeeded in a row.
    trial: tuple[str, int] | None = None
    trial_at: float = -math.inf
    trial_wait: float = 0.0
    successes: int = 0
    #: How many requests were accepted, and since when: after refusals, this shows the rate that the server allows.
    accepted_count: int = -1
    accepted_since: float = -math.inf

    def __post_init__(self) -> None:
        self.trial_wait = self.trial_wait or 4 * self.unit

    @property
    def is_limited(self) -> bool:
        """Return whether the origin has refused a request."""
        return self.last_cut > -math.inf

    @property
    def in_flight(self) -> int:
        """Return how many requests have begun and are not over."""
        return sum(member.in_flight for member in self.members.values())

    # --- requests

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may begin, if nothing else happens."""
        pause, gap = self.pause_until - now, now - self.last_start
        if pause > self.longest_pause:  # another load is more patient
            pause = -math.inf
        trial = max(pause, math.inf if self.trial is not None else self.trial_at - now)
        if self.in_flight >= self.max_in_flight:
            return max(trial, self.interval - gap)
        if self.interval == 0:
            return pause
        return min(max(pause, self.interval - gap), max(trial, self.interval * self._faster - gap))

    def must_yield(self, name: str, since: float, now: float) -> bool:
        """Return whether another member has waited for much longer than the member `name`, which waits since `since`.

        One that has not looked for its turn lately would not take it.
        """
        return any(
            other != name
            and member.waiting_since is not None
            and member.waiting_since < since - _PRECEDENCE
            and now - member.seen <= _DOUBT
            for other, member in self.members.items()
        )

    def start(self, now: float, name: str = "") -> Start:
        """Begin a request of the member `name`; `delay` must have returned 0 or less."""
        others, gap = self.in_flight, now - self.last_start
        trial: Trial | None = None
        if others >= self.max_in_flight:
            trial = "more"
        elif gap < self.interval:
            trial = "faster"
        self.starts += 1
        start = Start(name, self.starts, now, others, self.last_start, trial)
        if trial is not None:
            self.trial = name, start.number
        member = self.member(name, now)
        member.in_flight += 1
        member.waiting_since = None
        self.last_start = now
        if self.accepted_since == -math.inf:
            self.accepted_since = now
        return start

    def accepted(self, start: Start, now: float) -> None:
        """Learn from a request that was not refused."""
        self.accepted_count += 1
        if not self.is_limited:
            return
        self._end_trial(start)
        if start.time >= self.last_cut:  # else it says nothing about the current settings
            self._learn(start, now)

    def refused(self, start: Start, now: float, retry_after: float | None = None) -> None:
        """Learn from a request that was refused with 429 or 503."""
        pause = retry_after or 0.0
        pause = pause if pause <= self.longest_pause else 0.0
        self.pause_until = max(self.pause_until, now + pause)
        self._end_trial(start)
        if self.last_start == start.time:
            # Servers do not count a request that they refuse, but the next one still needs some distance.
            self.last_start = start.previous
            self.pause_until = max(self.pause_until, now + self.interval / 4)
        if start.time < self.last_cut:  # one of several refused together: only the first one counts
            if not self.is_max_known:
                self._cut_max()
        elif not self._was_trial_only(start, now, pause):
            self._cut(now)

    def release(self, start: Start) -> None:
        """Count a request as over."""
        self._end_trial(start)
        member = self.members.get(start.member)
        if member is not None:
            member.in_flight -= 1

    def member(self, name: str, now: float = 0.0) -> Member:
        """Return the member `name`, which is added if it is new."""
        found = self.members.get(name)
        return found or self.members.setdefault(name, Member(ProcessId(), now))

    def forget_if_old(self, now: float) -> None:
        """Forget the limits if they are too old to be of use."""
        if self.is_limited and self._is_old(now):
            self._set(LimitState(members=self.members))

    # --- sharing

    def adopt(self, known: LimitState, now: float, own: str) -> bool:
        """Take over what other members know, and keep what is known of the member `own`.

        Returns
        -------
        bool
            Whether it was taken over; not if it is too old.
        """
        known.members = {name: member for name, member in known.members.items() if name != own and member.counts(now)}
        if not known.is_limited or known._is_old(now):
            return False
        if own in self.members:
            known.members[own] = self.members[own]
        known._end_orphaned_trial()
        if not self.is_limited:
            known.accepted_count += self.accepted_count + 1
        known.starts = max(known.starts, self.starts)
        self._set(known)
        return True

    def remove_dead(self, now: float, own: str) -> None:
        """Remove all members that do not count any more, but not the member `own`."""
        for name, member in list(self.members.items()):
            if name != own and not member.counts(now):
                del self.members[name]
        self._end_orphaned_trial()

    # --- inside

    def _set(self, other: LimitState) -> None:
        vars(self).update(vars(replace(other, unit=self.unit, longest_pause=self.longest_pause)))

    def _is_old(self, now: float) -> bool:
        return now > max(self.used, self.pause_until) + _MEMORY and not self.in_flight

    @property
    def _faster(self) -> float:
        return _FASTER[min(self.successes, len(_FASTER) - 1)]

    def _end_trial(self, start: Start) -> None:
        if self.trial == (start.member, start.number):
            self.trial = None

    def _end_orphaned_trial(self) -> None:
        """End the trial of a member that is gone, and will not say how it ended."""
        if self.trial is not None and self.trial[0] not in self.members:
            self.trial = None

    def _learn(self, start: Start, now: float) -> None:
        self.is_max_known = self.is_max_known or start.others_in_flight + 1 >= self.max_in_flight
        self.is_interval_known = self.is_interval_known or start.gap <= self.interval * 1.2
        if self.refusals > 1:
            # The last pause may have been far too long: a server that counts by the minute refuses all until its end.
            average = (now - self.accepted_since) / max(self.accepted_count, 1)
            self.interval = min(self.interval, max(average, self.unit))
            self.accepted_since, self.accepted_count = now, 0
        self.refusals = 0
        if start.trial is None:
            return
        if start.trial == "more":
            self.max_in_flight = max(self.max_in_flight, start.others_in_flight + 2**self.successes)
            self.is_max_known = self.successes == 0
        else:
            self.interval = start.gap if start.gap > self.unit / 12 else 0.0
        self.successes += 1
        self.trial_at, self.trial_wait = now, 4 * self.unit

    def _was_trial_only(self, start: Start, now: float, pause: float) -> bool:
        """Return whether a refusal only confirms that the settings known to be accepted are the limit."""
        self.refusals += 1
        self.successes = 0
        if start.trial is None:
            return False
        # Where a server asks for long pauses, a trial may cost all other requests such a pause: make fewer trials.
        self.trial_at = now + max(self.trial_wait, 8 * pause)
        self.trial_wait = min(2 * self.trial_wait, 128 * self.unit)
        return start.trial == "faster" or self.is_interval_known

    def _cut(self, now: float) -> None:
        self.last_cut = now
        if not self.is_max_known or self.refusals > 1:
            self._cut_max()
        # A rate that was accepted until now is nearly right: networks may deliver two requests closer together than
        # they were sent.
        is_nearly_right = self.is_interval_known and self.refusals == 1
        self.interval = min(max((1.2 if is_nearly_right else 2) * self.interval, self.unit), 20 * self.unit)
        self.is_interval_known = False
        self.trial_at = max(self.trial_at, now + 2 * self.interval)
        self.pause_until = max(self.pause_until, now + self.interval)

    def _cut_max(self) -> None:
        others_in_flight = self.in_flight - 1
        if others_in_flight > 0 or self.max_in_flight == math.inf:
            self.max_in_flight = min(self.max_in_flight, max(others_in_flight, 1))
            self.is_max_known = False
