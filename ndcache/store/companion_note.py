"""The note in a model's cache directory about its companion files.

It says for which manifest they were asked for, so that an unchanged model is not asked again: a file that is not in the
note was not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..files.notes import read_note
from .layout import Layout

__all__ = ["CompanionNote"]

_NAME = "companions.json"
#: The longest note that is written; `read_note` reads no longer one.
_MAX_TEXT = 1 << 15


@dataclass(frozen=True)
class CompanionNote:
    """The note about a model's companion files.

    Attributes
    ----------
    manifest : str
        The name of the manifest, and its digest.
    files : tuple of str
        The files that are there.
    pending : tuple of str
        Files that failed, and that another attempt may bring.
    failed : tuple of str
        Files that failed for good, until the model changes.
    include, exclude : tuple of str
        The patterns of the last call that gave some.
    """

    manifest: str = ""
    files: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @classmethod
    def read(cls, layout: Layout) -> CompanionNote:
        """Return the note, or an empty one if there is none or it does not have the right form."""
        with layout.translate_errors():
            note = read_note(layout.state, _NAME)
        return (None if note is None else cls._from_note(note)) or cls()

    @classmethod
    def _from_note(cls, note: Mapping[str, Any]) -> CompanionNote | None:
        lists = {name: value for name, value in note.items() if name != "manifest"}
        if not isinstance(note.get("manifest"), str) or not all(_are_texts(value) for value in lists.values()):
            return None
        try:
            return cls(note["manifest"], **{name: tuple(value) for name, value in lists.items()})
        except TypeError:  # a field of a later version
            return None

    def write(self, layout: Layout) -> None:
        """Write the note, unless it would be too long to be read."""
        note = asdict(self)
        if len(str(note)) <= _MAX_TEXT:
            with layout.translate_errors():
                layout.write_note(layout.make(layout.state), _NAME, note)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
