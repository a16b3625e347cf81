"""Remove models from the cache that a rule no longer keeps, and never one that is in use.

::

    rules ─> models that are due ─> the least recently used ones, until the rest fits ─> report
               each: lock it, so that no load begins to use it ─> move it to the trash ─> empty the trash
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import CacheError
from ...files.folder import Folder
from .deletion import check_deletion, delete_leftovers, delete_model, remove_tree
from .listing import CachedModel, FoundModel, find_models, find_trash
from .sizes import Balance, DiskUse, disk_use
from .usage import is_used, unused

__all__ = ["PruneReport", "PruneRules", "prune_cache", "remove_models"]


@dataclass(frozen=True)
class PruneReport:
    """The result of `ndcache.cache.prune` and `ndcache.cache.delete`.

    Attributes
    ----------
    removed : tuple of CachedModel
        The models that were removed, or would be.
    freed_each : tuple of int
        The bytes that each of them freed: not those that other models share.
    in_use : tuple of CachedModel
        Those that would have been removed too, if no load used them.
    cleaned : tuple of CachedModel
        Those that were kept, of which partial files or files that were set aside were removed.
    freed : int
        Bytes that were freed in all, or would be.
    size : int
        Bytes that the cache has afterwards.
    failed : tuple of CacheError
        Why models could not be removed.
    unmatched : tuple of str
        The sources given to `ndcache.cache.delete` that are not in the cache, without secrets.
    dry_run : bool
        Whether nothing was removed, because only a report was wanted.
    """

    removed: tuple[CachedModel, ...]
    freed_each: tuple[int, ...]
    in_use: tuple[CachedModel, ...]
    cleaned: tuple[CachedModel, ...]
    freed: int
    size: int
    failed: tuple[CacheError, ...] = ()
    unmatched: tuple[str, ...] = ()
    dry_run: bool = False


@dataclass(frozen=True)
class PruneRules:
    """Rules that choose the models and files to remove.

    Attributes
    ----------
    older_than : float or None
        Remove models that were not used for so many seconds.
    keep_last : int or None
        Keep this many, those used last. Without another rule for whole models, remove all others.
    partial : bool
        Remove models with missing shards, and in the others the files of interrupted downloads.
    aside : bool
        Remove files that were set aside because they are bad.
    max_size : int or None
        Remove the models that were not used for the longest time, until the cache has no more bytes than this.
    """

    older_than: float | None = None
    keep_last: int | None = None
    partial: bool = False
    aside: bool = False
    max_size: int | None = None

    def due(self, found: Sequence[FoundModel]) -> list[FoundModel]:
        """Return the models to remove, whatever the size of the cache is; `found` has the least recently used first."""
        has_others = self.older_than is not None or self.partial or self.max_size is not None
        takes_all = self.keep_last is not None and not has_others
        return [each for each in self.removable(found) if takes_all or self._is_due(each.model)]

    def removable(self, found: Sequence[FoundModel]) -> Sequence[FoundModel]:
        """Return the models that need not be kept."""
        return found[: max(0, len(found) - (self.keep_last or 0))]

    def _is_due(self, model: CachedModel) -> bool:
        is_old = self.older_than is not None and time.time() - model.last_used.timestamp() >= self.older_than
        return is_old or (self.partial and model.is_partial)


def prune_cache(
    root: Path,
    rules: PruneRules,
    *,
    scope: str | None = None,
    keeps: Path | None = None,
    dry_run: bool = False,
) -> PruneReport:
    """Remove what the rules no longer keep, and what interrupted deletions left.

    Parameters
    ----------
    root : pathlib.Path
        The cache's top directory.
    rules : PruneRules
    scope : str, optional
        Look at one scope only.
    keeps : pathlib.Path, optional
        The directory of a model that stays.
    dry_run : bool
        Whether to remove nothing.

    Raises
    ------
    CacheUnavailableError
        The cache's directory cannot be listed.
    """
    found = sorted(find_models(root, scope), key=lambda each: each.model.last_used)
    trash = {folder: disk_use(folder.path) for folder in find_trash(root, scope)}
    sweep = _Sweep([*trash.values(), *(each.use for each in found)], dry_run=dry_run)
    for folder, use in trash.items():
        sweep.empty(folder, use)
    for each in rules.due(found):
        sweep.remove(each)
    rest = {each.model.path: sweep.clean(each, rules) for each in found if each.model.path not in sweep.seen}
    for each in rules.removable(found):
        if rules.max_size is None or sweep.balance.size <= rules.max_size:
            break
        if each.model.path in rest and each.model.path != keeps:
            sweep.remove(rest[each.model.path])
    return sweep.report()


def remove_models(
    found: Sequence[FoundModel], chosen: Set[Path], *, force: bool, dry_run: bool, unmatched: tuple[str, ...]
) -> PruneReport:
    """Remove those models whose directories are chosen; with `force`, also those that are in use."""
    sweep = _Sweep((each.use for each in found), dry_run=dry_run)
    for each in found:
        if each.model.path in chosen:
            sweep.remove(each, force=force)
    return replace(sweep.report(), unmatched=unmatched)


class _Sweep:
    """Remove models one after the other, and count what that frees.

    Parameters
    ----------
    uses : iterable of DiskUse
        The files of all models, and of what interrupted deletions left.
    dry_run : bool
        Whether to remove nothing.

    Attributes
    ----------
    balance : Balance
        The bytes of the rest, and those that became free.
    seen : set of pathlib.Path
        The models that were removed, are in use or could not be removed.
    """

    def __init__(self, uses: Iterable[DiskUse], *, dry_run: bool) -> None:
        self.balance = Balance(uses)
        self.seen = set[Path]()
        self._dry_run = dry_run
        self._removed: list[CachedModel] = []
        self._freed_each: list[int] = []
        self._in_use: list[CachedModel] = []
        self._cleaned: list[CachedModel] = []
        self._failed: list[CacheError] = []

    def report(self) -> PruneReport:
        """Return what was done."""
        return PruneReport(
            removed=tuple(self._removed),
            freed_each=tuple(self._freed_each),
            in_use=tuple(self._in_use),
            cleaned=tuple(self._cleaned),
            freed=self.balance.freed,
            size=self.balance.size,
            failed=tuple(self._failed),
            dry_run=self._dry_run,
        )

    def remove(self, found: FoundModel, *, force: bool = False) -> None:
        """Remove a model, unless it is in use."""
        self.seen.add(found.model.path)
        with self._locked(found) as is_free:
            if not (is_free or force):
                self._in_use.append(found.model)
                return
            folder = found.directory.layout.model
            if not os.path.lexists(folder.path):  # another process has removed it
                self.balance.remove(found.use, frees=False)
                return
            if not self._try(folder, lambda: delete_model(found.directory)):
                return
        self._removed.append(found.model)
        self._freed_each.append(self.balance.remove(found.use))

    def clean(self, found: FoundModel, rules: PruneRules) -> FoundModel:
        """Remove partial files and bad files of a model that stays, unless it is in use; return the rest of it."""
        layout, use = found.directory.layout, found.use
        wanted = ((rules.partial, layout.partials), (rules.aside, layout.quarantine))
        folders = [(folder, disk_use(folder.path)) for is_wanted, folder in wanted if is_wanted]
        if not any(left.nbytes for _, left in folders):
            return found
        with self._locked(found) as is_free:
            if not is_free:
                return found
            for folder, left in folders:
                if left.nbytes and self._try(folder, functools.partial(delete_leftovers, folder)):
                    self.balance.remove(left)
                    use = use.without(left)
        if use != found.use:
            self._cleaned.append(found.model)
        return replace(found, use=use)

    def empty(self, folder: Folder, use: DiskUse) -> None:
        """Remove what an interrupted deletion left of a model."""
        self.balance.remove(use)
        if not self._dry_run:
            with contextlib.suppress(OSError):  # a link was put in its place
                remove_tree(folder)

    def _try(self, folder: Folder, delete: Callable[[], object]) -> bool:
        """Delete a folder, or only look whether that is possible; note why not, and return whether it is done."""
        try:
            check_deletion(folder) if self._dry_run else delete()
        except CacheError as error:
            self._failed.append(error)
            self.balance.remove_part(error.received if isinstance(error.received, int) else 0)
            return False
        return True

    def _locked(self, found: FoundModel) -> AbstractContextManager[bool]:
        layout = found.directory.layout
        return contextlib.nullcontext(not is_used(layout)) if self._dry_run else unused(layout)
