"""Show what parallel fetching gains from a server that gives each connection a fixed rate.

Run it as ``python benchmarks/parallel.py``; it needs only ndcache. A server in a process of its own sends 32 shards of
1 MiB at 8 MiB/s over each connection. One worker and eight workers load them in turn (A B A B …) into fresh caches, and
check their digests. It prints the medians, the ratio of the pairs, and when the first tensor of a stream arrives.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

import ndcache
from ndcache.cli.demo import serving


def serve(directory: Path, rate: float, pipe: Connection) -> None:
    """Serve a directory until something comes through the pipe."""
    with serving(directory, rate) as url:
        pipe.send(url)
        pipe.recv()


@contextmanager
def server(directory: Path, rate: float) -> Iterator[str]:
    """Run `serve` in a process of its own, and yield its URL."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(directory, rate, theirs))
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join()


def load_seconds(url: str, workers: int) -> float:
    with tempfile.TemporaryDirectory() as cache, ndcache.Loader(max_workers=workers, cache_dir=cache) as loader:
        start = time.perf_counter()
        loader.load(url).close()
        return time.perf_counter() - start


def first_tensor_share(url: str) -> float:
    """Return how much of a stream's time passes until its first tensor."""
    with tempfile.TemporaryDirectory() as cache, ndcache.Loader(cache_dir=cache) as loader:
        start = time.perf_counter()
        tensors = loader.stream(url)
        next(tensors)
        first = time.perf_counter() - start
        for _ in tensors:
            pass
        return first / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--shard-mib", type=float, default=1)
    parser.add_argument("--rate-mib", type=float, default=8, help="per second and connection")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    size = int(options.shard_mib * 2**20)
    with tempfile.TemporaryDirectory() as folder:
        tensors = ((f"t{index}", rng.integers(0, 256, size, np.uint8)) for index in range(options.shards))
        ndcache.dump(tensors, folder, shard_bytes=size)
        with server(Path(folder), options.rate_mib * 2**20) as url:
            load_seconds(url, options.workers)  # warm up
            pairs = [(load_seconds(url, 1), load_seconds(url, options.workers)) for _ in range(options.rounds)]
            shares = [first_tensor_share(url) for _ in range(options.rounds)]
    one, many = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = [slow / fast for slow, fast in pairs]
    print(f"1 worker:  {one:.3f} s")
    print(f"{options.workers} workers: {many:.3f} s")
    print(f"ratio:     {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"first tensor of a stream after {statistics.median(shares):.0%} of the time (at most {max(shares):.0%})")


if __name__ == "__main__":
    main()
