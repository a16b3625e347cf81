"""The methods of a loader that check what is on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ..context import LoadContext
from ..errors import CacheError, NotFoundError
from ..location import MANIFEST_NAMES, Location, cached_location
from ..options import Source, suggest_keywords
from ..progress import Arrivals, Progress
from ..sources.model import Flaw
from ..store.housekeeping.listing import CachedModel
from ..workers.stop_iteration import unwrap_stop_iteration, wrap_stop_iteration
from .base import LoaderBase
from .verification import ModelCheck, VerifyReport, open_check, run_checks

__all__ = ["VerifyLoader"]

logger = logging.getLogger("ndcache")

#: How often a model is verified that is being updated meanwhile.
_TRIES = 4
#: How many files for each worker are checked together, if so many are wanted.
_FILES_PER_WORKER = 4


class VerifyLoader(LoaderBase):
    """Compute digests and compare them."""

    @suggest_keywords
    def verify(self, source: Source, *, progress: Progress = None) -> VerifyReport:
        """Check the digests of what is cached, and set aside bad shards: see `ndcache.verify`."""
        location = self._resources.locate(source)
        (check,) = self._check([location], progress, open_check)
        if check is None:
            raise NotFoundError(f"{location} is not in the cache")
        return check.report()

    def _verify_cached(
        self, models: Sequence[CachedModel], progress: Progress
    ) -> Iterator[tuple[CachedModel, VerifyReport]]:
        """Check models as they lie in the cache; those with few files together, so that all workers have some."""
        for batch in _batches(models, _FILES_PER_WORKER * self._options.max_workers):
            known = [(model, names) for model in batch for names in _manifest_names(model)]
            locations = [cached_location(model.source, model.path.name, names) for model, names in known]
            for (model, _), check in zip(known, self._check(locations, progress, _open_or_report), strict=True):
                if check is not None:
                    yield model, check.report()
                elif model.path.exists():  # it was not deleted meanwhile
                    yield model, VerifyReport({}, (), (), 0, has_manifest=False)

    def _check(
        self,
        locations: Sequence[Location],
        progress: Progress,
        open_check: Callable[[Location, LoadContext], ModelCheck | None],
    ) -> list[ModelCheck | None]:
        """Check models together; None stands for one that the cache does not have."""
        found: list[ModelCheck | None] = [None] * len(locations)
        pending: Sequence[int] = range(len(locations))
        for _ in range(_TRIES):  # again for those that were updated meanwhile
            with unwrap_stop_iteration(), self._resources.context(locations[0], offline=True) as shared:
                new = dict[int, ModelCheck]()
                for index in pending:
                    context = replace(shared, arrivals=Arrivals(), model=locations[index].title)
                    with wrap_stop_iteration():
                        check, last = open_check(locations[index], context), found[index]
                    if check is not None and (last is None or check.manifest != last.manifest):
                        found[index] = new[index] = check
                if new:
                    run_checks(list(new.values()), progress)
            pending = [index for index in pending if (last := found[index]) and not last.is_of_one_version]
            if not pending:
                break
        return found


def _open_or_report(location: Location, context: LoadContext) -> ModelCheck | None:
    """Open the check of one of many models; of one that this account may not read, the manifest counts as bad."""
    try:
        return open_check(location, context)
    except CacheError as error:
        logger.warning("%s cannot be checked: %s", location, error)
        return ModelCheck(context, None, {location.manifest_names[0]: 0}, lambda _: Flaw.BAD_AND_KEPT)


def _manifest_names(model: CachedModel) -> list[tuple[str, ...]]:
    """Return the names of the manifests to check a model by, each in a tuple; all usual names if it has none."""
    return [(name,) for name in model.manifests] or [MANIFEST_NAMES]


def _batches(models: Sequence[CachedModel], files: int) -> Iterator[list[CachedModel]]:
    """Yield the models in groups that have at least so many files."""
    batch: list[CachedModel] = []
    for model in models:
        batch.append(model)
        if sum(max(1, each.shards_total) for each in batch) >= files:
            yield batch
            batch = []
    if batch:
        yield batch
