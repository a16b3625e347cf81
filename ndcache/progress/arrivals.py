"""Count the shards of a load that are here, or on their way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

from ..urls.redact import printable

__all__ = ["Arrivals"]

#: Seconds from the beginning in which workers find what other processes download already. What they find later is of
#: downloads that began meanwhile.
_EARLY = 1.0


class Arrivals:
    """Keep which of a load's shards are here, are coming, or wait: for a server, or for another process.

    The workers write it, and the caller's thread reads it.
    """

    # Without a lock, which Ctrl-C could leave locked: each step is one operation of a dict, and readers copy.

    def __init__(self) -> None:
        self._sizes: Mapping[str, int] = {}
        self._counted = 0  # how many entries of `_here` the next two fields cover
        self._names: list[str] = []
        self._names_bytes = 0
        self._here: dict[str, None] = {}
        self._coming: dict[str, Callable[[], int]] = {}
        self._left: dict[str, int] = {}
        self._waits: dict[str, Callable[[], int | None]] = {}
        self._began = 0.0
        self._elsewhere: dict[str, tuple[int, int]] = {}  # bytes that another process had at the beginning; has now
        self._coming_to: dict[object, Mapping[str, int]] = {}  # by helper process
        self._of_helpers: dict[str, None] = {}  # shards that helper processes download, or have
        self._pauses: dict[object, tuple[bool, str]] = {}

    # --- for the workers; shards are named by their ``dataPath``

    def begin(self, name: str, count: Callable[[], int]) -> None:
        """Note that a download begins; `count` returns the bytes that are here."""
        self._waits.pop(name, None)
        self._coming[name] = count

    def end(self, name: str, kept: int) -> None:
        """Note that a download ended, perhaps early, and how many bytes it left in a partial file."""
        self._left[name] = kept
        self._coming.pop(name, None)

    def add(self, name: str) -> None:
        """Note that a shard is here."""
        is_own = name in self._coming or name in self._left
        if self._sizes and name not in self._here and not is_own:
            seen, _ = self._elsewhere.get(name, (0, 0))
            self._elsewhere[name] = seen, self.size(name)
        self._here[name] = None
        self._waits.pop(name, None)

    def reading(self, name: str) -> Callable[[int], None]:
        """Note that a file is read whole; return a function to call with the bytes of each part that was."""
        nbytes = 0

        def count(more: int) -> None:
            nonlocal nbytes
            nbytes += more

        self.begin(name, lambda: nbytes)
        return count

    def wait(self, name: str, find_holder: Callable[[], int | None], nbytes: int | None = None) -> None:
        """Note that a worker waits for somebody else who downloads a shard.

        Parameters
        ----------
        name : str
        find_holder : callable
            Return the id of the process that does, or None if it cannot be known.
        nbytes : int, optional
            How many bytes that process has of it, if that is known.
        """
        self._waits[name] = find_holder
        if nbytes is not None:
            is_early = time.monotonic() - self._began < _EARLY
            seen, last = self._elsewhere.get(name, (nbytes if is_early else 0, nbytes))
            self._elsewhere[name] = seen, max(last, nbytes)

    def pause(self, key: object, reason: str, *, is_wanted: bool) -> None:
        """Note why requests have to wait, or are made again. It replaces the last reason with the same key.

        A reason that the server wants comes before others.
        """
        self._pauses[key] = is_wanted, reason

    def go_on(self, key: object) -> None:
        """Note that a pause is over, if there was one."""
        self._pauses.pop(key, None)

    def note_helper(
        self, key: object, coming: Mapping[str, int], published: Sequence[str], pause: tuple[bool, str] | None
    ) -> None:
        """Note what a helper process does.

        Parameters
        ----------
        key : object
            Stands for the process.
        coming : mapping of str to int
            The bytes of the shards that it receives.
        published : sequence of str
            Shards that are here now.
        pause : tuple or None
            Its `first_pause`.
        """
        self._of_helpers.update(dict.fromkeys([*coming, *published]))
        for name in published:
            self._here[name] = None
            self._waits.pop(name, None)
        self._coming_to[key] = coming
        if pause is None:
            self.go_on(key)
        else:
            self._pauses[key] = pause

    # --- for a helper process, which reports them

    @property
    def coming(self) -> dict[str, int]:
        """Return the bytes of each shard that is coming."""
        return {name: count() for name, count in self._coming.copy().items()}

    @property
    def first_pause(self) -> tuple[bool, str] | None:
        """Return whether the server wants a pause, and its reason; None if there is no pause."""
        return max(self._pauses.copy().values(), key=lambda pause: pause[0], default=None)

    # --- for the caller's thread

    def expect(self, sizes: Mapping[str, int]) -> None:
        """Set the bytes of each wanted shard, when all that is here has been added."""
        self._sizes, self._began = sizes, time.monotonic()

    def size(self, name: str) -> int:
        """Return the bytes of a shard."""
        return self._sizes.get(name, 0)

    @property
    def sizes(self) -> list[int]:
        """Return the bytes of each wanted shard, in manifest order."""
        return list(self._sizes.values())

    @property
    def names(self) -> list[str]:
        """Return the wanted shards that are here, in the order in which they came."""
        if (count := len(self._here)) > self._counted:
            self._counted = count
            self._names = [name for name in self._here.copy() if name in self._sizes]
            self._names_bytes = sum(map(self.size, self._names))
        return self._names

    @property
    def nbytes(self) -> int:
        """Return the bytes of wanted shards that are here, those of incomplete ones included."""
        coming = self.coming
        here = self._names_bytes if self.names else 0
        # A shard that was here and comes again was damaged.
        again = sum(self.size(name) for name in coming if name in self._here)
        elsewhere = {name: count for name, (_, count) in self._elsewhere.copy().items()}
        parts: dict[str, int] = {}
        for counts in (self._left.copy(), elsewhere, *self._coming_to.copy().values()):
            for name, count in counts.items():
                if name not in self._here:
                    parts[name] = max(count, parts.get(name, 0))
        parts.update(coming)
        return here - again + sum(min(count, self.size(name)) for name, count in parts.items())

    @property
    def brought(self) -> int:
        """Return the bytes that came by way of other processes, helpers not counted."""
        others = self._elsewhere.copy().items()
        return sum(count - before for name, (before, count) in others if name not in self._of_helpers)

    @property
    def waiting(self) -> str | None:
        """Return the reason of a pause, or which process downloads what workers wait for; None if they do not wait."""
        if (pause := self.first_pause) is not None:
            return pause[1]
        waits, coming = self._waits.copy(), self._coming.copy()
        names = {name: find_holder for name, find_holder in waits.items() if name not in coming}
        if not names:
            return None
        (name, find_holder), *others = names.items()
        pid = find_holder()
        if pid is None:
            who = "another process"
        else:
            who = "another load of this process" if pid == os.getpid() else f"process {pid}"
        more = f" and {len(others)} more" if others else ""
        return f"waiting for {who}, which downloads {printable(name)}{more}"
