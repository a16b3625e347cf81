"""The method of a loader that locks a model: the SHA-256 of every file."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import check_path
from ..companions import Companions
from ..companions.local import find_companions
from ..companions.lock import new_lock, write_lock
from ..context import LoadContext
from ..errors import ChecksumError, NotFoundError
from ..format.integrity import new_hasher, update_from_file
from ..options import Source, suggest_keywords
from ..pipeline import fetch_shards
from ..progress import Progress, callbacks_of
from ..sources.local import LocalModel
from ..sources.model import Model
from ..trace import check_writable
from ..workers.ordered import map_ordered
from ..workers.stop_iteration import unwrap_stop_iteration
from .base import LoaderBase

__all__ = ["LockLoader"]


class LockLoader(LoaderBase):
    """Lock models."""

    @suggest_keywords
    def lock(
        self, source: Source, path: str | os.PathLike[str] | None = None, *, progress: Progress = None
    ) -> dict[str, Any]:
        """Download a model into the cache, and return the SHA-256 of its files, as a lock file has them.

        The digests of the manifest are compared, too. A model that was loaded with ``integrity=`` such a file is
        exactly this one.

        Parameters
        ----------
        source, progress
            See `ndcache.fetch`.
        path : path-like, optional
            Write the lock file there. It appears complete or not at all. Its directory must exist.

        Returns
        -------
        dict
            ``{"version": 1, "source": …, "files": {name: {"nbytes": …, "sha256": …}}}``, in the order of the manifest;
            companion files come last.

        Raises
        ------
        OSError
            The lock file cannot be written there. Nothing is fetched.
        NdcacheError
            See `ndcache.fetch`.
        """
        check_path("path", path, may_be_none=True)
        if path is not None:
            check_writable(path, "lock file")
        location = self._resources.locate(source)
        files: Sequence[str] = ()
        progress = callbacks_of(progress)
        with unwrap_stop_iteration():
            if location.is_remote:
                with self._resources.open_model(source, must_keep=True, bars=progress) as (model, context):
                    companions = Companions(are_required=True)
                    shards = model.manifest.shards_with(None)
                    fetch_shards(model, context, shards, progress, self._helpers(source), companions)
                    files = context.stats.files
            with self._resources.open_model(source, offline=True) as (model, context):
                if isinstance(model, LocalModel):
                    files = find_companions(model)
                lock = new_lock(str(location), _digests(model, context, files))
        if path is not None:
            write_lock(Path(path), lock)
        return lock


def _digests(model: Model, context: LoadContext, companions: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Return the bytes and the SHA-256 of the files of a model on disk, and compare the digests of its shards."""
    expected = {shard.data_path: shard.digests for shard in model.manifest.shards}
    names = list(dict.fromkeys([model.manifest.name, *expected, *companions]))

    def work(name: str) -> tuple[int, str]:
        hashers = {algorithm: new_hasher(algorithm) for algorithm in {"sha256", *expected.get(name, ())}}
        try:
            with open(model.directory / name, "rb") as file, context.stats.timed("hash", file=name):
                update_from_file(hashers, file, context.cancellation.check)
                nbytes = file.tell()
        except OSError as error:
            raise NotFoundError(f"{model.directory / name} cannot be read: {error.strerror}", shard=name) from error
        for algorithm, digest in expected.get(name, {}).items():
            if (received := hashers[algorithm].hexdigest()) != digest:
                raise ChecksumError(
                    f"wrong {algorithm}: {name} has {received}, and the manifest says {digest}",
                    shard=name,
                    expected=digest,
                    received=received,
                    hint="ndcache verify sets bad files of the cache aside.",
                    retryable=False,
                )
        return nbytes, hashers["sha256"].hexdigest()

    context.pool.start(len(names))
    results = map_ordered(
        names, work, pool=context.pool, sizes=[0] * len(names), memory_limit=sys.maxsize, stats=context.stats
    )
    with contextlib.closing(results):
        return dict(zip(names, results, strict=True))
