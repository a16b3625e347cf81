"""Send shards from the nodes that have them to those that do not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..errors import CancelledError, DiskFullError, IntegrityError
from . import tasks
from .call import Call, Failure, ManifestFile, PartialState, Piece, Survey
from .dispatch import Dispatcher
from .errors import on_node
from .state import Node, State

__all__ = ["MAX_PIECE_BYTES", "Spread"]

Handle = TypeVar("Handle")

#: The most bytes that travel at once, of one shard or of several small ones.
MAX_PIECE_BYTES = 64 << 20
#: The most shards that travel together.
_MAX_PIECES = 256
#: Transfers to a node at once, and from a node: while one is written, the next one arrives.
_SLOTS = 2
#: How often a transfer to a node is tried,
_MAX_TRIES = 5


logger = logging.getLogger("ndcache")


@dataclass(eq=False)
class Spread(Generic[Handle]):
    """Transfer shards between nodes, so that each node that has something passes it on.

    A transfer has one sender and one receiver, and counts towards the memory of both until it has ended. As each node
    takes part in at most two transfers as the sender and two as the receiver, four pieces are the most that it holds.

    Attributes
    ----------
    call : Call
    state : State
    dispatcher : Dispatcher
    manifest : callable
        Return the manifest, or the handle of a task that returns it.
    piece_bytes : int
        The most bytes of a transfer.
    """

    call: Call
    state: State
    dispatcher: Dispatcher[Handle]
    manifest: Callable[[], Handle | ManifestFile]
    piece_bytes: int

    def assign(self) -> None:
        """Start what can be started now."""
        travelling = [index for index in self.state.shards if self._may_travel(index)]
        if not travelling:
            return
        # Shards that few nodes have come first, so that more nodes can pass them on.
        travelling.sort(key=lambda index: len(self.state.shards[index].holders))
        for node in sorted(self.state.ready_nodes(), key=lambda node: len(node.have)):
            while node.receives < _SLOTS and self._start_one(node, travelling):
                pass

    def _may_travel(self, index: int) -> bool:
        return self.state.can_travel(index) and not self.state.is_everywhere(index)

    def _start_one(self, receiver: Node, travelling: list[int]) -> bool:
        """Start a transfer to a node, if there is one that can be started; return whether there was."""
        for index in travelling:
            if index in receiver.have or index in receiver.under_way:
                continue
            shard = self.state.shards[index].shard
            if shard.nbytes > self.piece_bytes and index not in receiver.partials:
                self._begin(receiver, index)
                return True
            piece = self._next_piece(receiver, index)
            sender = self._choose_sender(receiver, piece)
            if sender is not None:
                pieces = [piece, *self._more(receiver, sender, travelling, piece)] if piece.is_whole else [piece]
                self._transfer(sender, receiver, pieces)
                return True
        return False

    def _next_piece(self, receiver: Node, index: int) -> Piece:
        shard = self.state.shards[index].shard
        start = receiver.partials[index].nbytes if index in receiver.partials else 0
        return Piece(index, shard, start, min(shard.nbytes, start + self.piece_bytes))

    def _choose_sender(self, receiver: Node, piece: Piece) -> Node | None:
        """Return the node that sends least of those that have a piece."""
        if piece.is_whole:
            able: Iterable[Node] = self.state.shards[piece.index].holders
        else:
            able = (node for node in self.state.ready_nodes() if self._has(node, piece))
        free = [
            node for node in able if node is not receiver and node.sends < _SLOTS and receiver.trusts(node, piece.index)
        ]
        return min(free, key=lambda node: (node.sends, node.sent), default=None)

    def _has(self, node: Node, piece: Piece) -> bool:
        if piece.index in node.have:
            return True
        partial = node.partials.get(piece.index)
        return partial is not None and partial.nbytes >= piece.end

    def _more(self, receiver: Node, sender: Node, travelling: list[int], first: Piece) -> list[Piece]:
        """Return other small shards that can travel together with the first one."""
        more: list[Piece] = []
        room = self.piece_bytes - first.size
        for index in travelling:
            if len(more) == _MAX_PIECES or not room:
                break
            shard = self.state.shards[index].shard
            if index == first.index or shard.nbytes > room or index not in sender.have:
                continue
            if index not in receiver.have and index not in receiver.under_way and receiver.trusts(sender, index):
                more.append(Piece(index, shard, 0, shard.nbytes))
                room -= shard.nbytes
        return more

    def _begin(self, receiver: Node, index: int) -> None:
        receiver.under_way.add(index)
        receiver.receives += 1

        def ended() -> None:
            receiver.under_way.discard(index)
            receiver.receives -= 1

        def done(result: Any) -> None:
            ended()
            if isinstance(result, Failure):
                self._failed(receiver, index, result.error)
            else:
                receiver.partials[index] = result

        shard = self.state.shards[index].shard
        self.dispatcher.submit(receiver.worker, tasks.begin, self.call, shard, done=done, lost=ended)

    def _transfer(self, sender: Node, receiver: Node, pieces: list[Piece]) -> None:
        indices, size = {piece.index for piece in pieces}, sum(piece.size for piece in pieces)
        sender.sends += 1
        sender.sent += size
        receiver.receives += 1
        receiver.under_way |= indices
        losses = {index: sender.losses.get(index) for index in indices}
        partials = {index: sender.partials[index].file_name for index in indices & sender.partials.keys()}
        data = self.dispatcher.submit_staying(sender.worker, tasks.read, self.call, pieces, partials)

        def ended() -> None:
            self.dispatcher.forget(data)
            sender.sends -= 1
            receiver.receives -= 1
            receiver.under_way -= indices

        def lost() -> None:
            ended()
            for index in indices:
                # Perhaps the receiver has the piece and is writing it: let it begin a partial file of its own.
                receiver.partials.pop(index, None)

        def done(result: Any) -> None:
            ended()
            for index in indices:
                outcome = result if isinstance(result, Failure) else result[index]
                self._done(sender, receiver, index, outcome, is_same_file=sender.losses.get(index) == losses[index])

        held = {index: self.state.shards[index].held for index in indices}
        partial = receiver.partials.get(pieces[0].index)
        self.dispatcher.submit(
            receiver.worker, tasks.write, self.call, pieces, held, data, partial, done=done, lost=lost
        )

    def _done(
        self,
        sender: Node,
        receiver: Node,
        index: int,
        outcome: PartialState | Failure | None,
        *,
        is_same_file: bool,
    ) -> None:
        if outcome is None:
            self.state.gains(receiver, index)
        elif isinstance(outcome, PartialState):
            receiver.partials[index] = outcome
        elif isinstance(outcome.error, IntegrityError):
            self._refused(sender, receiver, index, outcome.error, is_same_file=is_same_file)
        else:
            if outcome.is_passed_on and is_same_file:
                self.look_again(sender, index)
            self._failed(receiver, index, outcome.error)

    def _refused(self, sender: Node, receiver: Node, index: int, error: IntegrityError, *, is_same_file: bool) -> None:
        """Let a node that refused wrong bytes ask another one, and the sender check what it has."""
        shard = self.state.shards[index].shard
        logger.warning("%s refused %s, as %s sent wrong bytes", receiver.worker, shard.data_path, sender.worker)
        self._count_failure(receiver, index, error)
        senders = {sender} if is_same_file else set()
        if shard.nbytes > self.piece_bytes:
            senders = self._senders_of(receiver, index)
        for each in senders:
            receiver.distrusted.setdefault(index, set()).add(each.id)
            self.look_again(each, index)

    def _senders_of(self, receiver: Node, index: int) -> set[Node]:
        """Return the nodes that may have sent a piece of a large shard: it is only checked as a whole."""
        receiver.partials.pop(index, None)
        return {node for node in self.state.ready_nodes() if index in node.have or index in node.partials} - {receiver}

    def look_again(self, node: Node, index: int) -> None:
        """Let a node read what it has of a shard again, and set it aside if it is bad."""
        node.partials.pop(index, None)
        if index not in node.have or index in node.under_way:
            return
        self.state.loses(node, index)
        node.under_way.add(index)
        shard = self.state.shards[index]
        shard.is_obtaining = True  # so that nobody downloads it until this is known

        def ended() -> None:
            node.under_way.discard(index)
            shard.is_obtaining = False

        def done(result: Any) -> None:
            ended()
            if isinstance(result, Survey) and index in result.held:
                self.state.gains(node, index)
                return
            for other in self.state.nodes.values():
                other.distrusted.get(index, set()).discard(node.id)  # the bad file is gone, and what follows is checked

        manifest = self.manifest()
        self.dispatcher.submit(node.worker, tasks.survey, self.call, [index], manifest, "always", done=done, lost=ended)

    def _failed(self, receiver: Node, index: int, error: Exception) -> None:
        receiver.partials.pop(index, None)
        if isinstance(error, CancelledError):
            return  # a worker is shutting down
        self._count_failure(receiver, index, error)

    def _count_failure(self, receiver: Node, index: int, error: Exception) -> None:
        receiver.failures[index] = receiver.failures.get(index, 0) + 1
        if isinstance(error, DiskFullError) or receiver.failures[index] == _MAX_TRIES:
            raise on_node(error, receiver.worker)
