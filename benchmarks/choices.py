"""The settings among which the fastest of each downloader is chosen.

More connections help on many cores and cost on two, and so do more ranges.
"""

from __future__ import annotations

from collections.abc import Callable

from . import servers
from .harness import Contender

#: Downloads or threads at once, by the number of cores.
_AT_ONCE = (8, 16, 32) if servers.cores() >= 8 else (4, 8, 16)

CURL = tuple({"--parallel-max": count} for count in _AT_ONCE)
ARIA2C = (
    {"-j": 4, "-x": 4, "-k": "1M"},
    {"-j": 8, "-x": 1, "-k": "20M"},
    {"-j": 16, "-x": 1, "-k": "20M"},
    {"-j": 1, "-x": 16, "-k": "1M"},
)
HF_TRANSFER = (
    {"files": 8, "connections": 1, "MiB": 10},
    {"files": 1, "connections": 8, "MiB": 10},
    {"files": 4, "connections": 4, "MiB": 10},
    {"files": 1, "connections": 16, "MiB": 4},
)
HUGGINGFACE_HUB = tuple({"threads": count} for count in _AT_ONCE)
OBSTORE = tuple({"threads": count} for count in _AT_ONCE)


def downloaders(make: Callable[..., Contender]) -> list[Contender]:
    """Make the contenders that can use plain HTTP as well as TLS, without a digest."""
    return [
        make("obstore", "obstore", settings=OBSTORE),
        make("hf_transfer", "hf_transfer", settings=HF_TRANSFER),
        make("curl --parallel", "curl", settings=CURL),
        make("aria2c", "aria2c", settings=ARIA2C),
    ]
