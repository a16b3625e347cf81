"""Show the caller little of ndcache: warnings that point to the caller's line, and short tracebacks."""

from __future__ import annotations

import dis
import functools
import os
import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

__all__ = [
    "SHOWS_ALL_FRAMES",
    "PublicFrame",
    "is_expected",
    "name_in_tracebacks",
    "public",
    "render_in_ipython",
    "warn_caller",
]

P = ParamSpec("P")
R = TypeVar("R")
TB = TypeVar("TB", TracebackType, "TracebackType | None")

#: Whether tracebacks keep all frames, as with NDCACHE_DEBUG=1.
SHOWS_ALL_FRAMES = ContextVar("SHOWS_ALL_FRAMES", default=False)

#: Types of expected errors, besides those of ndcache itself.
_EXPECTED = (KeyError, TypeError, ValueError, OSError, RuntimeError)
_RAISE = dis.opmap["RAISE_VARARGS"]


class PublicFrame:
    """Let the traceback of an expected error end in the public function that has this ``with`` statement.

    Expected are errors of ndcache, and of arguments and files, that a ``raise`` of ndcache has raised. Other errors are
    bugs, or those of callbacks, and keep their frames. Of a cause that is an error of ndcache, the last frame is kept;
    other causes keep all of theirs. The value is for a variable ``__tracebackhide__``, with which pytest and IPython
    fold the function, too. With NDCACHE_DEBUG=1, nothing is hidden.
    """

    __slots__ = ()

    def __enter__(self) -> bool:
        return _hides_frames()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and traceback is not None and is_expected(error, traceback) and _hides_frames():
            traceback.tb_next = None
            while (error := error.__cause__) is not None:
                if _is_ndcache(error):
                    error.__traceback__ = _last(error.__traceback__)


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Let the tracebacks of expected errors end in a function: see `PublicFrame`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with PublicFrame() as __tracebackhide__:
            return function(*args, **kwargs)

    name_in_tracebacks(call, function.__name__)
    return call


def render_in_ipython(error: BaseException) -> list[str]:
    """Return the traceback of an error as IPython shows it, but without the public function.

    IPython folds each function with ``__tracebackhide__`` but the last one.
    """
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(traceback)
        traceback = traceback.tb_next
    while len(frames) > 1 and frames[-1].tb_frame.f_locals.get("__tracebackhide__"):
        frames.pop()
    for each in reversed(frames):
        traceback = TracebackType(traceback, each.tb_frame, each.tb_lasti, each.tb_lineno)
    shell: Any = sys.modules["IPython"].get_ipython()
    lines: list[str] = shell.InteractiveTB.structured_traceback(type(error), error, traceback)
    return lines


def _hides_frames() -> bool:
    return os.environ.get("NDCACHE_DEBUG", "0") in ("", "0") and not SHOWS_ALL_FRAMES.get()


def is_expected(error: BaseException, traceback: TracebackType) -> bool:
    """Return whether a ``raise`` of ndcache has raised an error, of a type that users may expect."""
    if not (isinstance(error, _EXPECTED) or _is_ndcache(error)):
        return False
    traceback = _last(traceback)
    code = traceback.tb_frame.f_code
    was_cut = "__tracebackhide__" in code.co_varnames  # by a public function that another one called
    return _is_ours(traceback.tb_frame.f_globals) and (was_cut or code.co_code[traceback.tb_lasti] == _RAISE)


def _is_ndcache(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "ndcache"


def _last(traceback: TB) -> TB:
    """Return the last entry of a traceback."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback


def name_in_tracebacks(function: Any, name: str) -> None:
    """Let the frames of a wrapper have the name of the function that it wraps."""
    function.__code__ = function.__code__.replace(co_name=name)


def warn_caller(message: str) -> None:
    """Issue a `RuntimeWarning` for the line that called ndcache."""
    warnings.warn(message, RuntimeWarning, stacklevel=_depth_below_caller())


def _depth_below_caller() -> int:
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and (_is_ours(frame.f_globals) or frame.f_globals.get("__name__") == "contextlib"):
        depth, frame = depth + 1, frame.f_back
    return depth


def _is_ours(module: dict[str, Any]) -> bool:
    return (module.get("__package__") or "").partition(".")[0] == "ndcache"
