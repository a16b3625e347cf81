"""Time a cold fetch from nginx on loopback, or a warm load, against another checkout of ndcache if one is given.

Run it as ``python benchmarks/fetch.py [--against DIRECTORY]``; it needs ndcache, NumPy and nginx. A model of random
bytes, 1 GiB in shards of 32 MiB unless told otherwise, is fetched into an empty cache by a fresh process each time,
with digests. With ``--warm`` the model is float32 stored as bfloat16, and is loaded from a cache that has it. The
checkouts take turns (A B A B …). With ``--control`` the other checkout runs twice in each round (B B A B B A …), which
shows how far one version is from itself. Before each warm load, another process touches 6 GiB of memory. Printed are
the medians and the ratios within the rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import ndcache

ROOT = Path(__file__).parent.parent
TIMED = """
import os, sys, time
import ndcache
assert os.path.dirname(os.path.dirname(ndcache.__file__)) == os.environ["PYTHONPATH"], ndcache.__file__
verb = getattr(ndcache, sys.argv[5])  # with all that it imports
start = time.perf_counter()
result = verb(sys.argv[1], cache_dir=sys.argv[2], max_workers=int(sys.argv[3]), verify=sys.argv[4])
print(time.perf_counter() - start)
"""
#: A virtual machine gives free memory back to its host, and gets it again slowly: what is timed must not wait for that.
TOUCH = """
import mmap
memory, block = mmap.mmap(-1, 6 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), bytes(1 << 24)
for start in range(0, 6 << 30, 1 << 24):
    memory[start : start + (1 << 24)] = block
"""


@contextmanager
def nginx(directory: Path) -> Iterator[str]:
    """An nginx that serves a directory; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as state:
        config = Path(state) / "nginx.conf"
        folders = "".join(f"{kind}_temp_path {state};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        config.write_text(
            f"daemon off; pid {state}/pid; error_log stderr; worker_processes 2; events {{}} http {{ {folders}"
            f"access_log off; sendfile on; server {{ listen 127.0.0.1:{port}; root {directory}; }} }}"
            + ("user root;" if os.geteuid() == 0 else "")
        )
        process = subprocess.Popen(["nginx", "-p", state, "-c", str(config)], stderr=subprocess.DEVNULL)
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if process.poll() is not None:
                        raise SystemExit("nginx does not start") from None
                    time.sleep(0.05)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()
            process.wait()


def seconds(checkout: Path, url: str, cache: Path, verb: str, options: argparse.Namespace) -> float:
    """Return the seconds that a verb takes in a fresh process with this checkout."""
    command = [sys.executable, "-c", TIMED, url, str(cache), str(options.workers), options.verify, verb]
    environ = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    return float(subprocess.run(command, cwd=checkout, env=environ, check=True, capture_output=True, text=True).stdout)


def cold(checkout: Path, url: str, options: argparse.Namespace) -> float:
    """Time a fetch into an empty cache."""
    with tempfile.TemporaryDirectory(dir=options.cache) as cache:
        return seconds(checkout, url, Path(cache), "fetch", options)


def show(label: str, pairs: Iterable[tuple[float, float]]) -> None:
    """Print the ratios of pairs of seconds: median, smallest, largest."""
    ratios = [one / other for one, other in pairs]
    print(f"{label}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def main() -> None:
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
    if shutil.which("nginx") is None:
        raise SystemExit("nginx is not installed")
    rng, size = np.random.default_rng(0), int(options.shard_mib * 2**20)
    others = [options.against] * (1 + options.control) if options.against else []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=options.cache) as cache:
        os.chmod(folder, 0o755)
        if options.warm:
            floats = ((f"t{index}", rng.random(size // 2, np.float32)) for index in range(options.shards))
            ndcache.dump(floats, folder, shard_bytes=size)
        else:
            tensors = ((f"t{index}", rng.integers(0, 256, size, np.uint8)) for index in range(options.shards))
            ndcache.dump(tensors, folder, encode="raw", shard_bytes=size)
        with nginx(Path(folder)) as url:

            def timed(checkout: Path) -> float:
                if options.warm:
                    subprocess.run([sys.executable, "-c", TOUCH], check=True)
                    return seconds(checkout, url, Path(cache), "load", options)
                return cold(checkout, url, options)

            for checkout in [ROOT, *others]:
                timed(checkout)  # warm up, or fill the cache
            rounds = [[timed(checkout) for checkout in [*others, ROOT]] for _ in range(options.rounds)]
    gigabytes = options.shards * size / 1e9
    for checkout, times in zip([*others, ROOT], zip(*rounds, strict=True), strict=True):
        print(f"{gigabytes / statistics.median(times):.3f} GB/s  {statistics.median(times):.3f} s  {checkout.name}")
    if others:
        show("seconds here / there", ((times[-1], other) for times in rounds for other in times[:-1]))
    if options.control:
        show("seconds there / there", ((second, first) for first, second, _ in rounds))


if __name__ == "__main__":
    main()
