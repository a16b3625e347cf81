"""The state of the coordinator: the nodes, and the shards that each of them has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import NdcacheError
from ..format.manifest import Shard
from .call import Held, NodeId, PartialState

__all__ = ["Node", "ShardState", "State"]


@dataclass(eq=False)
class Node:
    """A node of the cluster, and what is on its way to it.

    Attributes
    ----------
    id : NodeId
    workers : list of str
        Its workers; the first one represents it, and runs all of its tasks.
    directory : pathlib.Path or None
        The model's directory in its cache, once that was surveyed.
    have : set of int
        The shards that are there and right.
    under_way : set of int
        Shards that it downloads or receives now.
    partials : dict of int to PartialState
        How far it is with shards that come in several pieces.
    losses : dict of int to int
        By shard, how often its file was found bad or gone: what was sent before says nothing about the present one.
    distrusted : dict of int to set of NodeId
        By shard, nodes whose bytes were refused here.
    failures : dict of int to int
        By shard, how often a transfer to this node has failed for another reason.
    threads : int
        Threads that download now.
    downloads, sends, receives : int
        Tasks of each kind.
    sent : int
        Bytes sent so far.
    files : dict of str to str or None
        The SHA-256 of its companion files; None if it does not have them all.
    is_surveying, is_receiving_files, is_finishing, is_finished : bool
    """

    id: NodeId
    workers: list[str]
    directory: Path | None = None
    have: set[int] = field(default_factory=set)
    under_way: set[int] = field(default_factory=set)
    partials: dict[int, PartialState] = field(default_factory=dict)
    losses: dict[int, int] = field(default_factory=dict)
    distrusted: dict[int, set[NodeId]] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    threads: int = 0
    downloads: int = 0
    sends: int = 0
    receives: int = 0
    sent: int = 0
    files: dict[str, str] | None = None
    is_surveying: bool = False
    is_receiving_files: bool = False
    is_finishing: bool = False
    is_finished: bool = False

    @property
    def worker(self) -> str:
        """Return the worker that represents the node."""
        return self.workers[0]

    @property
    def is_ready(self) -> bool:
        """Return whether it is known what the node has."""
        return self.directory is not None

    def trusts(self, other: Node, index: int) -> bool:
        """Return whether this node may receive a shard from another one."""
        return other.id not in self.distrusted.get(index, ())


@dataclass(eq=False)
class ShardState:
    """One wanted shard.

    Attributes
    ----------
    shard : Shard
        Without its records.
    held : Held or None
        Its digests, and what the origin calls its version, once a node has it.
    holders : set of Node
        The nodes that have it.
    is_obtaining : bool
        Whether a node downloads it, or computes its digest.
    errors : dict of NodeId to NdcacheError
        Why nodes could not download it.
    """

    shard: Shard
    held: Held | None = None
    holders: set[Node] = field(default_factory=set)
    is_obtaining: bool = False
    errors: dict[NodeId, NdcacheError] = field(default_factory=dict)


@dataclass(eq=False)
class State:
    """All nodes and all wanted shards.

    Attributes
    ----------
    shards : dict of int to ShardState
        By their index in the manifest; empty before that is known.
    nodes : dict of NodeId to Node
        The nodes that have a worker.
    compares_digests : bool
        Whether shards travel with a digest.
    changed : set of int
        Shards that a node has got or lost; whoever reports progress clears it.
    """

    compares_digests: bool
    shards: dict[int, ShardState] = field(default_factory=dict)
    nodes: dict[NodeId, Node] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)

    def ready_nodes(self) -> Iterator[Node]:
        """Yield the nodes of which it is known what they have."""
        return (node for node in self.nodes.values() if node.is_ready)

    def gains(self, node: Node, index: int, held: Held | None = None) -> None:
        """Note that a node has a shard."""
        shard = self.shards[index]
        if held is not None and (shard.held is None or not shard.held.digests):
            shard.held = held
        node.have.add(index)
        node.under_way.discard(index)
        node.partials.pop(index, None)
        if node.id in self.nodes:
            shard.holders.add(node)
        self.changed.add(index)

    def loses(self, node: Node, index: int) -> None:
        """Note that a node does not have a shard any more."""
        node.have.discard(index)
        node.losses[index] = node.losses.get(index, 0) + 1
        self.shards[index].holders.discard(node)
        self.changed.add(index)
        node.is_finished = False

    def can_travel(self, index: int) -> bool:
        """Return whether a shard is on some node, with a digest by which others can check it."""
        shard = self.shards[index]
        if not shard.holders or shard.held is None:
            return False
        return bool(shard.held.digests) or not self.compares_digests

    def is_everywhere(self, index: int) -> bool:
        """Return whether all nodes have a shard."""
        return len(self.shards[index].holders) == len(self.nodes)

    def forget(self, node: Node) -> None:
        """Remove a node that has no worker any more."""
        self.nodes.pop(node.id, None)
        for shard in self.shards.values():
            shard.holders.discard(node)
        self.changed.update(self.shards)
