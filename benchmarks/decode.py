"""Compare three ways to expand bfloat16 to float32 on the CPU, in GB/s of stored bytes.

Run it as ``python benchmarks/decode.py``. The three ways take turns. The medians are printed, with their ratios to the
first way. All ways must give the same bits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

COUNT = 16 << 20
ROUNDS = 9


def main() -> None:
    bits = np.random.default_rng(0).integers(0, 0x7F80, COUNT, np.uint16)  # finite values
    stored = bits.view(ml_dtypes.bfloat16)
    existing = np.zeros(COUNT, np.float32)

    def cast_into_existing() -> Any:
        existing[...] = stored
        return existing

    ways: dict[str, Callable[[], Any]] = {
        "astype(uint32) << 16": lambda: (bits.astype(np.uint32) << 16).view(np.float32),
        "astype(float32)": lambda: stored.astype(np.float32),
        "cast into an array": cast_into_existing,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected = ways["astype(uint32) << 16"]()
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            result = way()
            seconds[name].append(time.perf_counter() - start)
            assert (result.view(np.uint32) == expected.view(np.uint32)).all()
    first = statistics.median(seconds["astype(uint32) << 16"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:22} {bits.nbytes / median / 1e9:5.2f} GB/s  {first / median:4.1f}x")


if __name__ == "__main__":
    main()
