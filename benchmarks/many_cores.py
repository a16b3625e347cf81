"""Suites for machines with many cores, which write to memory: there, neither a disk nor two cores are the limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import choices, inputs, servers
from .harness import Contender, Result, Settings, Target, maker, rounds

MIB, GIB = 1 << 20, 1 << 30
_SHARD_BYTES = 64 * MIB
#: The cores of the machine for which the bounds were set.
_CORES = 16


def plain(settings: Settings) -> Result:
    """Download over plain HTTP with several numbers of workers, with digests and without."""
    return _cold("cold-many-cores", settings, with_tls=False)


def tls(settings: Settings) -> Result:
    """Download over HTTPS with several numbers of workers, with digests and without."""
    return _cold("cold-many-cores-tls", settings, with_tls=True)


def _cold(name: str, settings: Settings, *, with_tls: bool) -> Result:
    size = settings.bytes_or(4 * GIB)
    with inputs.working_folder(settings, memory=True, needed=_room(size)) as folder:
        model = inputs.synthetic(folder / "model", size, shard_bytes=_SHARD_BYTES)
        with servers.nginx(folder / "model", tls=with_tls) as (url, ca):
            # The tensors are views of the files, so only these need memory.
            make = maker({**model, "url": url, "ca": ca, "memory": model["stored"]}, model)
            many = "ndcache load, 16 workers, 2 GiB"
            targets = [Target("GB/s, 16 workers, 2 GiB", many, None, ">=", 4.5, "gb_per_second", cores=_CORES)]
            if with_tls:
                targets = [
                    Target("GB/s, 16 workers, 2 GiB", many, None, ">=", 1.8, "gb_per_second", cores=_CORES),
                    Target("curl / ndcache, 16 workers, 2 GiB", "curl --parallel", many, ">=", 1.4, cores=_CORES),
                ]
            result = Result(
                name,
                [
                    *([_load(make, 4, "ndcache load, 4 workers")] if with_tls else []),
                    _load(make, 8, "ndcache load, 8 workers"),
                    _load(make, 16, "ndcache load, 16 workers"),
                    _load(make, 16, many, memory_limit=2 * GIB),
                    *([] if with_tls else [_load(make, 32, "ndcache load, 32 workers, 2 GiB", memory_limit=2 * GIB)]),
                    _load(make, 16, "ndcache load, 16, no digests", memory_limit=2 * GIB, verify="never"),
                    *choices.downloaders(make),
                ],
                targets=targets,
            )
            return rounds(result, settings, folder)


def _load(make: Callable[..., Contender], workers: int, label: str, **more: Any) -> Contender:
    """Make a load; only with a `memory_limit` of 2 GiB can more than 8 shards of 64 MiB be under way at once."""
    return make(label, "ndcache_load", loaded=True, workers=workers, **more)


def processes(settings: Settings) -> Result:
    """Download over HTTPS with several processes, their start included."""
    size = settings.bytes_or(8 * GIB)
    with inputs.working_folder(settings, memory=True, needed=_room(size)) as folder:
        model = inputs.synthetic(folder / "model", size, shard_bytes=_SHARD_BYTES)
        with servers.nginx(folder / "model", tls=True) as (url, ca):
            make = maker({**model, "url": url, "ca": ca, "memory": model["stored"]}, model)
            four = "ndcache load, processes=4"
            result = Result(
                "processes",
                [
                    *(
                        make(f"ndcache load, processes={count}", "ndcache_load", loaded=True, processes=count)
                        for count in (1, 2, 4, 8, "auto")
                    ),
                    make("curl --parallel", "curl", settings=choices.CURL),
                    make("obstore", "obstore", settings=choices.OBSTORE),
                ],
                targets=[
                    Target("curl / ndcache, processes=4", "curl --parallel", four, ">=", 2.4, cores=_CORES),
                    Target("obstore / ndcache, processes=4", "obstore", four, ">=", 0.8, cores=_CORES),
                ],
            )
            return rounds(result, settings, folder)


def together(settings: Settings) -> Result:
    """Load one model in four processes at once, which share a cache, at 4 MiB/s for each connection."""
    size = settings.bytes_or(256 * MIB)
    with inputs.working_folder(settings, memory=True, needed=_room(size)) as folder:
        # 64 shards, so that the 32 workers of four processes get two each.
        model = inputs.synthetic(folder / "model", size, shard_bytes=size // 64, tensor_bytes=size // 64)
        log = folder / "log"
        with servers.nginx(folder / "model", rate=4 * MIB, log=log) as (url, _):
            make = maker({**model, "url": url, "log": str(log)}, model)
            alone, four = "one process of 8 workers", "four processes of 8 workers"
            result = Result(
                "processes-together",
                [
                    make(alone, "ndcache_together", loaded=True, together=1),
                    make(four, "ndcache_together", loaded=True, together=4),
                ],
                targets=[
                    Target("four together / one alone", four, alone, "<=", 0.3),
                    Target("bytes sent / model", four, None, "<=", 1.05, "origin_bytes", 1 / model["stored"]),
                ],
            )
            return rounds(result, settings, folder)


def _room(size: int) -> int:
    """Return the free space that a model and one copy of it need."""
    return size * 2 + size // 8
