"""The rate at which bytes come."""

from __future__ import annotations

from collections import deque

__all__ = ["Rate"]

#: Seconds over which the rate is the mean: long enough to be calm, and short enough to follow the network.
_WINDOW = 10.0
#: The least seconds between two samples.
_SAMPLE = 0.1


class Rate:
    """The mean rate over the last ten seconds.

    Parameters
    ----------
    now : float
        The time, in seconds.
    count : int
        The bytes that have come by then.
    """

    def __init__(self, now: float, count: int) -> None:
        self._samples = deque([(now, count)])
        self._last = self._before = now, count

    def add(self, now: float, count: int) -> None:
        """Note how many bytes have come by now."""
        self._before, self._last = self._last, (now, count)
        if now - self._samples[-1][0] >= _SAMPLE:
            self._samples.append(self._last)
        while len(self._samples) > 1 and now - self._samples[1][0] >= _WINDOW:
            self._samples.popleft()

    def restart(self) -> None:
        """Begin again with the last step, after a pause: what comes now says more than the pause about what is left."""
        self._samples = deque([self._before])

    @property
    def per_second(self) -> float:
        """Return bytes per second; 0 if no time has passed."""
        (begun, first), (now, count) = self._samples[0], self._last
        return (count - first) / (now - begun) if now > begun else 0.0
