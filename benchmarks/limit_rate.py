"""Measure how close a load with ``limit_rate=`` comes to its limit, on loopback, from nginx.

Run it as ``python benchmarks/limit_rate.py [--rate 10] [--seconds 10]``; it needs ndcache, NumPy, nginx and openssl. A
model of so many MB comes in shards of 32 MiB or in one file, in ranges; over HTTP and over HTTPS; through one process
and through three. Each time, a fresh process fetches it into an empty cache. It prints what was received in a second on
average, and what passed the network interface in the ten seconds in which most did, both as parts of the limit. What
waits in the system's buffers has passed the interface, but has not been received.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file is in no package

import ndcache  # noqa: E402
from benchmarks import servers  # noqa: E402

_TIMED = """
import sys, time
import ndcache, ndcache.loader
start = time.perf_counter()
ndcache.fetch(sys.argv[1], cache_dir=sys.argv[2], limit_rate=float(sys.argv[3]), processes=int(sys.argv[4]))
print(time.perf_counter() - start)
"""


def waiting(port: int) -> int:
    """Return the bytes that have come from a port of loopback, and that nobody has read yet."""
    total = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, _, remote, _, queues, *_ = line.split()
        if int(remote.partition(":")[2], 16) == port:
            total += int(queues.partition(":")[2], 16)
    return total


def measure(url: str, ca: str | None, rate: float, processes: int) -> tuple[float, int]:
    """Return the seconds of a fetch, and the most bytes that waited in the system's buffers."""
    most, port = 0, int(url.rstrip("/").rpartition(":")[2].partition("/")[0])
    with tempfile.TemporaryDirectory() as cache:
        environ = {**os.environ, "PYTHONPATH": str(ROOT), **({} if ca is None else {"REQUESTS_CA_BUNDLE": ca})}
        command = [sys.executable, "-c", _TIMED, url, cache, str(rate), str(processes)]
        with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                time.sleep(0.05)
                most = max(most, waiting(port))
            assert process.stdout is not None
            seconds = float(process.stdout.read())
    return seconds, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=10.0, metavar="MB", help="the limit, in MB per second")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each fetch should take")
    options = parser.parse_args()
    rate = options.rate * 1e6
    nbytes = int(rate * options.seconds)
    print(f"{'model':<8}{'scheme':<8}{'processes':>9}  {'seconds':>8}  {'received / limit':>16}  {'in buffers':>10}")
    with tempfile.TemporaryDirectory() as folder:
        data = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
        pieces = np.array_split(data, max(1, nbytes >> 25))
        ndcache.dump(
            ((f"t{n}", piece) for n, piece in enumerate(pieces)),
            Path(folder, "shards"),
            encode="raw",
            shard_bytes=1 << 25,
        )
        ndcache.dump({"t": data}, Path(folder, "file"), encode="raw")
        for tls in (False, True):
            with servers.nginx(Path(folder), tls=tls) as (url, ca):
                for kind in ("shards", "file"):
                    for processes in (1, 3) if kind == "shards" else (1,):
                        seconds, most = measure(f"{url}{kind}/", ca, rate, processes)
                        print(
                            f"{kind:<8}{url.partition(':')[0]:<8}{processes:>9}  {seconds:>8.2f}"
                            f"  {nbytes / seconds / rate:>16.1%}  {most / nbytes:>10.1%}",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
