"""The method of a loader that downloads a model without loading it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from ..arguments import check_flags, check_path
from ..caller import PublicFrame
from ..companions import Companions
from ..errors import OfflineError
from ..format.manifest import NameFilter
from ..format.slices import check_slices
from ..options import Source, check_keywords, hide_keywords
from ..pipeline import fetch_shards
from ..progress import Progress, callbacks_of
from ..trace import tracing
from ..workers.stop_iteration import unwrap_stop_iteration
from .base import LoaderBase
from .local_dir import copy_companions, open_target
from .plan import FetchPlan, plan_fetch

__all__ = ["FetchLoader"]


class FetchLoader(LoaderBase):
    """Download models."""

    @overload
    def fetch(
        self,
        source: Source,
        *,
        names: NameFilter = None,
        files: bool = True,
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        force: bool = False,
        dry_run: Literal[False] = False,
        local_dir: str | os.PathLike[str] | None = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> Path: ...

    @overload
    def fetch(
        self,
        source: Source,
        *,
        names: NameFilter = None,
        files: bool = True,
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        force: bool = False,
        dry_run: Literal[True],
        local_dir: str | os.PathLike[str] | None = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> FetchPlan: ...

    @hide_keywords
    def fetch(
        self,
        source: Source,
        *,
        names: NameFilter = None,
        files: bool = True,
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        force: bool = False,
        dry_run: bool = False,
        local_dir: str | os.PathLike[str] | None = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
        **unknown: Any,
    ) -> Path | FetchPlan:
        """Download a model into the cache without decoding it: see `ndcache.fetch`."""
        with PublicFrame() as __tracebackhide__:
            check_keywords(FetchLoader.fetch, unknown)
            check_flags(files=files, force=force, dry_run=_checked(dry_run, trace, report))
            check_slices(names)
            progress = callbacks_of(progress)
            where = None if local_dir is None else _absolute(local_dir)
            self._check_force(source, force)
            companions = Companions(files=files, include=include, exclude=exclude, force=force, are_required=True)
        with (
            PublicFrame() as __tracebackhide__,
            tracing(source, trace, report) as events,
            unwrap_stop_iteration(),
            self._resources.open_model(
                source,
                trace=events,
                must_keep=True,
                local_dir=None if dry_run else where,
                force=force,
                dry_run=dry_run,
                is_use=not dry_run,
                bars=() if dry_run else progress,
            ) as (model, context),
        ):
            shards = model.manifest.shards_with(names)
            if dry_run:
                return plan_fetch(model, context, shards, companions, where)
            helpers = self._helpers(source)
            if where is None:
                fetch_shards(model, context, shards, progress, helpers, companions)
                return model.directory
            use = open_target(where, model, context)
            fetch_shards(model, context, shards, progress, helpers, companions, use)
            copy_companions(where, model, context, companions)
            return where

    def _check_force(self, source: Source, force: bool) -> None:
        if force and self._resources.is_offline and self._resources.locate(source).is_remote:
            hint = "Leave one of the two out."
            raise OfflineError("offline, and force downloads again what is cached", hint=hint)


def _checked(dry_run: bool, *files: str | os.PathLike[str] | None) -> bool:
    """Return `dry_run`, unless a file was asked for that a dry run cannot write."""
    if dry_run and any(file is not None for file in files):
        raise ValueError("trace and report are for a download, and dry_run makes none")
    return dry_run


def _absolute(local_dir: str | os.PathLike[str]) -> Path:
    check_path("local_dir", local_dir, may_be_none=True)
    return Path(os.path.abspath(Path(local_dir).expanduser()))
