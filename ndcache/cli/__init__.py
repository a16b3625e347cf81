"""The command line."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; by default with the arguments of this process."""
    try:  # here, so that Ctrl-C during these imports ends quietly
        from .commands import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    # A manifest is many objects without a cycle: searching them for garbage would take half of the time to parse it.
    gc.set_threshold(100_000, 20, 20)
    raise SystemExit(run(arguments, prog_name="ndcache"))
