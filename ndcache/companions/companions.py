"""The companion files of one load: which to ask for, and the result.

::

    caller's thread   plan: the note in the cache ─> is there anything to ask for?     … finish: error or warning
    a worker              package manifest ─> configuration ─> tokenizer ─> included files ─> note

They are asked for when the model is new in the cache, or its manifest has changed. A worker does so once all workers
have shards to fetch, one file after the other.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..arguments import as_texts
from ..caller import warn_caller
from ..context import LoadContext
from ..errors import OfflineError
from ..sources.listing import has_listing
from ..sources.local import LocalModel
from ..sources.model import Model
from ..sources.remote import RemoteModel
from ..store.companion_note import CompanionNote
from ..store.directory import ModelDirectory
from ..store.layered import LayeredDirectory
from .local import find_companions
from .pins import check_pins
from .preview import PreviewedFile, PreviewRequest
from .request import CompanionRequest, adopt
from .rules import NoListingError, is_pattern, matches

__all__ = ["Companions"]

Kind = TypeVar("Kind", bound=CompanionRequest)
logger = logging.getLogger("ndcache")


class Companions:
    """Fetch the companion files of a model beside its shards.

    Parameters
    ----------
    files : bool
        Whether any are wanted.
    include, exclude : sequence of str
        Names or patterns to add, and to leave out.
    force : bool
        Ask for them even if the model has not changed.
    are_required : bool
        Whether a file that cannot be fetched is an error. If not, it is a warning.
    """

    def __init__(
        self,
        *,
        files: bool = True,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        force: bool = False,
        are_required: bool = False,
    ) -> None:
        self._files = files
        self._include = as_texts("include", include)
        self._exclude = as_texts("exclude", exclude)
        self._force = force
        self._are_required = are_required
        self._request: CompanionRequest | None = None
        self._model: Model | None = None

    def of_directory(self, model: LocalModel) -> list[str]:
        """Return the companion files of a model in a local directory.

        Raises
        ------
        NotFoundError, ManifestSyntaxError, UnsafePathError
            The model lists, or the caller includes, a file that is not there or must not be copied.
        """
        return find_companions(model, self._include, self._exclude) if self._files else []

    def plan(self, model: Model, context: LoadContext, *, is_warm: bool) -> Callable[[], None] | None:
        """Return the function that fetches the files, for a worker; None if there is nothing to ask for.

        Parameters
        ----------
        model : Model
        context : LoadContext
        is_warm : bool
            Whether the cache has all wanted shards. Earlier versions of ndcache have filled it without companion files
            and the note about them; such a model is not asked for them before it changes, except by `fetch`.

        Raises
        ------
        ValueError
            There is no listing of the files to match a pattern with.
        OfflineError
        """
        if self._files and isinstance(model, LocalModel):
            self._model = model
        if not self._files or not isinstance(model, RemoteModel) or not model.is_kept:
            return None
        self._check_patterns(model)
        self._model = model
        manifest = _manifest_id(model)
        note = self._copied_note(model, manifest, context) or CompanionNote.read(model.cache.layout)
        if self._is_covered(note, manifest, model.cache):
            for name in note.files:
                adopt(model.cache, name, context)
            context.stats.note_files(note.files, 0, dict.fromkeys((*note.pending, *note.failed), "it failed before"))
            return None
        if context.offline:
            note = _note_in_cache(model, note)
            self._check_offline(note, model)
            for name in note.files:
                if not matches(name, self._exclude):
                    adopt(model.cache, name, context)
            return None
        is_of_earlier_version = is_warm and not note.manifest and not context.integrity
        if not self._are_required and (is_of_earlier_version or not _can_be_written(model)):
            self._model = None
            return None
        self._request = self._request_for(CompanionRequest, model, context, note)
        return self._request.run

    def preview(self, model: Model, context: LoadContext) -> list[PreviewedFile]:
        """Return the files that `plan` would fetch, and those that need not be fetched, without writing anything.

        Raises
        ------
        NdcacheError
            One of them cannot be fetched.
        ValueError
            There is no listing of the files to match a pattern with.
        """
        if not self._files or not isinstance(model, RemoteModel):
            return []
        self._check_patterns(model)
        note, cache = CompanionNote.read(model.cache.layout), model.cache
        if context.offline or self._is_covered(note, _manifest_id(model), cache):
            note = _note_in_cache(model, note)
            self._check_offline(note, model)
            sizes = {name: cache.size(name) for name in note.files}
            return [PreviewedFile(name, nbytes, 0) for name, nbytes in sizes.items() if nbytes is not None]
        request = self._request = self._request_for(PreviewRequest, model, context, note)
        context.pool.run(request.run)
        self.finish(context)
        return request.found

    def _request_for(self, kind: type[Kind], model: RemoteModel, context: LoadContext, note: CompanionNote) -> Kind:
        # One that failed for good was a mistake: it is asked for again only if the caller names it again.
        earlier = (text for text in note.include if text not in note.failed)
        return kind(
            model,
            context,
            CompanionNote(
                _manifest_id(model),
                include=tuple(dict.fromkeys((*earlier, *self._include))),
                exclude=self._exclude if self._are_required else note.exclude,
            ),
            note.files,
            None if self._are_required else dataclasses.replace(context.policy, retries=min(1, context.policy.retries)),
        )

    def _check_patterns(self, model: RemoteModel) -> None:
        patterns = [pattern for pattern in self._include if is_pattern(pattern)]
        if patterns and not has_listing(model.locations[0]):
            raise NoListingError(
                f"include has the pattern {patterns[0]!r}, and there is no listing of the files at"
                f" {model.locations[0]}: give exact names"
            )

    def finish(self, context: LoadContext) -> None:
        """Count the files; compare required digests; raise the error of one that failed, or warn."""
        request = self._request
        if request is None:
            self._check_pins(context)
            return
        failures = request.failures
        context.stats.note_files(
            request.files, request.stats.network_bytes, {name: str(error) for name, error in failures.items()}
        )
        if not failures:
            self._check_pins(context)
            return
        first, *others = failures.values()
        if self._are_required or failures.keys() & context.integrity.keys():
            first.others += tuple(others)
            raise first
        more = f", and {len(others)} more" if others else ""
        warn_caller(f"the companion file {next(iter(failures))} was not fetched{more}: {first}")

    def _check_pins(self, context: LoadContext) -> None:
        if self._model is not None and context.integrity and context.compares_digests:
            check_pins(self._model, context, context.stats.files, self._exclude)

    def _copied_note(self, model: RemoteModel, manifest: str, context: LoadContext) -> CompanionNote | None:
        """Copy the cache's note into a directory of the user's, if the cache has all files; return it, or None."""
        cache = model.cache
        if not isinstance(cache, LayeredDirectory) or cache.seed is None:
            return None
        note = CompanionNote.read(cache.seed.layout)
        if self._is_covered(CompanionNote.read(cache.layout), manifest, cache):
            return None
        if not self._is_covered(note, manifest, cache.seed):
            return None
        note.write(cache.layout)
        return note

    def _is_covered(self, note: CompanionNote, manifest: str, cache: ModelDirectory) -> bool:
        """Return whether the cache has all files, as far as the manifest that they came with tells."""
        if self._force or note.manifest != manifest or note.pending:
            return False
        if not self._are_required:
            return True
        has_same_rules = set(self._include) <= set(note.include) and set(self._exclude) == set(note.exclude)
        return has_same_rules and not note.failed and all(cache.size(name) is not None for name in note.files)

    def _check_offline(self, note: CompanionNote, model: RemoteModel) -> None:
        wanted = [name for name in (*note.files, *note.pending, *self._include) if not matches(name, self._exclude)]
        missing = tuple(name for name in wanted if model.cache.size(name) is None)
        if missing and self._are_required:
            error = OfflineError(
                f"offline, and not in the cache: {', '.join(missing[:5])} of {model.locations[0]}",
                hint="Run once with the network, or leave companion files out (files=False).",
            )
            error.missing = missing
            raise error


def _manifest_id(model: RemoteModel) -> str:
    return f"{model.manifest.name} {model.opened.digest}"


def _note_in_cache(model: RemoteModel, note: CompanionNote) -> CompanionNote:
    """Return the cache's note, in place of one in a directory of the user's that is not about this manifest."""
    cache = model.cache
    if note.manifest != _manifest_id(model) and isinstance(cache, LayeredDirectory) and cache.seed is not None:
        return CompanionNote.read(cache.seed.layout)
    return note


def _can_be_written(model: RemoteModel) -> bool:
    """Return whether files can be added to a model in the cache; if not, there is no point in asking for them."""
    return os.access(model.directory, os.W_OK)
