"""Show what processes gain when they share the download of a model that none of them has.

Run it as ``python benchmarks/sharing.py``; it needs only ndcache. A server in a process of its own sends a model of 64
shards of 4 MiB, at 4 MiB/s over each connection. One process, and then 2, 4 and 8 at once, load the whole model into
one empty cache, with 8 workers each; they begin together, when all have imported ndcache. For each number of processes,
the time of the slowest is printed, relative to the time of one process in the same round; and, of all processes
together, how many requests there were for each shard, and how many bytes were received for each byte of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file is in no package

import ndcache  # noqa: E402
from benchmarks.parallel import server  # noqa: E402

_TIMED = """
import json, sys, time
import ndcache
load = ndcache.load  # with all that it imports
print("ready", flush=True)
sys.stdin.readline()
start = time.perf_counter()
with load(sys.argv[1], cache_dir=sys.argv[2], max_workers=int(sys.argv[3])) as weights:
    seconds, stats = time.perf_counter() - start, weights.stats
print(json.dumps([seconds, stats.requests, stats.network_bytes, stats.peak_bytes_in_flight]))
"""


@dataclass(frozen=True)
class Figures:
    """Figures of processes that loaded one model at once.

    Attributes
    ----------
    seconds : float
        Of the slowest process.
    requests, nbytes : int
        Requests, and bytes of shards received, of all processes.
    peak : int
        The most bytes that were in flight in a process.
    """

    seconds: float
    requests: int
    nbytes: int
    peak: int


def load_at_once(checkout: Path, url: str, processes: int, workers: int) -> Figures:
    """Load into an empty cache in so many processes, which begin together."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", _TIMED, url, cache, str(workers)]
        environ = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
        children = [
            subprocess.Popen(
                command, cwd=checkout, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(processes)
        ]
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        results = [json.loads(child.communicate()[0]) for child in children]
    seconds, requests, nbytes, peak = zip(*results, strict=True)
    return Figures(max(seconds), sum(requests), sum(nbytes), max(peak))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, whose processes load in turn with this one's")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8], help="the first counts as 1.0")
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--shard-mib", type=float, default=4)
    parser.add_argument("--rate-mib", type=float, default=4, help="per second and connection")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    rng, size = np.random.default_rng(0), int(options.shard_mib * 2**20)
    checkouts = [ROOT, *([options.against] if options.against else [])]
    with tempfile.TemporaryDirectory() as folder:
        tensors = ((f"t{index}", rng.integers(0, 256, size, np.uint8)) for index in range(options.shards))
        ndcache.dump(tensors, folder, shard_bytes=size)
        with server(Path(folder), options.rate_mib * 2**20) as url:
            rounds = [
                {
                    (checkout, count): load_at_once(checkout, url, count, options.workers)
                    for count in options.processes
                    for checkout in checkouts
                }
                for _ in range(options.rounds)
            ]
    for checkout in checkouts:
        for count in options.processes:
            figures = [one[checkout, count] for one in rounds]
            ratios = [one[checkout, count].seconds / one[ROOT, options.processes[0]].seconds for one in rounds]
            print(
                f"{checkout.name}: {count} processes {statistics.median(one.seconds for one in figures):6.2f} s,"
                f" ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}),"
                f" {max(one.requests - count for one in figures) / options.shards:.2f} requests for each shard,"
                f" {max(one.nbytes for one in figures) / (options.shards * size):.3f} times the bytes"
            )


if __name__ == "__main__":
    main()
