"""Check the companion files in the cache, as `verify` does."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os

from ..context import LoadContext
from ..errors import CacheError, ManifestError, NotFoundError, UnsafePathError
from ..files.descriptors import check_shortage
from ..format.integrity import find_mismatch
from ..format.paths import check_path, unflatten
from ..format.safetensors.headers import is_kept_header
from ..sources.local import LocalModel
from ..sources.model import Flaw, Model
from ..sources.remote import RemoteModel
from ..store.companion_note import CompanionNote
from ..store.directory import ModelDirectory
from .local import listed_companions
from .rules import check_name

__all__ = ["check_companions", "check_file", "fetched_files"]

logger = logging.getLogger("ndcache")


def check_companions(model: Model, context: LoadContext) -> dict[str, tuple[str | Flaw, int]]:
    """Read the companion files of a model, and compare them with their digests as far as these are known.

    In the cache, those with wrong bytes are set aside. In a local directory, only files are compared that `fetch` put
    there, or whose digest the caller requires; those that the model lists must be there.

    Returns
    -------
    dict
        By name: the algorithm of the digest, or what is wrong; and the number of bytes.
    """
    if isinstance(model, LocalModel):
        return _check_local(model, context)
    assert isinstance(model, RemoteModel)
    note = CompanionNote.read(model.cache.layout)
    found = {name: check_file(model.cache, context, name) for name in note.files}
    found.update((name, (Flaw.MISSING, 0)) for name in (*note.pending, *note.failed) if name not in found)
    lost = {name for name, (result, _) in found.items() if result in (Flaw.BAD, Flaw.MISSING)}
    if lost - set(note.pending):
        try:
            pending = tuple(dict.fromkeys((*note.pending, *sorted(lost))))
            dataclasses.replace(note, pending=pending).write(model.cache.layout)
        except CacheError as error:
            logger.debug("lost companion files could not be noted: %s", str(error))
    return found


def check_file(cache: ModelDirectory, context: LoadContext, name: str) -> tuple[str | Flaw, int]:
    """Read a file of the cache that is no shard, and compare it with its digests, or else with its noted size."""
    try:
        file, metadata = cache.open_file(name), cache.metadata(name)
        if file is None:
            return Flaw.MISSING, 0
        digests = {**({} if metadata is None else metadata.digests), **_required(context, name)}
        with file:
            nbytes = os.fstat(file.fileno()).st_size
            has_size = bool(digests) or metadata is None or metadata.nbytes == nbytes
            count = context.arrivals.reading(name)
            if has_size and find_mismatch(file, digests, context.cancellation.check, count) is None:
                return next(iter(digests), "size"), nbytes
            cache.quarantine(name, file)
            return Flaw.BAD, nbytes
    except CacheError as error:
        logger.warning("%s in the cache is bad, and cannot be set aside: %s", name, error.strerror or error)
        return Flaw.BAD_AND_KEPT, 0


def fetched_files(cache: ModelDirectory) -> dict[str, int]:
    """Return the files that were fetched into a directory of the cache, and their bytes."""
    with cache.layout.translate_errors():
        names = [unflatten(entry.removesuffix(".json")) for entry in cache.layout.metadata.entries()]
    found = {}
    for name in sorted(names):
        with contextlib.suppress(UnsafePathError):  # the name was crafted
            if not is_kept_header(name):
                check_path(name)
            if (metadata := cache.metadata(name)) is not None:
                found[name] = metadata.nbytes
    return found


def _check_local(model: LocalModel, context: LoadContext) -> dict[str, tuple[str | Flaw, int]]:
    note, names = CompanionNote.read(model.notes.layout), list[str]()
    if note.manifest:
        names += [*note.files, *note.pending, *note.failed]
    else:
        with contextlib.suppress(ManifestError, NotFoundError):  # the configuration cannot be read
            names += listed_companions(model)
    taken = {model.manifest.name, *(shard.data_path for shard in model.manifest.shards)}
    names += sorted(context.integrity.keys() - taken)
    found = {name: _check_local_file(model, context, name) for name in dict.fromkeys(names)}
    return {name: result for name, result in found.items() if result is not None}


def _check_local_file(model: LocalModel, context: LoadContext, name: str) -> tuple[str | Flaw, int] | None:
    """Compare a file of a local directory with what is known of it; return None if nothing is."""
    noted = model.noted(name)
    digests = {**({} if noted is None else noted.digests), **_required(context, name)}
    try:
        check_name(name, ())
        with open(model.path(name), "rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            if noted is None and not digests:
                return None
            has_size = noted is None or noted.nbytes == nbytes
            if not has_size or find_mismatch(file, digests, context.cancellation.check) is not None:
                return Flaw.BAD, nbytes
            return next(iter(digests), "size"), nbytes
    except UnsafePathError:
        return None
    except (FileNotFoundError, NotADirectoryError):
        return Flaw.MISSING, 0
    except OSError as error:
        check_shortage(error)
        logger.warning("%s cannot be read: %s", model.path(name), error.strerror)
        return Flaw.BAD, 0


def _required(context: LoadContext, name: str) -> dict[str, str]:
    """Return the digest that the caller requires of a file, if there is one."""
    return dict([context.integrity[name]] if name in context.integrity else [])
