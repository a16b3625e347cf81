"""The group of all commands, which turns errors, warnings, logs and signals into lines and exit statuses."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from ..errors import NdcacheError
from ..format.manifest import NoMatchError
from ..urls.redact import printable
from .output import say
from .streams import safe_streams

__all__ = ["VERBOSE", "CommandGroup", "UserError", "argument_errors", "one_line"]

logger = logging.getLogger("ndcache")

#: The key that a command's context has if ``--verbose`` was given.
VERBOSE = "ndcache.verbose"


class UserError(Exception):
    """A mistake of the user that click cannot find; the exit status is 1."""


#: Errors that users can meet. Any other exception is a bug, and shows its traceback.
_EXPECTED = (NdcacheError, OSError, MemoryError, NoMatchError, UserError)


class _Terminated(BaseException):
    """Raised when SIGTERM comes. Like a KeyboardInterrupt, it ends all threads and removes temporary files."""


class CommandGroup(click.Group):
    """Run a command: print an error as one line, and turn signals into exit statuses."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command and exit, with standard streams that can always be written."""
        with safe_streams():
            try:
                try:
                    return super().main(*args, **extra)
                except SystemExit as end:
                    if not end.code:
                        sys.stdout.flush()
                    raise
            except OSError as error:  # while click itself prints, for example --help
                if not isinstance(error, BrokenPipeError):
                    say(f"error: {one_line(error)}")
                raise SystemExit(1) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn errors and signals into messages and exit statuses."""
        with _messages_as_lines(), _sigterm_raises():
            try:
                return super().invoke(ctx)
            except BrokenPipeError:  # the reader has seen enough, as `head` does
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
                say(f"error: {one_line(error)}")
                ctx.exit(1)


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
    elif isinstance(error, NoMatchError):
        text = str(error.args[0])  # the str() of a KeyError has quotes around it
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
