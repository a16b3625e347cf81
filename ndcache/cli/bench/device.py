"""Measure the device: copies on the CPU and onto CUDA, and loads from memory onto another device."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...devices.torch.link import seconds_of_copies
from ...errors import NdcacheError
from ...format.writer import dump
from ...loader import Loader
from ...processes.how_many import usable_cores
from ...report.words import format_count, format_size
from ..group import one_line
from .rates import Rate, Used, per_second

__all__ = ["device_rate"]

_LEAST_BYTES = 64 << 20
_MOST_BYTES = 256 << 20
_MOST_THREADS = 8
_COPIES = 4
_PARTS = 16


def device_rate(folder: Path, device: str, opened: Any, used: Used) -> Rate:
    """Copy on the CPU and onto CUDA; onto another device, load a model that lies in the page cache.

    Parameters
    ----------
    folder : pathlib.Path
        For a model.
    device : str
        The device's name.
    opened : object
        The `Weights.device` of the load.
    used : Used
    """
    nbytes = max(_LEAST_BYTES, min(used.moved, _MOST_BYTES)) >> 20 << 20
    if opened == "cpu":
        return _cpu_rate(np.ones(nbytes, np.uint8), used)
    is_cuda = getattr(opened, "type", None) == "cuda"
    try:
        if is_cuda:
            rate = per_second(nbytes * _COPIES, seconds_of_copies(opened, nbytes, _COPIES))
        else:
            # It takes at least what the load itself got, which may have been larger.
            got = per_second(used.moved, used.stats.seconds["total"]) or 0.0
            rate = max(got, per_second(nbytes, _load(folder / "model", device, np.ones(nbytes, np.uint8))) or 0.0)
    except (NdcacheError, OSError) as error:
        return Rate("device", None, None, f"not measured: {one_line(error)}")
    share = used.share(used.moved, rate)
    if is_cuda:
        return Rate("device", rate, share, f"{format_size(nbytes * _COPIES)} copied to it from pinned memory")
    how = f"{format_size(nbytes)} loaded onto it from the page cache: it may take more"
    return Rate("device", rate, share, how, is_least=True)


def _load(folder: Path, device: str, values: NDArray[np.uint8]) -> float:
    """Write values as a model, and return the seconds to load it."""
    parts = {f"part.{index}": part for index, part in enumerate(np.split(values, _PARTS))}
    dump(parts, folder, shard_bytes=values.nbytes // _PARTS * 2)
    seconds = 0.0
    with Loader() as loader:
        for _ in range(2):  # the first time, the driver makes its buffers and compiles
            with loader.load(folder, device, files=False, progress=False) as weights:
                seconds = weights.stats.seconds["total"]
    return seconds


def _cpu_rate(values: NDArray[np.uint8], used: Used) -> Rate:
    threads, nbytes = min(usable_cores(), _MOST_THREADS), values.nbytes * _COPIES
    rate = per_second(nbytes, _copy(values, threads))
    how = f"{format_size(nbytes)} copied by {format_count(threads, 'thread')}"
    if not used.moved:
        how += "; the load maps its files, and copies nothing"
    return Rate("device", rate, used.share(used.moved, rate), how)


def _copy(values: NDArray[np.uint8], threads: int) -> float:
    """Copy an array several times, with several threads; return the seconds."""
    copy = np.empty_like(values)
    pairs = list(zip(np.array_split(copy, threads), np.array_split(values, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda pair: np.copyto(*pair), pairs):
            pass  # the system gives memory when it is written to for the first time
        begun = time.perf_counter()
        for _ in pool.map(lambda pair: np.copyto(*pair), pairs * _COPIES):
            pass
        return time.perf_counter() - begun
