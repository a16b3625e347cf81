"""The values of options and arguments: sources, devices, seconds, rates, headers and tokens."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ..arguments import check_path
from ..location import Location, locate
from ..options import are_headers
from ..store.housekeeping.quantities import parse_rate
from .completion import cached_sources

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic since click 8.2

__all__ = [
    "CACHED",
    "DEVICES",
    "DIRECTORY",
    "FILE",
    "PLACE",
    "SECONDS",
    "SOURCE",
    "TEXT",
    "HeaderType",
    "ParamType",
    "RateType",
    "WholeNumber",
    "locate_source",
    "location_words",
    "read_token",
]

_DEVICE_NAMES = ("cpu", "gpu", "cuda", "auto")
#: The most characters of a token that standard input may have.
_MAX_TOKEN = 4096


class WholeNumber(click.IntRange):
    """A whole number from a range; click's own errors would call it an "integer range"."""

    name = "whole number"


class _Seconds(ParamType):
    """Seconds, or two numbers of seconds: to connect, and to wait for bytes."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2) or not all(0 < number < math.inf for number in numbers):
            self.fail(f"{value!r} is not SECONDS, or CONNECT,READ such as 5,30.", param, ctx)
        return numbers[0] if len(numbers) == 1 else tuple(numbers)


class _Cached(ParamType):
    """The source of a cached model, which the shell completes."""

    name = "source"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = {source for source in cached_sources(ctx.params.get("cache_dir")) if source.startswith(incomplete)}
        return [CompletionItem(source) for source in sorted(found)]


class _Source(_Cached):
    """The source of a model. The shell completes those in the cache, else paths."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        # The name of a URL with a query stands for a part of it, so it is not a source.
        found = [item for item in super().shell_complete(ctx, param, incomplete) if " " not in item.value]
        return found or [CompletionItem(incomplete, type="file")]


class _Device(ParamType):
    """A device. The shell completes the names, and numbers after a colon."""

    name = "device"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        kind, colon, _ = incomplete.partition(":")
        names = [f"{kind}:{number}" for number in range(8)] if colon and kind in ("gpu", "cuda") else _DEVICE_NAMES
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class _Text(ParamType):
    """A text, which is not empty: a shell gives an empty one for a variable that is not set."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty.", param, ctx)
        return value


class _File(click.Path):
    """A file or directory on this machine, which need not exist."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            check_path("it", value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)
        if value == "-":
            self.fail("it cannot be a standard stream; ./- is a file of this name.", param, ctx)
        return super().convert(value, param, ctx)


class _Directory(_File):
    """A directory, which need not exist."""

    name = "directory"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


SECONDS, CACHED, SOURCE, DEVICES = _Seconds(), _Cached(), _Source(), _Device()
TEXT, DIRECTORY, FILE, PLACE = _Text(), _Directory(), _File(dir_okay=False), _File()


class RateType(ParamType):
    """Bytes per second: ``10MB/s``, ``500k``, ``1.5MiB``."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the bytes per second that a text means."""
        try:
            return parse_rate(str(value))
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


class HeaderType(ParamType):
    """A header of HTTP: ``NAME: VALUE``. In the environment, each has a line."""

    name = "header"

    def split_envvar_value(self, rv: str) -> list[str]:
        """Return the lines of the environment's value that are not blank."""
        return [line for line in rv.splitlines() if line.strip()]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Return the name and the value; an error shows neither, as both may be a secret."""
        name, colon, text = str(value).partition(":")
        if not colon or not name.strip():
            self.fail("it must be 'NAME: VALUE'.", param, ctx)
        name, text = name.strip(), text.strip()
        if not are_headers({name: text}):
            self.fail("HTTP allows no such header, or ndcache sends it itself, as it does Range.", param, ctx)
        return name, text


def read_token(ctx: click.Context, _: click.Parameter, value: str | None) -> str | None:
    """Return the token, which is the first line of standard input for ``-``."""
    if value is None or value.strip() != "-":
        return None if value is None else value.strip()  # a file that the environment was set from ends in a new line
    if ctx.resilient_parsing:  # a shell that completes must not wait
        return value
    token = sys.stdin.readline(_MAX_TOKEN + 1).strip()
    if not 0 < len(token) <= _MAX_TOKEN:
        problem = f"has a line of more than {_MAX_TOKEN:,} characters" if token else "has no token"
        raise click.BadParameter(f"standard input {problem}.")
    return token


def locate_source(source: str) -> Location:
    """Return the location of a source of the command that runs, at the revision that its options say.

    Raises
    ------
    NotFoundError, ValueError
        See `location.locate`.
    """
    context = click.get_current_context(silent=True)
    return locate(source, revision=None if context is None else context.params.get("revision"))


def location_words(location: Location) -> str:
    """Return a location without secrets; of a local file that the user named, the file."""
    if location.directory is not None and not location.is_folder:
        return str(location.directory / location.manifest_names[0])
    return str(location)
