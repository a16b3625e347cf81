"""The options that commands share, and the loader that is made from them."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from ..devices import is_device_name
from ..format.integrity import manifest_names_to_try, parse_sri
from ..loader import Loader
from ..location import locate, locate_mirror
from ..options import LoaderOptions
from .group import VERBOSE, argument_errors

__all__ = [
    "CACHE_OPTIONS",
    "REQUEST_OPTIONS",
    "cache_dir_option",
    "check_finite",
    "device_option",
    "json_option",
    "loader_options",
    "make_loader",
    "names_option",
    "quiet_option",
    "trace_option",
    "verbose_option",
]

logger = logging.getLogger("ndcache")

Command = TypeVar("Command", bound=Callable[..., Any])


def _set_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[VERBOSE] = True
        logger.setLevel(logging.INFO)


def _check_device(_: click.Context, __: click.Parameter, value: str) -> str:
    if not is_device_name(value):
        raise click.BadParameter("it must be cpu, gpu, gpu:N, cuda, cuda:N or auto.")
    return value


def check_finite(_: click.Context, __: click.Parameter, value: float) -> float:
    """Refuse a value that is not a finite number."""
    if not math.isfinite(value):
        raise click.BadParameter("it must be a finite number.")
    return value


def _check_processes(_: click.Context, __: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "auto":
        return value
    try:
        if (count := int(value)) >= 1:
            return count
    except ValueError:
        pass
    raise click.BadParameter("it must be a number of at least 1, or auto.")


def _bytes_of_mib(_: click.Context, __: click.Parameter, value: int | None) -> int | None:
    return None if value is None else value << 20


def _digests_by_file(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    for value in values:
        name, _equals, digest = value.partition("=")
        try:
            parse_sri(digest)
        except ValueError as error:
            raise click.BadParameter(f"{error}. It must be FILE=sha256-...") from error
        if not name:
            raise click.BadParameter("it must be FILE=sha256-...")
    return {name: digest for name, _, digest in (value.partition("=") for value in values)} or None


verbose_option = click.option(
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_set_verbose,
    help="Show log messages, and the traceback of an error.",
)
device_option = functools.partial(
    click.option,
    "--device",
    metavar="cpu|gpu[:N]|cuda[:N]|auto",
    callback=_check_device,
    show_default=True,
    help="Where to put the tensors: gpu is wgpu, cuda is PyTorch.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
names_option = click.option(
    "--names", metavar="PATTERN", multiple=True, help="Only tensors with this name or glob pattern. Repeatable."
)
trace_option = click.option(
    "--trace",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Write a timeline for https://ui.perfetto.dev to FILE.",
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Show no progress bar.")
cache_dir_option = click.option(
    "--cache-dir", metavar="DIR", help="The cache directory. [default: NDCACHE_HOME, or the system's]"
)

_DEFAULTS = LoaderOptions()

#: The options of `Loader`, by their names there.
_LOADER_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "cache_dir": cache_dir_option,
    "scope": click.option(
        "--scope", metavar="NAME", help=f"A separate part of the cache. [default: {_DEFAULTS.scope}]"
    ),
    "max_workers": click.option(
        "--max-workers",
        type=click.IntRange(1),
        metavar="N",
        help=f"Shards to fetch at once. [default: {_DEFAULTS.max_workers}]",
    ),
    "processes": click.option(
        "--processes",
        metavar="N|auto",
        callback=_check_processes,
        help=f"Processes that download, each with --max-workers threads. [default: {_DEFAULTS.processes}]",
    ),
    "timeout": click.option(
        "--timeout",
        type=click.FloatRange(0, min_open=True),
        metavar="SECONDS",
        help="Limit for connecting, and for each wait for more bytes. [default: 10, 30]",
    ),
    "retries": click.option(
        "--retries",
        type=click.IntRange(0),
        metavar="N",
        help=f"Retries of a failed request. [default: {_DEFAULTS.retries}]",
    ),
    "verify": click.option(
        "--verify",
        type=click.Choice(["download", "always", "never"]),
        help=f"When to compare digests. [default: {_DEFAULTS.verify}]",
    ),
    "offline": click.option("--offline", is_flag=True, help="Use only the cache; make no request."),
    "mirrors": click.option(
        "--mirror", "mirrors", metavar="SOURCE", multiple=True, help="Another source of the same files. Repeatable."
    ),
    "integrity": click.option(
        "--integrity",
        metavar="FILE=DIGEST",
        multiple=True,
        callback=_digests_by_file,
        help="The digest that a file must have: tensor-cache.json=sha256-..., in base64. Repeatable.",
    ),
    "memory_limit": click.option(
        "--memory-limit-mib",
        "memory_limit",
        type=click.IntRange(1),
        metavar="MIB",
        callback=_bytes_of_mib,
        help=f"Memory for shards in progress. [default: {_DEFAULTS.memory_limit >> 20}]",
    ),
}
CACHE_OPTIONS = ("cache_dir", "scope")
REQUEST_OPTIONS = (*CACHE_OPTIONS, "timeout", "retries", "offline", "integrity")


def loader_options(*names: str) -> Callable[[Command], Command]:
    """Give a command the `Loader` options `names` (all of them if none is named) and ``--verbose``."""

    def decorate(command: Command) -> Command:
        command = verbose_option(command)
        for name in reversed(names or tuple(_LOADER_OPTIONS)):
            command = _LOADER_OPTIONS[name](command)
        return command

    return decorate


def make_loader(options: Mapping[str, Any], source: str | None = None) -> Loader:
    """Return a loader with the options that were given; the others keep the loader's own defaults.

    Raises
    ------
    UserError
        An option or `source` cannot be used.
    NotFoundError
        `source` is a local path that does not exist.
    """
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    with argument_errors():
        loader = Loader(**given)
        location = None if source is None else locate(source)
        if location is not None:
            digests = {name: parse_sri(text) for name, text in given.get("integrity", {}).items()}
            manifest_names_to_try(location.manifest_names, digests)
        if location is not None and location.is_remote:
            for mirror in given.get("mirrors", ()):
                locate_mirror(mirror)
    return loader
