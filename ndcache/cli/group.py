"""The group of all commands, which turns errors, warnings, logs and signals into lines and exit statuses."""

from __future__ import annotations

import difflib
import io
import logging
import re
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from ..caller import SHOWS_ALL_FRAMES
from ..errors import NdcacheError, redact
from ..urls.redact import printable
from . import completion as completion
from .output import print_json, say
from .streams import safe_streams

__all__ = [
    "CommandGroup",
    "UserError",
    "argument_errors",
    "error_json",
    "expected_errors",
    "is_of_output",
    "json_option",
    "one_line",
    "say_error",
    "verbose_option",
]

logger = logging.getLogger("ndcache")

#: The names that commands have in similar programs.
_OTHER_NAMES = {
    **{"download": "fetch", "pull": "fetch", "get": "fetch"},
    **{"list": "ls", "remove": "rm", "delete": "rm", "check": "verify"},
    **{"show": "inspect", "info": "inspect", "export": "convert"},
}
#: Stands for a hyphen in help, where textwrap would break a line.
_HYPHEN = "\ue000"
#: On terminals narrower than the first, the meaning stands beside an option only if its name fits into the second.
_NARROW, _NARROW_COLUMN = 60, 8
#: Keys of a context's ``meta``: whether ``--verbose`` was given, and the context of the command that has ``--json``.
_VERBOSE, _JSON = "ndcache.verbose", "ndcache.json"


class UserError(Exception):
    """A mistake of the user that click cannot find; the exit status is 1."""


def expected_errors() -> tuple[type[BaseException], ...]:
    """Return the errors that users can meet. Any other exception is a bug, and shows its traceback."""
    from ..companions.rules import NoListingError  # here, as `ndcache --version` needs neither
    from ..format.manifest import NoMatchError

    return (NdcacheError, OSError, MemoryError, NoMatchError, NoListingError, UserError)


class _Terminated(BaseException):
    """Raised when SIGTERM comes. Like a KeyboardInterrupt, it ends all threads and removes temporary files."""


class _HelpFormatter(click.HelpFormatter):
    """Help that breaks no line within an option's name, and fits narrow terminals."""

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        if width is None:  # click would take 50 columns for the least
            width = max(min(shutil.get_terminal_size().columns, max_width or 80) - 2, 30)
        super().__init__(indent_increment, width, max_width)

    def write(self, string: str) -> None:
        super().write(string.replace(_HYPHEN, "-"))

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", _HYPHEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        meanings = [(name, meaning.replace("-", _HYPHEN)) for name, meaning in rows]
        super().write_dl(meanings, col_max if self.width >= _NARROW else _NARROW_COLUMN, col_spacing)


class _Context(click.Context):
    formatter_class = _HelpFormatter


