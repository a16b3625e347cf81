"""Measure a load, and what is beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ...loader import Loader
from ...loaders.probe import local_files
from ...progress import Progress
from .device import device_rate
from .disk import disk_rates, part_in_memory
from .network import network_rates
from .rates import BenchReport, Rate, Used

__all__ = ["run_bench"]


def run_bench(
    loader: Loader,
    source: str,
    device: str,
    folder: Path,
    *,
    names: tuple[str, ...] = (),
    is_limited: bool = False,
    progress: Progress = None,
    report: str | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> BenchReport:
    """Load a model once, and measure the network, the disk and the device.

    Parameters
    ----------
    loader : Loader
        Its cache must be empty.
    source : str
    device : str
        As for `ndcache.load`.
    folder : pathlib.Path
        An empty directory on the disk of the cache, for temporary files.
    names : tuple of str
        Patterns of the tensors to load; all if there is none.
    is_limited : bool
        Whether the loader has a `limit_rate`.
    progress
        As for `ndcache.load`.
    report : str, optional
        As for `ndcache.load`.
    say : callable
        Called with a line about each step.

    Returns
    -------
    BenchReport

    Raises
    ------
    ValueError, OSError, NdcacheError
        As for `ndcache.load`.
    """
    path, wanted = folder / "trace.json", names or None
    local = local_files(loader, source, wanted)
    in_memory = None if local is None else part_in_memory(local)
    with loader.load(source, device, names=wanted, files=False, progress=progress, trace=path, report=report) as loaded:
        stats, tensors, nbytes, opened = loaded.stats, len(loaded), loaded.nbytes, loaded.device
        sizes = [shard.nbytes for shard in loaded.manifest.select(wanted)]
        # On the CPU, those that cannot be written to are views of the files, and cost nothing.
        moved = [name for name, each in loaded.items() if opened != "cpu" or each.flags.writeable]
        used = Used(
            stats,
            read=sum(loaded.manifest[name].nbytes for name in moved),
            moved=sum(loaded[name].nbytes for name in moved),
        )
    trace = json.loads(path.read_bytes())
    say("measuring the network")
    network = network_rates(loader, source, wanted, trace, sizes, used, is_limited=is_limited)
    say("measuring the disk")
    disk = disk_rates(folder, sizes, local, int(trace["otherData"]["workers"]), used, in_memory)
    say("measuring the device")
    copied = device_rate(folder, device, opened, used)
    absent = [Rate("network", None, None, "not needed: the source is local")]
    return BenchReport(stats, tensors, nbytes, opened, (*(network or absent), *disk, copied), trace, is_limited)
