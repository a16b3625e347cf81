"""Bring the companion files to all nodes: one fetches them from the origin, and the others receive them from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ..errors import CancelledError, NdcacheError, OfflineError, RemoteChangedError
from . import tasks
from .call import Call, Failure, HeldFiles
from .dispatch import Dispatcher
from .errors import on_node
from .state import Node, State

__all__ = ["Files"]

Handle = TypeVar("Handle")

#: The most nodes that try to fetch the files, if an error may be the node's own.
_MAX_TRIES = 2


@dataclass(eq=False)
class Files(Generic[Handle]):
    """The companion files of one call, and the nodes that have them.

    Attributes
    ----------
    call : Call
    state : State
    dispatcher : Dispatcher
    memory_limit : int
        Larger sets of files are not sent from node to node: each node fetches them itself.
    failure : NdcacheError or None
        Why they cannot be fetched. Shards go on, and the call raises it in the end.
    """

    call: Call
    state: State
    dispatcher: Dispatcher[Handle]
    memory_limit: int
    failure: Exception | None = field(default=None, init=False)
    _held: HeldFiles | None = field(default=None, init=False)  # once a node has fetched them
    _owner: Node | None = field(default=None, init=False)  # the node that sends them
    _sent: tuple[str, Handle] | None = field(default=None, init=False)  # its worker, and what it has read for others
    _is_fetching: bool = field(default=False, init=False)
    _are_unknown: bool = field(default=False, init=False)  # offline, and no node has them
    _errors: dict[Node, NdcacheError] = field(default_factory=dict, init=False)
    _alone: set[Node] = field(default_factory=set, init=False)  # nodes that could not use what was sent

    @property
    def is_done(self) -> bool:
        """Return whether all nodes have the files, or nobody can get them."""
        if self._is_ended:
            return True
        return self._held is not None and all(self._has(node) for node in self.state.nodes.values())

    @property
    def _is_ended(self) -> bool:
        return self.call.files is None or self._are_unknown or self.failure is not None

    def assign(self) -> None:
        """Start what can be started now."""
        if self._is_ended:
            return
        ready = list(self.state.ready_nodes())
        if self._held is None or self._owner is None or self._owner.id not in self.state.nodes:
            self._choose_owner(ready)
            return
        for node in ready:
            if node.is_receiving_files or self._has(node):
                continue
            if node in self._alone or self._held.nbytes > self.memory_limit:
                self._fetch(node)
            else:
                self._send(node)

    def lose(self, worker: str) -> None:
        """React to a worker that is gone."""
        if self._sent is not None and self._sent[0] == worker:
            self._sent = None

    def _has(self, node: Node) -> bool:
        return self._held is not None and node.files == self._held.digests

    def _choose_owner(self, ready: Sequence[Node]) -> None:
        """Let a node fetch the files; one that has them needs no request, or only asks whether they have changed."""
        able = sorted((node for node in ready if node not in self._errors), key=lambda node: node.files is None)
        if able and not self._is_fetching:
            self._fetch(able[0])

    def _fetch(self, node: Node) -> None:
        self._is_fetching = node.is_receiving_files = True

        def lost() -> None:
            self._is_fetching = node.is_receiving_files = False

        def done(result: Any) -> None:
            lost()
            if isinstance(result, HeldFiles):
                node.files = result.digests
                if self._owner is None or self._owner.id not in self.state.nodes:
                    self._held, self._owner, self._sent = result, node, None
                elif not self._has(node):
                    self.failure = on_node(_changed(), node.worker)
            else:
                self._failed(node, result.error)

        self.dispatcher.submit(node.worker, tasks.fetch_files, self.call, done=done, lost=lost)

    def _failed(self, node: Node, error: Exception) -> None:
        if isinstance(error, CancelledError):
            return  # its worker is shutting down
        named = on_node(error, node.worker)
        if not isinstance(named, NdcacheError):
            raise named
        self._errors[node] = named
        can_try_elsewhere = isinstance(named, OfflineError) or (named.retryable and len(self._errors) < _MAX_TRIES)
        if can_try_elsewhere and not set(self.state.nodes.values()) <= self._errors.keys():
            return
        first = next(iter(self._errors.values()))
        if isinstance(first, OfflineError) and not first.missing:
            self._are_unknown = True  # `fetch` without a cluster does not miss them either
        else:
            self.failure = first

    def _send(self, node: Node) -> None:
        assert self._held is not None
        node.is_receiving_files, digests = True, self._held.digests

        def lost() -> None:
            node.is_receiving_files = False

        def done(result: Any) -> None:
            lost()
            if not isinstance(result, Failure):
                node.files = digests
            elif not isinstance(result.error, CancelledError):
                self._alone.add(node)

        self.dispatcher.submit(node.worker, tasks.keep_files, self.call, self._read(), digests, done=done, lost=lost)

    def _read(self) -> Handle:
        """Return the files for a task: the result of another one, on the node that sends them."""
        assert self._owner is not None
        if self._sent is None:
            handle = self.dispatcher.submit_staying(self._owner.worker, tasks.read_files, self.call)
            self._sent = self._owner.worker, handle
        return self._sent[1]


def _changed() -> NdcacheError:
    return RemoteChangedError(
        "the companion files changed on the server while they were brought to the nodes",
        hint="Nodes may have different ones. Call again, with force=True.",
    )
