"""Check what is on disk: read every file of some models, and report what is good, bad and missing.

::

    Location ─ open_check ─> ModelCheck ─┐
    Location ─ open_check ─> ModelCheck ─┴─ run_checks: the files of all of them, by all workers ─> VerifyReport of each
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from ..companions.check import check_companions, check_file, fetched_files
from ..context import LoadContext
from ..errors import ManifestError, OfflineError, UnsupportedDtypeError
from ..format.manifest import Manifest
from ..format.safetensors.headers import kept_as
from ..format.strict_json import MAX_KEPT_BYTES
from ..location import Location
from ..progress import Progress, Reporter
from ..sources import open_model
from ..sources.manifests.opened import parse_kept
from ..sources.model import Flaw
from ..store.directory import ModelDirectory
from ..workers.ordered import map_ordered
from ..workers.stop_iteration import wrap_stop_iteration

__all__ = ["ModelCheck", "VerifyReport", "open_check", "run_checks"]

#: The flaws of files that the model, as its manifest has it, lacks.
_MISSING = (Flaw.MISSING, Flaw.OF_ANOTHER_VERSION)


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    Attributes
    ----------
    checked : dict of str to str
        The good shards and companion files, and how each was checked: ``"sha256"``, ``"md5"``, the algorithm of a
        required digest, or ``"size"`` where no digest is known.
    bad : tuple of str
        Those that have wrong bytes or the wrong size, or that cannot be read. In the cache they were set aside, and
        the next load fetches them.
    missing : tuple of str
        Those that are not there, and shards that belong to another version of the model.
    nbytes : int
        Bytes of the good ones.
    kept : tuple of str
        Bad ones in a cache that cannot be written. They could not be set aside, so loads still use them, except with
        ``verify="always"``.
    files : tuple of str
        The companion files among all these, which only the cache knows; the others are shards.
    has_manifest : bool
        Whether the cache has a manifest of the model. Without one, nobody knows which shards there should be: the
        files that were fetched were checked, and all count as companion files.
    """

    checked: dict[str, str]
    bad: tuple[str, ...]
    missing: tuple[str, ...]
    nbytes: int
    kept: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    has_manifest: bool = True

    @property
    def ok(self) -> bool:
        """Whether nothing is bad. Shards of a cached model may be missing; see `complete`."""
        return not self.bad

    @property
    def complete(self) -> bool:
        """Whether all that the manifest names is there, and good."""
        return self.has_manifest and not (self.bad or self.missing)


@dataclass
class ModelCheck:
    """The check of one model.

    Attributes
    ----------
    context : LoadContext
    manifest : Manifest or None
        None if the cache has none that can be used.
    sizes : mapping of str to int
        The files to check, and their bytes: the shards, or, without a manifest, what was fetched.
    check : callable
        Read one of them, and return what it was checked by, or what is wrong.
    check_others : callable
        The same for the companion files; returns the result and the bytes of each.
    results : dict of str to str or Flaw
        What `check` has found.
    others : dict of str to tuple
        What `check_others` has found.
    """

    context: LoadContext
    manifest: Manifest | None
    sizes: Mapping[str, int]
    check: Callable[[str], str | Flaw]
    check_others: Callable[[], Mapping[str, tuple[str | Flaw, int]]] = dict
    results: dict[str, str | Flaw] = field(default_factory=dict)
    others: Mapping[str, tuple[str | Flaw, int]] = field(default_factory=dict)

    @property
    def is_of_one_version(self) -> bool:
        """Return whether no other process updated the model during the check."""
        return Flaw.OF_ANOTHER_VERSION not in self.results.values()

    @property
    def missing(self) -> list[str]:
        """Return the files that are not there, or belong to another version of the model."""
        return [name for name, result in self.results.items() if result in _MISSING]

    def report(self) -> VerifyReport:
        """Return what was found."""
        found = {name: (result, self.sizes[name]) for name, result in self.results.items()} | dict(self.others)

        def having(*flaws: Flaw) -> tuple[str, ...]:
            return tuple(name for name, (result, _) in found.items() if result in flaws)

        return VerifyReport(
            checked={name: result for name, (result, _) in found.items() if isinstance(result, str)},
            bad=having(Flaw.BAD, Flaw.BAD_AND_KEPT),
            missing=having(*_MISSING),
            nbytes=sum(nbytes for result, nbytes in found.values() if isinstance(result, str)),
            kept=having(Flaw.BAD_AND_KEPT),
            files=tuple(found if self.manifest is None else self.others),
            has_manifest=self.manifest is not None,
        )


def open_check(location: Location, context: LoadContext) -> ModelCheck | None:
    """Read a model's manifest, and return what there is to check; None if the cache has nothing of the model.

    Raises
    ------
    NotFoundError, ManifestError, ChecksumError, CacheError
        See `open_model`, whose OfflineError is not raised. A ChecksumError also means that the cached manifest is not
        the one that the caller requires.
    """
    try:
        model = open_model(location, context)
    except OfflineError:
        cache = context.open_directory(location)
        _refuse_other_version(cache, location, context)
        sizes = fetched_files(cache)
        check = functools.partial(check_file, cache, context)
        return ModelCheck(context, None, sizes, lambda name: check(name)[0]) if sizes else None
    shards = {shard.data_path: shard for shard in model.manifest.shards}
    return ModelCheck(
        context,
        model.manifest,
        {name: shard.nbytes for name, shard in shards.items()},
        lambda name: model.check(shards[name]),
        lambda: check_companions(model, context),
    )


def _refuse_other_version(cache: ModelDirectory, location: Location, context: LoadContext) -> None:
    """Raise a ChecksumError if the cached manifest is not the one that the caller requires.

    Its files are those of another version, or the lock is for another model: they may be good, and are not set aside.
    """
    for name in location.manifest_names if context.integrity else ():
        if (data := cache.read(kept_as(name), MAX_KEPT_BYTES)) is not None:
            with contextlib.suppress(ManifestError, UnsupportedDtypeError):  # it is damaged
                parse_kept(data, name, str(location), context.integrity, context.cancellation.check)


def run_checks(checks: Sequence[ModelCheck], progress: Progress) -> None:
    """Read the files of some models, whose contexts share one pool that was not started; set their results."""
    work = [(each, name) for each in checks for name in each.sizes]
    sizes = [each.sizes[name] for each, name in work]
    context = checks[0].context
    context.pool.start(len(work) + 1)
    for each in checks:
        each.context.arrivals.expect(each.sizes)
    reporter = Reporter(
        progress,
        sizes,
        cache_only=True,
        done=lambda: sum(each.context.arrivals.nbytes for each in checks),
        interval=context.progress_interval,
        model=context.model if len(checks) == 1 else f"{len(checks)} models",
        verb="Checking",
        how=lambda: "Checked",
        absent=lambda: [each.sizes[name] for each in checks for name in each.missing],
    )
    results = map_ordered(
        work,
        _check,
        pool=context.pool,
        sizes=sizes,
        memory_limit=sys.maxsize,
        stats=context.stats,
        tick=reporter.tick,
        beside=lambda: _check_others(checks),
    )
    with wrap_stop_iteration(), reporter, closing(results):
        reporter.start()
        for (each, name), nbytes, result in zip(work, sizes, results, strict=True):
            each.results[name] = result
            reporter.shard_done(nbytes)


def _check(item: tuple[ModelCheck, str]) -> str | Flaw:
    each, name = item
    result = each.check(name)
    each.context.arrivals.end(name, each.sizes[name])
    return result


def _check_others(checks: Sequence[ModelCheck]) -> None:
    for each in checks:
        each.others = each.check_others()
