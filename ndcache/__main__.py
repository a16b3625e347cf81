"""``python -m ndcache``: the command line, or a helper process of a load."""

from __future__ import annotations

import sys

from .processes.command import COMMAND

if __name__ == "__main__":
    if sys.argv[1:2] == [COMMAND]:
        from .processes.helper import main as run_helper  # and nothing else: it is to start fast

        run_helper(sys.argv[2:])
    else:
        from .cli import main

        main()
