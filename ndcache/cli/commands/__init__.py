"""The commands. Results go to standard output, everything else to standard error.

The exit status is 0; 1 for an error, or if a check finds something bad; 2 for wrong usage; 130 after Ctrl-C; 143 after
SIGTERM. An error is one line, and ``--verbose`` adds its traceback. A bug always shows its traceback.
"""

from __future__ import annotations

import click

from ..._version import __version__
from ..group import CommandGroup
from ..options import verbose_option
from .benches import bench
from .caches import ls, prune, rm, verify
from .exports import convert, dump
from .loads import fetch, load
from .machine import demo, doctor
from .manifests import inspect, lock
from .reports import report

__all__ = ["main"]


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ndcache")
@verbose_option
def main() -> None:
    """Load model weights in the MLC / TVM NDArray cache format.

    SOURCE is the http(s) URL of a model directory or of its manifest, hf://owner/name[@revision][/folder],
    s3://bucket/folder, gs://bucket/folder, az://container/folder, file://, or a local path.
    """


for _command in (load, fetch, inspect, lock, ls, rm, prune, verify, convert, dump, doctor, demo, report, bench):
    main.add_command(_command)
