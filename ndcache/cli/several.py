"""Do the same for several sources: an error of one does not keep the others from their turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..companions.rules import NoListingError
from ..errors import NdcacheError
from ..format.manifest import NoMatchError
from .group import UserError, argument_errors, one_line
from .output import say
from .show.json_values import error_json
from .values import locate_source

__all__ = ["for_each"]


def for_each(sources: Sequence[str], work: Callable[[str], dict[str, object]]) -> tuple[list[dict[str, object]], bool]:
    """Call `work` for each source; return the JSON values, and whether all calls succeeded.

    The error of one of several sources is a line, and a JSON value. That of a single one is raised.
    """
    values, is_good = [], True
    for source in sources:
        try:
            with argument_errors():
                locate_source(source)
            values.append(work(source))
        except (NdcacheError, NoMatchError, NoListingError, UserError) as error:
            if len(sources) == 1:
                raise
            is_good = False
            say(f"error: {one_line(error)}")
            values.append(error_json(source, error, one_line(error)))
    return values, is_good
