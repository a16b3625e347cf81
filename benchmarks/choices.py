"""The settings among which the fastest of each peer is chosen.

More connections help a downloader on many cores and cost on two, and so do more ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

#: The first of each is the peer's own default on 16 cores.
INSTANTTENSOR = (
    {"backend": "default"},
    {"backend": "buffered"},
    {"backend": "default", "threads": 16},
    {"backend": "default", "MiB": 4},
)
PREFETCH = tuple({"threads": count} for count in (8, 16, 12))
FASTSAFETENSORS = ({"threads": 16, "MiB": 16}, {"threads": 16, "MiB": 4}, {"threads": 8, "MiB": 16})
RUNAI = ({"threads": 16}, {"threads": 32}, {"threads": 16, "strategy": "sync_buffered"})
LOAD_FILE = tuple({"how": how} for how in ("mmap", "pread", "CPU first"))
PAGE_CACHE = tuple({"threads": count} for count in (16, 8))
BARE_LOOP = tuple({"threads": count} for count in (16, 12, 8))
#: The default, with which 12 workers read; 16 were slower.
NDCACHE_CUDA = ({"workers": 8},)


def downloaders(make: Callable[..., Contender]) -> list[Contender]:
    """Make the contenders that can use plain HTTP as well as TLS, without a digest."""
    return [
        make("obstore", "obstore", settings=OBSTORE),
        make("hf_transfer", "hf_transfer", settings=HF_TRANSFER),
        make("curl --parallel", "curl", settings=CURL),
        make("aria2c", "aria2c", settings=ARIA2C),
    ]


def onto_cuda(make: Callable[..., Contender], **more: Any) -> list[Contender]:
    """Make the contenders that load safetensors files onto a GPU through CUDA."""
    return [
        make("InstantTensor", "instanttensor", settings=INSTANTTENSOR, package="instanttensor", **more),
        make("safetensors prefetch", "safetensors_prefetch", settings=PREFETCH, package="safetensors", **more),
        make("fastsafetensors", "fastsafetensors", settings=FASTSAFETENSORS, package="fastsafetensors", **more),
        make("Run:ai streamer", "runai", settings=RUNAI, package="runai-model-streamer", **more),
        make("safetensors load_file", "safetensors_load_file", settings=LOAD_FILE, package="safetensors", **more),
    ]
