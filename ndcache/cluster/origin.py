"""Assign the shards that no node has to nodes, which download them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..errors import CancelledError, ChecksumError, NdcacheError
from . import tasks
from .call import Call, Failure, Held
from .dispatch import Dispatcher
from .errors import on_node
from .state import Node, ShardState, State

__all__ = ["Origin"]

Handle = TypeVar("Handle")

#: Tasks of a node that download at once, so that its connections are not idle while the last shard of one arrives.
_LANES = 2
#: The most bytes that a task downloads if it could take fewer shards: other nodes get them when it has ended.
_BATCH_BYTES = 128 << 20
#: The most nodes that try to download a shard, if an error may be the node's own.
_MAX_TRIES = 2


@dataclass(eq=False)
class Origin(Generic[Handle]):
    """Download each shard once, on the first node that is free.

    A node takes several shards at a time: at first a good part of its share, and fewer towards the end, so that all
    nodes end at about the same time.

    Attributes
    ----------
    call : Call
    state : State
    dispatcher : Dispatcher
    max_workers : int
        The most connections of a node.
    """

    call: Call
    state: State
    dispatcher: Dispatcher[Handle]
    max_workers: int

    def assign(self) -> None:
        """Start what can be started now."""
        waiting = self._waiting()
        for node in sorted(self.state.ready_nodes(), key=lambda node: node.threads):
            while node.downloads < self._lanes and node.threads < self.max_workers:
                batch = self._own(node) or self._take(node, waiting)
                if not batch:
                    break
                self._start(node, batch, is_last=not waiting)

    @property
    def _lanes(self) -> int:
        return min(_LANES, self.max_workers)

    def _waiting(self) -> dict[int, ShardState]:
        """Return the shards that no node has, the largest first."""
        found = [(i, each) for i, each in self.state.shards.items() if not each.holders and not each.is_obtaining]
        return dict(sorted(found, key=lambda item: -item[1].shard.nbytes))

    def _own(self, node: Node) -> list[int]:
        """Return shards that only this node can do: digests of what it has, and what it accepts from no other node."""
        own = []
        for index, each in self.state.shards.items():
            if index in node.under_way or each.is_obtaining:
                continue
            if index in node.have:
                needs_digest = not self.state.can_travel(index) and not self.state.is_everywhere(index)
                if needs_digest:
                    own.append(index)
            elif each.holders and not any(node.trusts(holder, index) for holder in each.holders):
                own.append(index)
        return own

    def _take(self, node: Node, waiting: dict[int, ShardState]) -> list[int]:
        """Take a node's next shards from those that wait."""
        able = [index for index, each in waiting.items() if node.id not in each.errors]
        if not able:
            return []
        lanes = self._lanes * len(self.state.nodes)
        share = sum(waiting[index].shard.nbytes for index in able) / (2 * lanes)
        nbytes = min(share, _BATCH_BYTES)
        count = min(math.ceil(self.max_workers / self._lanes), math.ceil(len(able) / lanes))
        batch: list[int] = []
        taken = 0
        for index in able:
            if len(batch) >= count and taken + waiting[index].shard.nbytes > nbytes:
                break
            batch.append(index)
            taken += waiting.pop(index).shard.nbytes
        return batch

    def _start(self, node: Node, batch: list[int], *, is_last: bool) -> None:
        free = self.max_workers - node.threads
        threads = free if is_last else min(free, math.ceil(self.max_workers / self._lanes))
        node.threads += threads
        node.downloads += 1
        node.under_way.update(batch)
        for index in batch:
            self.state.shards[index].is_obtaining = True

        def ended() -> None:
            node.threads -= threads
            node.downloads -= 1
            node.under_way.difference_update(batch)
            for index in batch:
                self.state.shards[index].is_obtaining = False

        def done(result: Any) -> None:
            ended()
            self._done(node, batch, result)

        shards = {index: self.state.shards[index].shard for index in batch}
        self.dispatcher.submit(node.worker, tasks.obtain, self.call, shards, threads, done=done, lost=ended)

    def _done(self, node: Node, batch: list[int], result: Any) -> None:
        if isinstance(result, Failure):
            if isinstance(result.error, CancelledError):
                return  # its worker is shutting down
            raise on_node(result.error, node.worker)
        for index in batch:
            found: Held | Failure | None = result[index]
            if isinstance(found, Held):
                self._check(node, index, found)
                self.state.gains(node, index, found)
            elif found is not None:
                self._failed(node, index, found.error)

    def _check(self, node: Node, index: int, found: Held) -> None:
        """Compare what a node downloaded itself, as it refused what it received, with what the others have."""
        each = self.state.shards[index]
        if each.held is None or not each.holders - {node}:
            return
        for algorithm, expected in each.held.digests.items():
            received = found.digests.get(algorithm, expected)
            if received != expected:
                error = ChecksumError(
                    f"two nodes have downloaded different bytes: their {algorithm} is {received} and {expected}",
                    shard=each.shard.data_path,
                    expected=expected,
                    received=received,
                    hint="The manifest has no digest of this file, which seems to have changed on the server.",
                )
                raise on_node(error, node.worker)

    def _failed(self, node: Node, index: int, error: Exception) -> None:
        each = self.state.shards[index]
        named = on_node(error, node.worker)
        if not isinstance(named, NdcacheError):
            raise named
        named.shard = named.shard or each.shard.data_path
        others = tuple(each.errors.values())
        each.errors[node.id] = named
        can_try_elsewhere = named.retryable and not each.holders and len(each.errors) < _MAX_TRIES
        if not can_try_elsewhere or self.state.nodes.keys() <= each.errors.keys():
            named.others += others
            raise named
