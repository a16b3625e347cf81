"""Share the limits of one origin with the other processes that use the same cache.

They lie in a small file of the cache, which exists only after the origin has refused a request. Each process then
loads it, acts, and stores it, while it holds the file's lock. Until then a process looks now and then whether there is
such a file, when it makes a request.

Where this is impossible (the cache cannot be written, locks do not work, somebody holds one for too long, the file is
damaged), each process keeps to the limits that it knows, as if it were alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Iterator
from functools import cached_property
from time import monotonic
from typing import Any

from ...files.folder import Folder
from ...files.shared_note import HeldNote, SharedNote
from ...files.system import ProcessId, clock_id
from .note import from_note, to_note
from .state import LimitState

__all__ = ["SharedState"]

logger = logging.getLogger("ndcache")

#: Seconds between two looks whether there is a file, and the most of all time that they take.
_LOOK, _SHARE_OF_LOOKS = 0.05, 0.02
#: Seconds until the next attempt after the file could not be used.
_RETRY = 1.0
#: Seconds after which a member tells that it lives, if nothing else changes.
_SIGN = 0.25
#: Seconds without a change after which a file is removed. Nobody has read it for a long time then.
_UNUSED = 3600
_is_ours = re.compile(r"[0-9a-f]{32}\.json").fullmatch


class SharedState:
    """The limits of one origin in a file, as seen by one member.

    Parameters
    ----------
    folder : Folder
        Where the file lies. It is made when it is needed.
    origin : str

    Attributes
    ----------
    name : str
        The name of the member.
    """

    def __init__(self, folder: Folder, origin: str) -> None:
        self.name = secrets.token_hex(8)
        self._folder = folder
        self._origin = origin
        self._next_look = self._next_try = float("-inf")
        self._useless: object = None  # the version of a file that is damaged or too old
        self._stored = float("-inf")

    @cached_property
    def _note(self) -> SharedNote:
        # Times are of no use after the next start of the system, nor on other machines that share the cache.
        key = hashlib.sha256(f"{self._origin}\n{clock_id()}".encode()).hexdigest()[:32]
        return SharedNote(self._folder, f"{key}.json")

    def is_due(self, now: float) -> bool:
        """Return whether others have stored something that is worth a load."""
        if now < self._next_look:
            return False
        version = self._note.version()
        took = monotonic() - now  # long on a slow network file system
        self._next_look = now + max(_LOOK, took / _SHARE_OF_LOOKS)
        return version is not None and version != self._useless

    @contextlib.contextmanager
    def update(self, state: LimitState, *, creates: bool) -> Iterator[float]:
        """Bring the state up to date for the block, and store it afterwards; yield the time.

        `creates` says whether to make the file if there is none.
        """
        now = monotonic()
        is_possible = now >= self._next_try and clock_id()
        is_new = False
        with self._note.held(creates=creates) if is_possible else contextlib.nullcontext() as held:
            now = monotonic()
            if held is None:
                if is_possible:
                    self._next_try = now + _RETRY
                state.remove_dead(now, self.name)
                state.forget_if_old(now)
                yield now
                state.used = now
            else:
                stored = held.read()
                self._load(stored, state, now)
                yield now
                is_new = self._store(held, stored, state, now)
        if is_new:
            self._remove_unused()

    def _load(self, stored: dict[str, Any] | None, state: LimitState, now: float) -> None:
        was_limited, known = state.is_limited, from_note(stored, now)
        if known is None or not state.adopt(known, now, self.name):
            state.forget_if_old(now)
            if not was_limited:
                self._useless = self._note.version()
        elif not was_limited:
            pause = state.pause_until - now
            wait = f", wait {pause:,.0f} s" if pause > 1 else ""
            level = logging.WARNING if wait else logging.INFO
            logger.log(level, "%s limits requests%s: another load was told so", self._origin, wait)

    def _store(self, held: HeldNote, stored: dict[str, Any] | None, state: LimitState, now: float) -> bool:
        """Store the state, unless nothing has changed; return whether nothing was there before."""
        if not state.is_limited or (to_note(state) == stored and now - self._stored < _SIGN):
            return False
        self._stored = state.used = now
        if (member := state.members.get(self.name)) is not None:
            member.process, member.seen = ProcessId.current(), now
        held.write(to_note(state))
        return stored is None

    def _remove_unused(self) -> None:
        for name in filter(_is_ours, self._folder.entries()):
            with contextlib.suppress(OSError):
                status = self._folder.status(name)
                if status is not None and time.time() - status.st_mtime > _UNUSED:
                    self._folder.unlink(name)
