"""Time whole loads onto a GPU from the page cache, against another checkout of ndcache if one is given.

Run it as ``python benchmarks/gpu.py [--against DIRECTORY]``; it needs ndcache and a GPU. It writes
models of float32, raw and stored as bfloat16, to memory (or to ``--directory``). Fresh processes load them, and the
checkouts take turns (A B A B …). The second load of each process counts, when the device's driver is warm. With
``--device cuda``, they load through CUDA, with torch, instead of wgpu.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

import ndcache

ROOT = Path(__file__).resolve().parent.parent
_LOAD = """
import json, os, sys, time
import ndcache
assert os.path.dirname(os.path.dirname(ndcache.__file__)) == os.environ["PYTHONPATH"].split(":")[0], ndcache.__file__
directory, workers, decode = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "decode"
if sys.argv[5] == "cuda":
    import torch
    torch.zeros(1).to("cuda")
    device = "cuda"
else:
    from ndcache.devices.gpu import open_gpu  # this name is older than the package
    device = open_gpu("gpu").handle
load = ndcache.load  # with all that it imports
times, stats = [], None
for _ in range(int(sys.argv[4])):
    start = time.perf_counter()
    weights = load(directory, device, max_workers=workers, decode=decode)
    times.append(time.perf_counter() - start)
    stats = weights.stats
    weights.close()
print(json.dumps({"times": times, "nbytes": stats.nbytes, "seconds": stats.seconds}))
"""

#: How tensors are stored, and how many bytes they have for each stored byte.
_ENCODINGS: tuple[tuple[Literal["raw", "f32-to-bf16"], int], ...] = (("raw", 1), ("f32-to-bf16", 2))


def tensors(gib: float, nbytes: int, *, unlike: bool) -> Iterator[tuple[str, Any]]:
    """Yield tensors of `nbytes`; with `unlike`, of sizes up to twice that, so that shards differ in size, too."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal(nbytes // 2, np.float32)
    for index in range(int(gib * 2**30 / nbytes)):
        yield f"t{index}", block[: rng.integers(1, len(block)) if unlike else nbytes // 4]


def load(checkout: Path, directory: Path, workers: int, how: str, loads: int, device: str) -> dict[str, Any]:
    """Load a model several times in a fresh process; return the seconds of each load, and the last one's statistics."""
    path = os.pathsep.join([str(checkout.resolve()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, "-c", _LOAD, str(directory), str(workers), how, str(loads), device]
    child = subprocess.run(
        command, cwd=checkout, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if child.returncode:
        raise SystemExit(child.stderr)
    return dict(json.loads(child.stdout.splitlines()[-1]))


def compare(label: str, rounds: list[list[dict[str, Any]]], checkouts: list[Path]) -> None:
    """Print the medians of each checkout, and how they compare."""
    for checkout, results in zip(checkouts, zip(*rounds, strict=True), strict=True):
        first = statistics.median(result["times"][0] for result in results)
        seconds = statistics.median(result["times"][1] for result in results)
        gigabytes = results[0]["nbytes"] / 1e9
        phases = {name: round(value, 3) for name, value in results[-1]["seconds"].items() if value}
        speeds = f"{gigabytes / seconds:6.2f} GB/s (first {gigabytes / first:6.2f})"
        print(f"{label}: {speeds} {checkout.name} {phases}", flush=True)
    if len(checkouts) > 1:
        ratios = [theirs["times"][1] / ours["times"][1] for ours, theirs in rounds]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"    {statistics.median(ratios):.2f} ({spread}) times as fast", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--gib", type=float, default=4, help="of stored bytes")
    parser.add_argument("--tensor-mib", type=float, default=8, help="of float32")
    parser.add_argument("--unlike", action="store_true", help="tensors, and so shards, of many sizes")
    parser.add_argument("--workers", type=int, nargs="+", default=[8])
    parser.add_argument("--device", choices=["gpu", "cuda"], default="gpu", help="through wgpu, or through CUDA")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default="/dev/shm" if os.path.isdir("/dev/shm") else None)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    checkouts = [ROOT, *([options.against] if options.against else [])]
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        for encode, factor in _ENCODINGS:
            directory = Path(folder) / encode
            nbytes = int(options.tensor_mib * 2**20)
            ndcache.dump(tensors(options.gib * factor, nbytes, unlike=options.unlike), directory, encode=encode)
            for workers in options.workers:
                for how in ["decode"] if encode == "raw" else ["decode", "stored"]:
                    rounds = [
                        [load(checkout, directory, workers, how, 3, options.device) for checkout in checkouts]
                        for _ in range(options.rounds)
                    ]
                    compare(f"{encode:12}{how:7} {workers:2} workers", rounds, checkouts)


if __name__ == "__main__":
    main()
