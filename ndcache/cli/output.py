"""How the command line speaks: results on standard output, one line for anything else on standard error.

Also what is true of every command: what an error looks like, and how a signal ends it.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from ..errors import NdcacheError
from ..urls.redact import printable as shown
from .streams import own_process

__all__ = [
    "VERBOSE",
    "Commands",
    "format_checks",
    "format_count",
    "format_size",
    "message",
    "print_facts",
    "print_json",
    "print_table",
    "say",
    "shown",
]

logger = logging.getLogger("ndcache")

#: What happens to users; anything else is a bug, and shows its traceback.
_EXPECTED = (NdcacheError, KeyError, ValueError, TypeError, OSError, ImportError, MemoryError, Warning)
#: Where a command's context says that ``--verbose`` was given.
VERBOSE = "ndcache.verbose"


# --- errors, warnings, signals ------------------------------------------------------------------------


class _Terminated(BaseException):
    """SIGTERM came. Like KeyboardInterrupt, so that everything is stopped and removed on its way up."""


class Commands(click.Group):
    """The commands, with what is true of them all: how they fail and how they are stopped."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command, in a process that is its own."""
        with own_process():
            try:
                try:
                    return super().main(*args, **extra)
                except SystemExit as end:
                    if not end.code:
                        sys.stdout.flush()
                    raise
            except OSError as error:  # of what click itself prints, as for --help
                if not isinstance(error, BrokenPipeError):
                    say(f"error: {message(error)}")
                raise SystemExit(1) from error

    def invoke(self, ctx: click.Context) -> Any:
        with _messages(), _sigterm():
            try:
                return super().invoke(ctx)
            except BrokenPipeError:  # whoever reads has enough, as `head` does
                ctx.exit(1)
            except KeyboardInterrupt:
                say("interrupted")
                ctx.exit(130)
            except _Terminated:
                say("terminated")
                ctx.exit(143)
            except _EXPECTED as error:
                if ctx.meta.get(VERBOSE):
                    say("".join(traceback.format_exception(error)).rstrip())
                say(f"error: {message(error)}")
                ctx.exit(1)


class _Lines(logging.Handler):
    """A line on standard error for each record."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {shown(record.getMessage())}")


@contextmanager
def _messages() -> Iterator[None]:
    """Show warnings and logs as plain lines."""
    handler = _Lines()
    logger.addHandler(handler)
    # Of other libraries' records, Python would print the warnings: wgpu has some on what drivers lack.
    last_resort, logging.lastResort = logging.lastResort, logging.NullHandler()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say(f"warning: {shown(str(message))}")
            yield
    finally:
        logging.lastResort = last_resort
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@contextmanager
def _sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def terminate(*_: object) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def message(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])  # its str() has quotes around it
    elif isinstance(error, OSError) and not isinstance(error, NdcacheError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, MemoryError):
        text = "not enough memory. Load a part with --names, or lower --memory-limit-mib."
    else:
        text = str(error) or type(error).__name__
    return shown(text)


def say(line: str) -> None:
    """Print a line on standard error."""
    tqdm.write(line, file=sys.stderr)  # above the bar, if there is one
    sys.stderr.flush()


# --- output -------------------------------------------------------------------------------------------


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print labels and values in two columns; a pair of empty ones is an empty line."""
    facts = list(facts)
    width = max((len(label) for label, _ in facts), default=0)
    for label, value in facts:
        click.echo(f"{label:<{width}}  {shown(value)}".rstrip())


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table. Columns whose names end in a space are numbers, and set to the right."""
    # Not rich's Table, which takes 0.3 ms for each row: models have 100,000 tensors.
    cells = [[shown(cell) for cell in row] for row in rows]
    headers = [column.strip() for column in columns]
    widths = [max(map(cell_len, column)) for column in zip(headers, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        # A row is a line, whatever its length: what a terminal folds by itself can still be copied.
        spaces = (" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        parts = (
            space + cell if column.endswith(" ") else cell + space
            for cell, space, column in zip(row, spaces, columns, strict=True)
        )
        return "  ".join(parts).rstrip()

    Console(file=sys.stdout, highlight=False).print(Text(line(headers), style="bold"), soft_wrap=True)
    for row in cells:
        click.echo(line(row))


def print_json(value: Any) -> None:
    """Print JSON, and nothing else."""
    click.echo(json.dumps(value, indent=2))


def format_size(nbytes: int) -> str:
    """Bytes in words: ``"1.5 MiB"``."""
    if nbytes < 1 << 10:
        return f"{nbytes} B"
    unit, name = next((unit, name) for unit, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if nbytes >= 1 << unit)
    return f"{nbytes / (1 << unit):,.1f} {name}"


def format_count(number: int, noun: str) -> str:
    """A number of things in words: ``"1 shard"``, ``"2 shards"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_checks(integrity: Iterable[tuple[str, int]]) -> str:
    """How many shards were held to which check, in words."""
    words = [f"{number:,} by {'size alone' if check == 'size' else check}" for check, number in integrity]
    return ", ".join(words) or "nothing"
