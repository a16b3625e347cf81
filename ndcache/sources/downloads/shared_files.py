"""Files of which several tasks read a part each: one task obtains the file, the others wait without a worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from ...context import LoadContext
from ...format.manifest import Shard
from ...store.partials.growing import GrowingFile
from ...store.partials.ranges import ByteRange, ByteRanges
from ...workers.outcomes import Task
from ...workers.postponed import Postponed
from ...workers.shared import SharedResource
from ..model import Model, ShardFile

__all__ = ["Part", "SharedFiles", "may_stream"]


class Part(Protocol):
    """The part of a shard's file that one task reads."""

    @property
    def shard(self) -> Shard:
        """Return the shard."""

    @property
    def ranges(self) -> Sequence[ByteRange]:
        """Return its bytes."""


class SharedFile(SharedResource[ShardFile]):
    """The file of a shard, of which several tasks read a part.

    Parameters
    ----------
    parts : sequence of Part
        In the order in which they are wanted.
    model : Model
    context : LoadContext

    Attributes
    ----------
    first : Part
        Its task calls `begin` before it reads, whenever it is run.
    """

    def __init__(self, parts: Sequence[Part], model: Model, context: LoadContext) -> None:
        super().__init__(len(parts), lambda obtained: obtained.file.close())
        self.first = parts[0]
        self._model = model
        self._context = context

    def begin(self) -> None:
        """Obtain the file."""
        self.provide(self._model.obtain(self.first.shard), self._context.pool)
        self._context.arrivals.add(self.first.shard.data_path)

    def needs_slot(self, part: Part) -> bool:
        """See `SharedFiles.needs_slot`."""
        return True

    def opened(self, part: Part) -> AbstractContextManager[ShardFile]:
        """Return the file for one use; entering it raises `Postponed` if this part is not there yet."""
        return self


class StreamedFile(SharedFile):
    """A file that a task of its own obtains, while others read the parts that have been downloaded.

    The last part waits until the file is complete, so that all errors of the download are raised.
    """

    def __init__(self, parts: Sequence[Part], model: Model, context: LoadContext) -> None:
        super().__init__(parts, model, context)
        self._last = parts[-1]
        self._has_begun = False
        self._growing = GrowingFile(self.first.shard, context.pool)

    def begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._context.pool.submit_next(Task(self._obtain))

    def needs_slot(self, part: Part) -> bool:
        return part is self.first  # the download may have all slots until it ends

    @contextmanager
    def opened(self, part: Part) -> Iterator[ShardFile]:
        early = None if part is self._last else self._growing.open(ByteRanges(part.ranges))
        if early is None:
            with self as obtained:
                yield obtained
            return
        self.skip()
        with early:
            yield ShardFile(early, from_cache=False, checked="size", is_complete=False)

    def abandon(self) -> None:
        super().abandon()
        self._growing.end()

    def _obtain(self) -> None:
        try:
            check = self._context.cancellation.check
            check()
            obtained = self._model.obtain(self.first.shard, self._growing)
            try:
                self._growing.check(obtained.file, check)
            except BaseException:
                obtained.file.close()
                raise
            self.provide(obtained, self._context.pool)
            self._context.arrivals.add(self.first.shard.data_path)
        except Postponed:
            raise
        except BaseException as error:
            self.fail(error, self._context.pool)
            self._growing.end()
            raise
        self._growing.end()


class SharedFiles:
    """The files of a load that have several parts. As a context manager, it closes them at the end.

    Parameters
    ----------
    files : sequence of sequence of Part
        The parts of each file.
    model : Model
    context : LoadContext
    are_streamed : bool
        Whether to read parts while their file is downloaded, if there is nothing to check before.
    """

    def __init__(
        self, files: Sequence[Sequence[Part]], model: Model, context: LoadContext, *, are_streamed: bool
    ) -> None:
        self._files: dict[str, SharedFile] = {}
        are_streamed = are_streamed and context.pool.has_threads
        for parts in files:
            if len(parts) > 1:
                kind = StreamedFile if are_streamed and may_stream(parts[0].shard, context) else SharedFile
                self._files[parts[0].shard.data_path] = kind(parts, model, context)

    def of(self, shard: Shard) -> SharedFile | None:
        """Return the file of a shard; None if it has one part."""
        return self._files.get(shard.data_path)

    def needs_slot(self, part: Part) -> bool:
        """Return whether the task of a part takes its turn among those that use connections."""
        file = self.of(part.shard)
        return file is None or file.needs_slot(part)

    def __enter__(self) -> SharedFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.abandon()


def may_stream(shard: Shard, context: LoadContext) -> bool:
    """Return whether parts of a shard can be read while it is downloaded: nothing has to be checked before."""
    is_checked = bool(shard.digests) and context.compares_digests
    return GrowingFile.is_possible and not is_checked
