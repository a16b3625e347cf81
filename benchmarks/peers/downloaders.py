"""Downloaders. None compares a digest or syncs a file, but huggingface_hub and aria2c check sizes."""

from __future__ import annotations

from .machine import Unavailable, need
from .timing import timed, written

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .timing import Given, Measured


def hf_transfer(given: Given) -> Measured:
    """Download several shards at a time, each over several connections in pieces of some MiB."""
    from concurrent.futures import ThreadPoolExecutor

    module = need("hf_transfer")

    def download(name: str) -> None:
        module.download(given["url"] + name, f"{given['out']}/{name}", given["connections"], given["MiB"] << 20)

    def work() -> int:
        with ThreadPoolExecutor(given["files"]) as pool:
            list(pool.map(download, given["shards"]))
        return written(given)

    return timed(work)


def obstore(given: Given) -> Measured:
    """Get ranges of 16 MiB by several threads, each of which writes them to the shard's file."""
    import os
    from concurrent.futures import ThreadPoolExecutor

    module, stores = need("obstore"), need("obstore.store")
    store = stores.HTTPStore.from_url(given["url"], client_options={"allow_http": True, "timeout": "600s"})
    nbytes = 16 << 20

    def get(part: tuple[str, int, int]) -> None:
        name, start, length = part
        data = memoryview(module.get_range(store, name, start=start, length=length))
        file = os.open(f"{given['out']}/{name}", os.O_WRONLY | os.O_CREAT)
        try:
            while data:
                written_bytes = os.pwrite(file, data, start)
                data, start = data[written_bytes:], start + written_bytes
        finally:
            os.close(file)

    def work() -> int:
        parts = [
            (name, start, min(nbytes, size - start))
            for name, size in zip(given["shards"], given["sizes"], strict=True)
            for start in range(0, size, nbytes)
        ]
        with ThreadPoolExecutor(given["threads"]) as pool:
            list(pool.map(get, parts))
        return written(given)

    return timed(work)


def huggingface_hub(given: Given) -> Measured:
    """Download each shard with `hf_hub_download`, in several threads, from an endpoint on loopback."""
    from concurrent.futures import ThreadPoolExecutor

    hub = need("huggingface_hub")
    need("huggingface_hub.utils").disable_progress_bars()

    def download(name: str) -> None:
        hub.hf_hub_download("bench/model", name, endpoint=given["url"].rstrip("/"), cache_dir=given["out"])

    def work() -> int:
        with ThreadPoolExecutor(given["threads"]) as pool:
            list(pool.map(download, given["shards"]))
        return written(given)

    return timed(work)


def curl(given: Given) -> Measured:
    """Run ``curl --parallel`` with ``--parallel-max``."""
    options = ["--cacert", given["ca"]] if given.get("ca") else []
    parallel = ["--parallel", "--parallel-immediate", "--parallel-max", str(given["--parallel-max"])]
    command = ["curl", "-sSf", *parallel, *options]
    for name in given["shards"]:
        command += ["-o", f"{given['out']}/{name}", given["url"] + name]
    return _program(given, command)


def aria2c(given: Given) -> Measured:
    """Run ``aria2c`` with ``-j`` shards at a time, and ``-x`` connections for each, which get ``-k`` bytes or more."""
    lines = "".join(f"{given['url']}{name}\n out={name}\n" for name in given["shards"])
    parallel = [f"-j{given['-j']}", f"-x{given['-x']}", f"-s{given['-x']}", f"-k{given['-k']}"]
    options = [f"--ca-certificate={given['ca']}"] if given.get("ca") else []
    command = ["aria2c", "-q", *parallel, "--file-allocation=none", "-d", given["out"], "-i", "-", *options]
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
