"""Find the model in a directory that has none of the usual names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from ..errors import NotFoundError
from ..format.safetensors.index import FILE_SUFFIX, INDEX_SUFFIX, is_safetensors

__all__ = ["choose_safetensors", "say_names"]

#: The most names in a message.
_SHOWN = 10


def choose_safetensors(names: Iterable[str], where: str, url: Callable[[str], str]) -> str | None:
    """Return the only index, or else the only safetensors file, of a directory; None if there is none.

    Parameters
    ----------
    names : iterable of str
        The names of the directory's files.
    where : str
        The directory, for messages.
    url : callable
        Return what to type for one of the files.

    Raises
    ------
    NotFoundError
        There are several.
    """
    found = sorted(filter(is_safetensors, names))
    stems = [re.escape(name.removesuffix(INDEX_SUFFIX)) for name in found if name.endswith(INDEX_SUFFIX)]
    is_part = re.compile(rf"(?:{'|'.join(stems)})-\d+-of-\d+{re.escape(FILE_SUFFIX)}").fullmatch
    models = [name for name in found if not (stems and is_part(name))]
    if len(models) > 1:
        more = f" and {len(models) - _SHOWN} more" if len(models) > _SHOWN else ""
        raise NotFoundError(
            f"there are {len(models)} safetensors models in {where}, and none has the usual name",
            url=where if "://" in where else None,
            hint=f"Give the one that you want: {', '.join(map(url, models[:_SHOWN]))}{more}.",
        )
    return models[0] if models else None


def say_names(names: Sequence[str], preposition: str, where: str, detail: str = "") -> str:
    """Return the words for names of which a directory has none."""
    first, others = names[:2], names[2:]
    text = f"{' or '.join(first)} {preposition} {where}{detail}"
    return f"{text}, and no {' or '.join(others)} either" if others else text
