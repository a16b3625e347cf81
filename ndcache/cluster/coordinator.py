"""Bring one model to all nodes of a cluster, from the client's thread.

::

    identify     every worker           which workers share a node; one of each represents it
    open_manifest on one node           the only request for the manifest; its bytes go on by the engine's data plane
    survey       every node             publish the manifest; which shards are there and right
    obtain       each missing shard     on one node, from the origin, into that node's cache
    read, write  each other node        bytes of shards, in pieces; checked again, and published there
    finish       every node             remove shards of earlier versions
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..format.manifest import NameFilter
from ..progress import Progress
from .engine import Engine

__all__ = ["fetch_to_nodes"]

Handle = TypeVar("Handle")


def fetch_to_nodes(
    engine: Engine[Handle],
    source: str,
    options: Mapping[str, Any],
    *,
    names: NameFilter = None,
    progress: Progress = None,
) -> dict[str, Path]:
    """Bring a model to every node of a running cluster; block until it is there.

    Parameters
    ----------
    engine : Engine
    source : str
        A URL, or ``hf://…``.
    options : mapping of str to object
        Options of `LoaderOptions`, checked here; those that cannot travel raise a TypeError or ValueError.
    names, progress
        See `ndcache.fetch`.

    Returns
    -------
    dict
        The model's directory on each node, by the worker that published it there.
    """
    raise NotImplementedError
