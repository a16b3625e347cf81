"""One model for all nodes of a cluster, from an origin that gives each connection a fixed rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import inputs, servers
from .harness import Contender, Result, Settings, Target, maker, rounds

MIB = 1 << 20


def cluster(settings: Settings) -> Result:
    """Bring a model to 8 nodes of Dask and to 4 of Ray, over 8 connections of 20 MiB/s each."""
    size = settings.bytes_or(1024 * MIB)
    with inputs.working_folder(settings, memory=True, needed=10 * size) as folder:
        model = inputs.synthetic(folder / "model", size, shard_bytes=size // 64, tensor_bytes=size // 64)
        log = folder / "log"
        with servers.nginx(folder / "model", rate=20 * MIB, log=log) as (url, _):
            given = {**model, "url": url, "log": str(log), "memory": 0}
            dask_nodes, ray_nodes = (2, 2) if settings.quick else (8, 4)
            alone = "one node, one connection"
            dask, ray = f"Dask, {dask_nodes} nodes", f"Ray, {ray_nodes} nodes"
            result = Result(
                "cluster",
                [
                    maker(given, model)(alone, "ndcache_fetch", workers=1),
                    _nodes(given, model, dask, "dask_fetch", dask_nodes, 8 // dask_nodes),
                    _nodes(given, model, ray, "ray_fetch", ray_nodes, 8 // ray_nodes),
                ],
                targets=[
                    *_targets(model, alone, dask),
                    *_targets(model, alone, ray),
                ],
            )
            return rounds(result, settings, folder)


def _nodes(given: dict[str, Any], model: dict[str, Any], label: str, peer: str, nodes: int, workers: int) -> Contender:
    """Make a contender that has as many copies of the model in the end as there are nodes."""
    make = maker(given, model)
    return replace(make(label, peer, nodes=nodes, workers=workers), expect=nodes * model["stored"])


def _targets(model: dict[str, Any], alone: str, label: str) -> list[Target]:
    return [
        Target(f"{alone} / {label}", alone, label, ">=", 5),
        Target(f"{label}: bytes sent / model", label, None, "<=", 1.05, "origin_bytes", 1 / model["stored"]),
    ]
