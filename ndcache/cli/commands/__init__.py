"""The commands. Results go to standard output, everything else to standard error.

The exit status is 0; 1 for an error, or if a check finds something bad; 2 for wrong usage; 130 after Ctrl-C; 143 after
SIGTERM. An error is one line, and ``--verbose`` adds its traceback. A bug always shows its traceback.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping

import click

from ..._version import __version__
from ..group import CommandGroup, verbose_option

__all__ = ["main"]

#: The module of each command.
_MODULES = {
    **{"load": "loads", "fetch": "loads"},
    **{"inspect": "manifests", "lock": "manifests"},
    **{"ls": "caches", "rm": "caches", "prune": "caches", "verify": "caches"},
    **{"convert": "exports", "dump": "exports"},
    **{"doctor": "machine", "demo": "machine"},
    **{"report": "reports", "bench": "benches"},
}


class _Commands(MutableMapping[str, click.Command]):
    """The commands by their names; a command is imported when it is used, as its modules take some tenths of a second.

    Parameters
    ----------
    modules : mapping
        The module of each command, in this folder.
    """

    def __init__(self, modules: dict[str, str]) -> None:
        self._modules = modules
        self._found: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._found and name in self._modules:
            try:  # so that Ctrl-C during these imports ends quietly
                import numpy  # noqa: F401 - first: ml_dtypes, which imports it from C, would make an ImportError of it

                module = importlib.import_module(f".{self._modules[name]}", __name__)
            except KeyboardInterrupt:
                raise SystemExit(130) from None
            main.add_command(getattr(module, name))
        return self._found[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._found[name] = command

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands are not removed")

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


@click.group(cls=CommandGroup, commands=_Commands(_MODULES), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ndcache")
@verbose_option
def main() -> None:
    """Load model weights in the MLC / TVM NDArray cache format.

    SOURCE is the http(s) URL of a model directory or of its manifest, hf://owner/name[@revision][/folder],
    s3://bucket/folder, gs://bucket/folder, az://container/folder, file://, or a local path.
    """
