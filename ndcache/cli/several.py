"""Do the same for several sources: an error of one does not keep the others from their turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..loader import Loader
from .group import error_json, expected_errors, is_of_output, say_error
from .options import check_source, make_loader

__all__ = ["for_each"]


def for_each(
    sources: Sequence[str], options: Mapping[str, Any], work: Callable[[Loader, str], dict[str, object]]
) -> tuple[list[dict[str, object]], bool]:
    """Call `work` for each source with one loader; return the JSON values, and whether all calls succeeded."""
    values, is_good = [], True
    with make_loader(options) as loader:
        for source in sources:
            try:
                check_source(options, source)
                values.append(work(loader, source))
            except expected_errors() as error:
                if is_of_output(error):
                    raise
                is_good = False
                say_error(error)
                values.append(error_json(source, error))
    return values, is_good
