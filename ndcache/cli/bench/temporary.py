"""A cache for one measurement, on the disk of the user's cache.

Nothing is read from the user's cache or written to it. All files are removed at the end, even after an error.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ...store.lock import try_lock

__all__ = ["temporary_cache"]

#: A temporary cache that is younger, in seconds, may not have its lock yet.
_NEW = 60.0
_PREFIX = ".ndcache-bench-"


@contextlib.contextmanager
def temporary_cache(root: Path) -> Iterator[Path]:
    """Yield a fresh directory on the disk of the cache `root`, or elsewhere if that cannot be written to.

    It is removed at the end. Meanwhile, no command takes it for a part of the cache.
    """
    there = next((path for path in (root, *root.parents) if path.is_dir()), None)
    usable = there if there is not None and os.access(there, os.W_OK) else None
    if usable is not None:
        _remove_leftovers(usable)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=usable, ignore_cleanup_errors=True) as folder:
        # One level deeper than a model of the cache would be: `ls` shows no model there, and `rm --all` removes none.
        inner = Path(folder, "bench")
        inner.mkdir()
        try:
            with try_lock(Path(folder, "lock")):
                yield inner
        except BaseException as error:
            if not isinstance(error, Exception):
                error.args = ()  # an interrupted load says that it kept something
            raise


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary caches of processes that were killed."""
    for left in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _NEW:
                with try_lock(left / "lock") as is_held:
                    if is_held:
                        shutil.rmtree(left)
