"""Time a cold fetch from nginx on loopback, or a warm load, against another checkout of ndcache if one is given.

Run it as ``python benchmarks/fetch.py [--against DIRECTORY]``; it needs ndcache, NumPy and nginx. It writes a model of
random bytes, by default 1 GiB in shards of 32 MiB. Each time, a fresh process fetches it into an empty cache, with
digests. With ``--warm`` the model is float32 stored as bfloat16, and the process loads it from a cache that has it;
before each load, another process touches 6 GiB of memory. The checkouts take turns (A B A B …). With ``--control`` the
other checkout runs twice in each round (B B A B B A …), which shows how far one version is from itself. The medians
are printed, and the ratios within the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file is in no package

import ndcache  # noqa: E402
from benchmarks import servers  # noqa: E402

_TIMED = """
import os, sys, time
import ndcache
assert os.path.dirname(os.path.dirname(ndcache.__file__)) == os.environ["PYTHONPATH"], ndcache.__file__
verb = getattr(ndcache, sys.argv[5])  # with all that it imports
start = time.perf_counter()
result = verb(sys.argv[1], cache_dir=sys.argv[2], max_workers=int(sys.argv[3]), verify=sys.argv[4])
print(time.perf_counter() - start)
"""
#: A virtual machine gives free memory back to its host and gets it again slowly, which must not be timed.
_TOUCH = """
import mmap
memory, block = mmap.mmap(-1, 6 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), bytes(1 << 24)
for start in range(0, 6 << 30, 1 << 24):
    memory[start : start + (1 << 24)] = block
"""


def seconds(checkout: Path, url: str, cache: Path, verb: str, options: argparse.Namespace) -> float:
    """Return the seconds that a verb of this checkout takes in a fresh process."""
    command = [sys.executable, "-c", _TIMED, url, str(cache), str(options.workers), options.verify, verb]
    environ = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    return float(subprocess.run(command, cwd=checkout, env=environ, check=True, capture_output=True, text=True).stdout)


def cold(checkout: Path, url: str, options: argparse.Namespace) -> float:
    """Time a fetch into an empty cache."""
    with tempfile.TemporaryDirectory(dir=options.cache) as cache:
        return seconds(checkout, url, Path(cache), "fetch", options)


def warm(checkout: Path, url: str, options: argparse.Namespace, cache: Path) -> float:
    """Time a load from a cache that has the model."""
    subprocess.run([sys.executable, "-c", _TOUCH], check=True)
    return seconds(checkout, url, cache, "load", options)


def write_model(folder: Path, nbytes: int, options: argparse.Namespace) -> None:
    """Write a model with one tensor in each shard of `nbytes`."""
    rng = np.random.default_rng(0)
    if options.warm:
        floats = ((f"t{index}", rng.random(nbytes // 2, np.float32)) for index in range(options.shards))
        ndcache.dump(floats, folder, shard_bytes=nbytes)
    else:
        tensors = ((f"t{index}", rng.integers(0, 256, nbytes, np.uint8)) for index in range(options.shards))
        ndcache.dump(tensors, folder, encode="raw", shard_bytes=nbytes)


def show(label: str, pairs: Iterable[tuple[float, float]]) -> None:
    """Print the ratios of pairs of seconds: median, smallest, largest."""
    ratios = [one / other for one, other in pairs]
    print(f"{label}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def run_rounds(checkouts: list[Path], timed: Callable[[Path], float], rounds: int) -> list[list[float]]:
    """Return the seconds of each checkout, round by round, after one run of each that does not count."""
    for checkout in reversed(checkouts):
        timed(checkout)  # warms up; the first one fills the cache
    return [[timed(checkout) for checkout in checkouts] for _ in range(rounds)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--control", action="store_true", help="run the other checkout twice in each round")
    parser.add_argument("--warm", action="store_true", help="load from a cache that has the model")
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--shard-mib", type=float, default=32)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--verify", choices=["download", "never"], default="download")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cache", type=Path, help="where the caches are made, such as /dev/shm")
    options = parser.parse_args()
    if options.control and not options.against:
        parser.error("--control needs --against")
    return options


def main() -> None:
    options = parse_arguments()
    if servers.program() is None:
        raise SystemExit("nginx is not installed")
    nbytes = int(options.shard_mib * 2**20)
    others = [options.against] * (1 + options.control) if options.against else []
    checkouts = [*others, ROOT]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=options.cache) as cache:
        os.chmod(folder, 0o755)  # for nginx
        write_model(Path(folder), nbytes, options)
        with servers.nginx(Path(folder)) as (url, _):

            def timed(checkout: Path) -> float:
                if options.warm:
                    return warm(checkout, url, options, Path(cache))
                return cold(checkout, url, options)

            rounds = run_rounds(checkouts, timed, options.rounds)
    gigabytes = options.shards * nbytes / 1e9
    for checkout, times in zip(checkouts, zip(*rounds, strict=True), strict=True):
        print(f"{gigabytes / statistics.median(times):.3f} GB/s  {statistics.median(times):.3f} s  {checkout.name}")
    if others:
        show("seconds here / there", ((times[-1], other) for times in rounds for other in times[:-1]))
    if options.control:
        show("seconds there / there", ((second, first) for first, second, _ in rounds))


if __name__ == "__main__":
    main()
