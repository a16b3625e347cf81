"""Compare companion files with the digests that the caller requires of them, at each load."""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO

from ..context import LoadContext
from ..errors import ChecksumError, IntegrityError, NotFoundError
from ..files.descriptors import check_shortage
from ..format.integrity import Lock, find_mismatch, is_manifest_name
from ..sources.local import LocalModel
from ..sources.model import Model
from ..sources.remote import RemoteModel
from .local import listed_companions
from .rules import check_name, matches

__all__ = ["check_pins"]


def check_pins(model: Model, context: LoadContext, files: Iterable[str], exclude: Iterable[str] = ()) -> None:
    """Check the companion files of a model.

    Parameters
    ----------
    model : Model
    context : LoadContext
    files : iterable of str
        Those that a model on a server has in the cache.
    exclude : iterable of str
        Names and patterns of those that are left out.

    Raises
    ------
    ChecksumError
        A file has another digest than the required one.
    NotFoundError
        There is no such file.
    IntegrityError
        A lock does not name a file that the model has.
    """
    integrity, exclude = context.integrity, tuple(exclude)
    taken = {model.manifest.name, *(shard.data_path for shard in model.manifest.shards)}
    pinned = [name for name in integrity if name not in taken and not is_manifest_name(name)]
    if isinstance(integrity, Lock):
        found = listed_companions(model) if isinstance(model, LocalModel) else files
        for name in found:
            if name not in integrity and name not in taken:
                raise IntegrityError(
                    f"{name!a} is a file of the model, and the lock does not name it",
                    shard=name,
                    hint="If it is right, make a new lock.",
                    retryable=False,
                )
    for name in pinned:
        if not matches(name, exclude):
            _check(model, context, name)


def _check(model: Model, context: LoadContext, name: str) -> None:
    algorithm, expected = context.integrity[name]
    check_name(name, ())
    file = _open(model, name)
    if file is None:
        raise NotFoundError(f"a digest is required of {name!a}, which is not a file of the model", shard=name)
    with file, context.stats.timed("hash", file=name):
        mismatch = find_mismatch(file, {algorithm: expected}, context.cancellation.check)
    if mismatch is not None:
        raise ChecksumError(
            f"wrong {algorithm}: {name} has {mismatch.received}, and {expected} is required",
            shard=name,
            expected=expected,
            received=mismatch.received,
            hint="It is damaged, or of another version.",
            retryable=False,
        )


def _open(model: Model, name: str) -> BinaryIO | None:
    if isinstance(model, RemoteModel):
        return model.cache.open_file(name)
    try:
        return open(model.directory / name, "rb")
    except OSError as error:
        check_shortage(error)
        return None
