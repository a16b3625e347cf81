"""The options that commands share, and the loader that is made from them."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from ..companions.lock import required_digests
from ..devices import is_device_name
from ..format.integrity import manifest_names_to_try, parse_sri
from ..loader import Loader
from ..location import locate, locate_mirror
from ..options import LoaderOptions
from ..store.inventory import cache_root
from .group import UserError, argument_errors, json_option, verbose_option
from .values import (
    DEVICES,
    DIRECTORY,
    FILE,
    PLACE,
    SECONDS,
    SOURCE,
    TEXT,
    HeaderType,
    RateType,
    WholeNumber,
    read_token,
)

__all__ = [
    "MODEL_OPTIONS",
    "REQUEST_OPTIONS",
    "cache_dir_option",
    "check_finite",
    "check_source",
    "device_option",
    "files_option",
    "find_root",
    "json_option",
    "loader_options",
    "make_loader",
    "names_option",
    "only_scope_option",
    "quiet_option",
    "report_option",
    "source_argument",
    "sources_argument",
    "trace_option",
    "verbose_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])


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


def _as_mapping(_: click.Context, __: click.Parameter, values: tuple[tuple[str, str], ...]) -> dict[str, str] | None:
    return dict(values) or None


device_option = functools.partial(
    click.option,
    "--device",
    type=DEVICES,
    metavar="cpu|gpu[:N]|cuda[:N]|auto",
    envvar="NDCACHE_DEVICE",
    show_envvar=True,
    callback=_check_device,
    show_default=True,
    help="Where to put the tensors: gpu is wgpu, cuda is PyTorch.",
)
source_argument = click.argument("source", type=SOURCE)
sources_argument = click.argument("sources", metavar="SOURCE...", type=SOURCE, nargs=-1, required=True)
names_option = click.option(
    "--names", metavar="PATTERN", multiple=True, help="Only tensors with this name or glob pattern. Repeatable."
)
report_option = click.option(
    "--report",
    metavar="FILE",
    type=FILE,
    help="Write a page with a picture of the load, for a browser, to FILE.",
)
trace_option = click.option(
    "--trace",
    metavar="FILE",
    type=FILE,
    help="Write a timeline for https://ui.perfetto.dev to FILE.",
)
files_option = click.option(
    "--files/--no-files",
    default=True,
    show_default=True,
    help="Also fetch the configuration and the tokenizer of a new or changed model.",
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Show only results, warnings and errors: no progress.")
cache_dir_option = click.option(
    "--cache-dir", metavar="DIR", type=DIRECTORY, help="The cache directory. [default: NDCACHE_HOME, or the system's]"
)
only_scope_option = click.option(
    "--scope",
    type=TEXT,
    metavar="NAME",
    envvar="NDCACHE_SCOPE",
    show_envvar=True,
    help="Only this part of the cache. [default: all]",
)

_DEFAULTS = LoaderOptions()

#: The options of `Loader`, by their names there.
_LOADER_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "cache_dir": cache_dir_option,
    "scope": click.option(
        "--scope", type=TEXT, metavar="NAME", help=f"A separate part of the cache. [default: {_DEFAULTS.scope}]"
    ),
    "max_workers": click.option(
        "--max-workers",
        type=WholeNumber(1),
        metavar="N",
        help=f"Shards to fetch, or to check, at once. [default: {_DEFAULTS.max_workers}]",
    ),
    "processes": click.option(
        "--processes",
        metavar="N|auto",
        callback=_check_processes,
        help=f"Processes that download, each with --max-workers threads. [default: {_DEFAULTS.processes}]",
    ),
    "timeout": click.option(
        "--timeout",
        type=SECONDS,
        metavar="SECONDS|CONNECT,READ",
        help="Limit for connecting, and for each wait for more bytes. [default: 10,30]",
    ),
    "retries": click.option(
        "--retries",
        type=WholeNumber(0),
        metavar="N",
        help=f"Retries of a failed request. [default: {_DEFAULTS.retries}]",
    ),
    "verify": click.option(
        "--verify",
        type=click.Choice(["download", "always", "never"]),
        help=f"When to compare digests. [default: {_DEFAULTS.verify}]",
    ),
    "offline": click.option("--offline", is_flag=True, help="Use only the cache; make no request."),
    "token": click.option(
        "--token",
        type=TEXT,
        metavar="TOKEN|-",
        callback=read_token,
        help="Sent to the source's server only; - reads standard input. Others may see a command line: HF_TOKEN or "
        "NDCACHE_TOKEN is better.",
    ),
    "headers": click.option(
        "--header",
        "headers",
        type=HeaderType(),
        metavar="'NAME: VALUE'",
        multiple=True,
        callback=_as_mapping,
        help="A header for the source's server only. Repeatable.",
    ),
    "revision": click.option(
        "--revision",
        type=TEXT,
        metavar="REVISION",
        help="The branch, tag or commit of a repository on Hugging Face.",
    ),
    "limit_rate": click.option(
        "--limit-rate",
        type=RateType(),
        metavar="RATE",
        help="The most bytes per second, over all workers and processes: 10MB/s.",
    ),
    "mirrors": click.option(
        "--mirror",
        "mirrors",
        type=TEXT,
        metavar="SOURCE",
        multiple=True,
        help="Another source of the same files. Repeatable.",
    ),
    "integrity": click.option(
        "--integrity",
        metavar="FILE=DIGEST",
        multiple=True,
        callback=_digests_by_file,
        help="The digest that a file must have: tensor-cache.json=sha256-..., in base64. Repeatable.",
    ),
    "lock": click.option(
        "--lock",
        metavar="FILE",
        type=PLACE,
        help="The lock file that every file of the model must be named in; see ndcache lock.",
    ),
    "memory_limit": click.option(
        "--memory-limit-mib",
        "memory_limit",
        type=WholeNumber(1),
        metavar="MIB",
        callback=_bytes_of_mib,
        help=f"Memory for shards in progress. [default: {_DEFAULTS.memory_limit >> 20}]",
    ),
}
#: What a command needs to find a model in the cache.
MODEL_OPTIONS = ("cache_dir", "scope", "revision")
REQUEST_OPTIONS = (
    *MODEL_OPTIONS,
    "timeout",
    "retries",
    "offline",
    "token",
    "headers",
    "limit_rate",
    "mirrors",
    "integrity",
    "lock",
)
#: Options whose variables the library itself reads: NDCACHE_HOME and NDCACHE_OFFLINE.
_READ_BY_LIBRARY = ("cache_dir", "offline")


def loader_options(*names: str) -> Callable[[Command], Command]:
    """Give a command the `Loader` options `names` (all of them if none is named) and ``--verbose``.

    The environment may have them, too: ``--max-workers`` is NDCACHE_MAX_WORKERS, for every command that has it.
    """

    def decorate(command: Command) -> Command:
        command = verbose_option(command)
        for name in reversed(names or tuple(_LOADER_OPTIONS)):
            command = _LOADER_OPTIONS[name](command)
            option = command.__click_params__[-1]  # type: ignore[attr-defined]
            if name not in _READ_BY_LIBRARY:
                option.envvar = f"NDCACHE_{option.opts[0].removeprefix('--').replace('-', '_').upper()}"
                option.show_envvar = True  # in --help, and in an error about its value
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
    given = _given(options)
    with argument_errors():
        loader = Loader(**given)
    if source is not None:
        check_source(options, source)
    return loader


def check_source(options: Mapping[str, Any], source: str) -> None:
    """Check a source, and the options that depend on it; raise the errors of `make_loader`."""
    given = _given(options)
    with argument_errors():
        location = locate(source, revision=given.get("revision"))
        manifest_names_to_try(location.manifest_names, required_digests(given.get("integrity")))
        if location.is_remote:
            for mirror in given.get("mirrors", ()):
                locate_mirror(mirror)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `Loader` that were given, by their names there."""
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if (lock := given.pop("lock", None)) is not None:
        if "integrity" in given:
            raise UserError("--lock and --integrity cannot be used together")
        given["integrity"] = lock
    return given


def find_root(cache_dir: str | None) -> Path:
    """Return the cache directory: the option's, or that of the environment."""
    return cache_root(cache_dir, os.environ.get("NDCACHE_HOME"))