class CommandGroup(click.Group):
    """Run a command: print an error as one line, and turn signals into exit statuses."""

    context_class = _Context

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command; its help begins with the line that the list of commands has."""
        cmd.context_class = _Context
        cmd.short_help = (cmd.help or "").partition("\n")[0]  # in full: click would cut it
        super().add_command(cmd, name)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command and exit, with standard streams that can always be written."""
        with safe_streams():
            if not extra.get("standalone_mode", True):
                return super().main(*args, **extra)
            try:
                try:
                    status = super().main(*args, **{**extra, "standalone_mode": False})
                except click.ClickException as error:
                    _say_usage(error)
                    status = error.exit_code
                except click.Abort:  # Ctrl-C before the command begins
                    status = 130
                if not status:
                    sys.stdout.flush()
                raise SystemExit(status or 0)
            except OSError as error:  # while click itself prints, for example --help
                if not isinstance(error, BrokenPipeError):
                    say(f"error: {one_line(error)}")
                raise SystemExit(1) from error

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name, or by the one that it has in similar programs."""
        return super().get_command(ctx, _OTHER_NAMES.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that was typed, and its arguments; suggest one if there is none of this name."""
        is_known = (name := args[0]) in self.commands or name in _OTHER_NAMES
        if not is_known and not name.startswith("-") and not ctx.resilient_parsing:  # as when a shell completes
            known = [*self.commands, *_OTHER_NAMES]
            close = ["--help"] if name == "help" else difflib.get_close_matches(name, known, n=1)
            meant = f" Did you mean {_OTHER_NAMES.get(close[0], close[0])!r}?" if close else ""
            ctx.fail(f"No such command {printable(name)!r}.{meant}")
        _, command, others = super().resolve_command(ctx, args)
        return None if command is None else command.name, command, others

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn errors and signals into messages and exit statuses."""
        with _messages_as_lines(), _sigterm_raises():
            try:
                return super().invoke(ctx)
            except BrokenPipeError:  # the reader has seen enough, as `head` does
                ctx.exit(1)
            except KeyboardInterrupt as interrupt:
                say(f"interrupted: {interrupt}" if interrupt.args else "interrupted")
                ctx.exit(130)
            except _Terminated as interrupt:
                say(f"terminated: {interrupt}" if interrupt.args else "terminated")
                ctx.exit(143)
            except expected_errors() as error:
                say_error(error)
                if _JSON in ctx.meta and not is_of_output(error):
                    params = ctx.meta[_JSON].params
                    print_json(error_json(params.get("source") or params.get("input_"), error))
                ctx.exit(1)


def _set_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_VERBOSE] = True
        logger.setLevel(logging.INFO)
        shown = SHOWS_ALL_FRAMES.set(True)
        ctx.call_on_close(lambda: SHOWS_ALL_FRAMES.reset(shown))


verbose_option = click.option(
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_set_verbose,
    help="Show log messages, and the traceback of an error.",
)


def _set_json(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    if value:
        ctx.meta[_JSON] = ctx
    return value


json_option = click.option("--json", "as_json", is_flag=True, callback=_set_json, help="Print the result as JSON.")


def error_json(source: str | None, error: BaseException) -> dict[str, object]:
    """Return the JSON value for a source, or a command without one, that did not do what it should."""
    value: dict[str, object] = {} if source is None else {"source": redact(source)}
    is_wrapped = isinstance(error, UserError) and error.__cause__ is not None
    return value | {
        "error": {
            "type": type(error.__cause__ if is_wrapped else error).__name__,
            "message": one_line(error),
            "hint": error.hint if isinstance(error, NdcacheError) else None,
            "retryable": error.retryable if isinstance(error, NdcacheError) else False,
        }
    }


def is_of_output(error: BaseException) -> bool:
    """Return whether an error means that nothing can be printed any more."""
    return isinstance(error, OSError) and error.filename == "standard output"


def say_error(error: BaseException) -> None:
    """Print an error as one line; with ``--verbose``, its traceback, too."""
    context = click.get_current_context(silent=True)
    if context is not None and context.meta.get(_VERBOSE):
        say("".join(traceback.format_exception(error)).rstrip())
    say(f"error: {one_line(error)}")


def _say_usage(error: click.ClickException) -> None:
    """Print a mistake that click found as click does, but with the spelling of all other errors."""
    with io.StringIO() as text:
        error.show(text)
        say(re.sub(r"^Error: ", "error: ", text.getvalue(), count=1, flags=re.MULTILINE).rstrip())


@contextmanager
def argument_errors() -> Iterator[None]:
    """Report a ValueError or TypeError of the block, which must only check arguments, as a mistake of the user."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def one_line(error: BaseException) -> str:
    """Return the error as one line, which a terminal can show."""
    if isinstance(error, OSError) and not isinstance(error, NdcacheError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, MemoryError):
        text = "not enough memory. Load only some tensors with --names, or lower --memory-limit-mib."
    else:
        text = str(error) or type(error).__name__
    return printable(text)


class _LineHandler(logging.Handler):
    """Print each log record as a line on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {printable(record.getMessage())}")


@contextmanager
def _messages_as_lines() -> Iterator[None]:
    """Show warnings and logs as plain lines."""
    handler = _LineHandler()
    logger.addHandler(handler)
    # Otherwise Python would print warnings that other libraries log, such as wgpu's about missing features of drivers.
    last_resort, logging.lastResort = logging.lastResort, logging.NullHandler()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say(f"warning: {printable(str(message))}")
            yield
    finally:
        logging.lastResort = last_resort
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
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
