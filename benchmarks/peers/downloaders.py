"""Downloaders. None compares a digest or syncs a file, but huggingface_hub and aria2c check sizes."""

from __future__ import annotations

from .machine import Unavailable, need
from .timing import timed, written

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .timing import Given, Measured


def hf_transfer(given: Given) -> Measured:
    """Download eight shards at a time, each over one connection in pieces of 10 MiB.

    Four other settings were as fast, within the spread.
    """
    from concurrent.futures import ThreadPoolExecutor

    module = need("hf_transfer")

    def download(name: str) -> None:
        module.download(given["url"] + name, f"{given['out']}/{name}", 1, 10 << 20)

    def work() -> int:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(download, given["shards"]))
        return written(given)

    return timed(work)


def huggingface_hub(given: Given) -> Measured:
    """Download each shard with `hf_hub_download`, in 8 threads, from an endpoint on loopback."""
    from concurrent.futures import ThreadPoolExecutor

    hub = need("huggingface_hub")
    need("huggingface_hub.utils").disable_progress_bars()

    def download(name: str) -> None:
        hub.hf_hub_download("bench/model", name, endpoint=given["url"].rstrip("/"), cache_dir=given["out"])

    def work() -> int:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(download, given["shards"]))
        return written(given)

    return timed(work)


def curl(given: Given) -> Measured:
    """Run ``curl --parallel --parallel-max 8``."""
    options = ["--cacert", given["ca"]] if given.get("ca") else []
    command = ["curl", "-sSf", "--parallel", "--parallel-immediate", "--parallel-max", "8", *options]
    for name in given["shards"]:
        command += ["-o", f"{given['out']}/{name}", given["url"] + name]
    return _program(given, command)


def aria2c(given: Given) -> Measured:
    """Run ``aria2c -j4 -x4``: four shards at a time, four connections for each."""
    lines = "".join(f"{given['url']}{name}\n out={name}\n" for name in given["shards"])
    options = [f"--ca-certificate={given['ca']}"] if given.get("ca") else []
    command = ["aria2c", "-q", "-j4", "-x4", "-s4", "--file-allocation=none", "-d", given["out"], "-i", "-", *options]
    return _program(given, command, lines)


def quarters(given: Given) -> Measured:
    """Download as TVM's web runtime does: four threads, each with a fixed quarter of the shards, in order."""
    import threading

    import requests

    def download(names: list[str]) -> None:
        with requests.Session() as session:
            for name in names:
                with session.get(given["url"] + name, stream=True, verify=given.get("ca") or True) as response:
                    response.raise_for_status()
                    with open(f"{given['out']}/{name}", "wb") as file:
                        for data in response.iter_content(1 << 20):
                            file.write(data)

    def work() -> int:
        shards = given["shards"]
        bounds = [len(shards) * index // 4 for index in range(5)]
        threads = [threading.Thread(target=download, args=(shards[bounds[i] : bounds[i + 1]],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return written(given)

    return timed(work)


def _program(given: Given, command: list[str], text: str | None = None) -> Measured:
    """Run a command, with `text` as its input."""
    import shutil
    import subprocess

    if shutil.which(command[0]) is None:
        raise Unavailable(f"{command[0]} is not installed")

    def work() -> int:
        subprocess.run(command, input=text, text=True, check=True, stdout=subprocess.DEVNULL)
        return written(given)

    return timed(work)
