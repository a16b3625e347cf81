"""The command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; by default with the arguments of this process."""
    try:  # here, so that Ctrl-C during these imports ends quietly
        from .commands import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(run(arguments, prog_name="ndcache"))
