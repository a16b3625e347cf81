"""Find the nodes of a cluster, and notice workers that come and go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ..errors import CancelledError, NdcacheError
from . import tasks
from .call import Call, Failure, NodeId
from .dispatch import Dispatcher
from .engine import Engine
from .errors import on_node
from .state import Node, State

__all__ = ["Members"]

Handle = TypeVar("Handle")

#: Seconds between two looks at the engine's workers.
_LOOK_SECONDS = 1.0
#: Seconds to wait for a worker while there is none: one that was killed is being restarted.
_PATIENCE_SECONDS = 60.0


@dataclass(eq=False)
class Members(Generic[Handle]):
    """Assign each worker to its node, and each node a worker that represents it.

    Attributes
    ----------
    call : Call
    engine : Engine
    state : State
    dispatcher : Dispatcher
    lost : callable
        Called with the name of a worker that is gone, before its tasks are dropped.
    """

    call: Call
    engine: Engine[Handle]
    state: State
    dispatcher: Dispatcher[Handle]
    lost: Callable[[str], None]
    _nodes: dict[str, Node | None] = field(default_factory=dict, init=False)  # by worker; None until it is identified
    _next_look: float = field(default=0.0, init=False)
    _seen_at: float = field(default_factory=time.monotonic, init=False)

    @property
    def are_known(self) -> bool:
        """Return whether there are workers, and the node of each is known."""
        return bool(self._nodes) and None not in self._nodes.values()

    def look(self) -> None:
        """Look at the workers, at most once a second.

        Raises
        ------
        NdcacheError
            There has been no worker for a minute.
        """
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        workers = set(self.engine.workers())
        for worker in self._nodes.keys() - workers:
            self._leave(worker)
        for worker in sorted(workers - self._nodes.keys()):
            self._join(worker)
        if workers:
            self._seen_at = now
        elif now - self._seen_at > _PATIENCE_SECONDS:
            raise NdcacheError("the cluster has no worker", hint="Start workers, and call again.")

    def _join(self, worker: str) -> None:
        self._nodes[worker] = None

        def done(result: Any) -> None:
            if isinstance(result, Failure):
                if isinstance(result.error, CancelledError):
                    return  # it is shutting down
                raise on_node(result.error, worker)
            assert isinstance(result, NodeId)
            node = self.state.nodes.get(result)
            if node is None:
                node = self.state.nodes[result] = Node(result, [worker])
            else:
                node.workers.append(worker)
            self._nodes[worker] = node

        self.dispatcher.submit(worker, tasks.identify, self.call, done=done)

    def _leave(self, worker: str) -> None:
        node = self._nodes.pop(worker)
        if node is None:
            self.dispatcher.drop(worker)
            return
        was_representative = node.worker == worker
        node.workers.remove(worker)
        if not node.workers:
            self.state.forget(node)
        elif was_representative:
            node.directory = None  # survey it again: nobody knows what the lost tasks have done
        if was_representative:
            node.partials.clear()
            self.lost(worker)
            self.dispatcher.drop(worker)
