"""Rates of the parts of this machine, and of a load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...stats import LoadStats

__all__ = ["BenchReport", "Rate", "Used", "per_second"]

#: A load that reaches less than this part of each rate was limited by something else.
_NEAR = 0.5


@dataclass(frozen=True)
class Rate:
    """Rate of a part of this machine.

    Attributes
    ----------
    name : str
        ``"network"``, ``"network, more"``, ``"disk, write"``, ``"disk, read"`` or ``"device"``.
    bytes_per_second : float or None
        None if the load needs no network, or it could not be measured.
    share : float or None
        The part of it that the load used; None if the load did not use it, or it could not be measured.
    how : str
        How it was measured.
    is_least : bool
        Whether it may give more, as something else limited the measurement.
    connections : int
        Connections of the network.
    """

    name: str
    bytes_per_second: float | None
    share: float | None
    how: str
    is_least: bool = False
    connections: int = 0


@dataclass(frozen=True)
class BenchReport:
    """A load, and the rates beside it.

    Attributes
    ----------
    stats : LoadStats
    tensors : int
    nbytes : int
        Bytes of the tensors.
    device : object
        The `Weights.device` of the load.
    rates : tuple of Rate
    trace : object
        The content of the load's trace.
    is_limited : bool
        Whether the loader has a `limit_rate`.
    """

    stats: LoadStats
    tensors: int
    nbytes: int
    device: Any
    rates: tuple[Rate, ...]
    trace: Any
    is_limited: bool = False

    @property
    def seconds(self) -> float:
        """Return the seconds of the load."""
        return self.stats.seconds["total"]

    @property
    def nearest(self) -> Rate | None:
        """Return the rate that the load came closest to."""
        known = [rate for rate in self.rates if rate.share is not None and not rate.is_least]
        return max(known, key=lambda rate: rate.share or 0.0, default=None)

    @property
    def limit(self) -> Rate | None:
        """Return the rate that the load came closest to, if it came near."""
        nearest = self.nearest
        return nearest if nearest is not None and (nearest.share or 0.0) >= _NEAR else None


@dataclass(frozen=True)
class Used:
    """The bytes that a load received, read and moved.

    Attributes
    ----------
    stats : LoadStats
        Has the seconds, and the bytes from the network.
    read : int
        Bytes in the files of tensors that are no views of them.
    moved : int
        Bytes of these tensors, which were copied or expanded.
    """

    stats: LoadStats
    read: int
    moved: int

    def share(self, nbytes: float, rate: float | None) -> float | None:
        """Return the part of a rate that the load used, or None if it used nothing."""
        return nbytes / self.stats.seconds["total"] / rate if nbytes and rate else None


def per_second(nbytes: int, seconds: float) -> float | None:
    """Return a rate, or None if nothing was measured."""
    return nbytes / seconds if nbytes and seconds > 0 else None
