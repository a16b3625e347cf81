"""The verbs of ndcache, and what its imports cost."""

from __future__ import annotations

from .machine import Unavailable, import_torch, need, open_gpu
from .timing import alive, figures, logged_bytes, profile, timed, timed_loads, written

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any

    from .timing import Given, Measured


def ndcache_load(given: Given) -> Measured:
    """Load all weights; from a URL into an empty cache this checks md5 and syncs each file to disk."""
    import contextlib

    from ndcache import load

    if given.get("no_ranges"):
        try:
            from ndcache.sources.downloads import download
        except ImportError as error:
            raise Unavailable("this ndcache has its downloads elsewhere") from error
        download.RANGE_THRESHOLD = 1 << 62
    device = open_gpu() if given.get("gpu") else "cpu"
    if "beside" in given:
        with contextlib.suppress(Unavailable):
            need(given["beside"])
    source, options = given.get("url") or given["directory"], _options(given)

    def work() -> int:
        weights = load(source, device, **options)
        return _kept(weights)

    return timed_loads(given, work)


def ndcache_torch(given: Given) -> Measured:
    """Load tensors of torch onto ``given["device"]``: a GPU through CUDA, or the CPU."""
    need("ndcache.api")  # what every load imports
    load = need("ndcache.torch").load
    torch, device = import_torch(given) if given["device"] == "cuda" else (need("torch"), "cpu")

    def work() -> int:
        weights = load(given["directory"], device, max_workers=given.get("workers", 8))
        if device != "cpu":
            torch.cuda.synchronize()
        return _kept(weights)

    return timed_loads(given, work)


def ndcache_gpus(given: Given) -> Measured:
    """Load a model onto each of the first GPUs, one or two, all at once in threads of this process."""
    from concurrent.futures import ThreadPoolExecutor

    from ndcache import load

    devices = _cuda_devices(given) if given["device"] == "cuda" else _wgpu_devices(given)

    def work() -> int:
        with ThreadPoolExecutor(len(devices)) as pool:
            return sum(_kept(weights) for weights in pool.map(lambda each: load(given["directory"], each), devices))

    return timed_loads(given, work)


def _cuda_devices(given: Given) -> list[Any]:
    """Return the names of ``given["count"]`` devices of torch."""
    need("ndcache.torch")
    torch, device = import_torch(given)
    found = [device] if device == "cpu" else [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return _first(given, found)


def _wgpu_devices(given: Given) -> list[Any]:
    """Open ``given["count"]`` GPUs, hardware unless there is none."""
    from ndcache.devices.gpu.adapters import is_software, list_adapters

    found = list_adapters()
    names = [f"gpu:{index}" for index, adapter in enumerate(found) if not is_software(adapter)]
    return [open_gpu(name) for name in _first(given, names or ["gpu"])]


def _first(given: Given, found: list[str]) -> list[str]:
    """Return as many devices as are needed; in a quick run, one may take the place of several."""
    count = given["count"]
    if len(found) < count and not given.get("quick"):
        raise Unavailable(f"{count} GPUs are needed, and there is {len(found)}")
    return [found[index % len(found)] for index in range(count)]


def _kept(weights: Any) -> int:
    """Keep weights until they are freed, note their stages, and return their bytes."""
    alive.append(weights)
    # Of several loads, the first is the one that the profile is of.
    stages = {name: seconds for name, seconds in weights.stats.seconds.items() if seconds >= 0.001}
    profile.setdefault("stages", stages)
    return sum(tensor.nbytes for tensor in weights.values())


def ndcache_fetch(given: Given) -> Measured:
    """Fetch with md5 and fsync, without decoding."""
    from ndcache import fetch

    def work() -> int:
        fetch(given["url"], **_options(given))
        return written(given)

    return timed(work)


def ndcache_together(given: Given) -> Measured:
    """Load the same model in several processes at once, which share a cache, until the last one has all of it.

    Time starts when all have imported ndcache. How many bytes the server sent is a figure of its own.
    """
    import json
    import subprocess
    import sys

    command = [sys.executable, "-c", _TOGETHER, given["url"], json.dumps(_options(given))]
    sent = logged_bytes(given["log"])
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(given["together"])
    ]

    def finish(process: subprocess.Popen[str], text: str) -> str:
        lines = process.communicate(text)[0].split()
        if process.returncode:
            raise SystemExit(f"a process of several ended with {process.returncode}")
        return lines[-1]

    def work() -> int:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        loaded = {finish(process, "") for process in processes}
        return int(loaded.pop()) if len(loaded) == 1 else 0

    for process in processes:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit("a process of several ended before it could begin")
    measured = timed(work)
    figures["origin_bytes"] = logged_bytes(given["log"]) - sent
    return measured


_TOGETHER = """
import json, sys
from ndcache import load
print("ready", flush=True)
sys.stdin.readline()
with load(sys.argv[1], **json.loads(sys.argv[2])) as weights:
    print(sum(tensor.nbytes for tensor in weights.values()))
"""


def _options(given: Given) -> dict[str, Any]:
    """Return the options of a load that writes to the output directory."""
    names = {name: name for name in ("verify", "processes", "memory_limit")} | {"workers": "max_workers"}
    return {"cache_dir": given["out"], **{option: given[name] for name, option in names.items() if name in given}}


def ndcache_stream(given: Given) -> Measured:
    """Stream a local directory and keep nothing."""
    from ndcache import stream

    return timed(lambda: sum(array.nbytes for _, array in stream(given["directory"])))


def import_ndcache(given: Given) -> Measured:
    """Import the package."""

    def work() -> int:
        import ndcache  # noqa: F401

        return int(given["expect"])

    return timed(work)


def import_ndcache_load(given: Given) -> Measured:
    """Import the package and all that its first use imports."""

    def work() -> int:
        from ndcache import load  # noqa: F401

        return int(given["expect"])

    return timed(work)


def import_requests_numpy(given: Given) -> Measured:
    """Import the two packages that ndcache cannot do without."""

    def work() -> int:
        import numpy  # noqa: F401
        import requests  # noqa: F401

        return int(given["expect"])

    return timed(work)


def empty_gpu(given: Given) -> Measured:
    """Import ndcache and open a device, to see what memory that takes."""
    from ndcache import load  # noqa: F401

    def work() -> int:
        alive.append(open_gpu())
        return int(given["expect"])

    return timed(work)
