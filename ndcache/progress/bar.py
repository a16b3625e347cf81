"""A bar on a terminal or in a notebook; elsewhere, lines."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO

from .lines import Summary, log_line, summary_line
from .notebook import NotebookBar, is_notebook, show_line
from .reports import ProgressReport
from .terminal import CLEAR_LINE, can_redraw, leave_terminal, take_terminal

if TYPE_CHECKING:
    from .screens import TerminalBar

__all__ = ["Bar", "Summary", "are_bars_disabled"]

#: A bar of a load from cache appears after so many seconds: most are over by then.
_CACHED_DELAY = 0.5
#: The names that bars show now.
_names_in_use: dict[str, Bar] = {}


def are_bars_disabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the environment forbids bars: ndcache's own variable, or else that of Hugging Face."""
    value = environ.get("NDCACHE_NO_PROGRESS") or environ.get("HF_HUB_DISABLE_PROGRESS_BARS") or ""
    return value.strip().lower() not in ("", "0", "false", "no", "off")


class Bar:
    """Show the progress of a load: a bar on a terminal or in a notebook; elsewhere, lines.

    When the load is done, the bar becomes one line that says what it took.

    Parameters
    ----------
    file : text file, optional
        By default standard error; a process without one (``pythonw``) shows nothing.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file: TextIO | None = sys.stderr if file is None else file
        self._is_default = file is None
        self._screen: TerminalBar | NotebookBar | _Lines | None = None
        self._model, self._verb = "", "Loading"
        self._is_opening = False

    @classmethod
    def wanted(cls) -> list[Bar]:
        """Return a new bar, or none if the environment forbids bars."""
        return [] if are_bars_disabled() else [cls()]

    def begin(self, model: str, verb: str) -> None:
        """Choose the name that is shown: as much of the model's as tells it from those of other bars."""
        self._forget_name()
        self._model, self._verb = _claim_name(model, self), verb

    def open(self, model: str, report: ProgressReport) -> None:
        """Show what a call waits for before it knows what there is to do; `begin` comes afterwards."""
        if not self._is_opening:
            self.begin(model, "Opening")
            self._is_opening = True
        self._show(report)

    def close_opening(self) -> None:
        """End the bar as it is, unless a load goes on with it."""
        if self._is_opening:
            self.end(None)

    def __call__(self, report: ProgressReport) -> None:
        """Show a report of a load."""
        if report.phase != "start":
            self._show(report)
        elif not self._is_opening or isinstance(self._screen, _Lines):  # others go on from there
            with self._ignoring_closed_file():
                self._close()
        self._is_opening = False

    def _show(self, report: ProgressReport) -> None:
        if self._file is None:
            return
        with self._ignoring_closed_file():
            if self._screen is None:
                if report.cache_only and report.time_elapsed < _CACHED_DELAY:
                    return
                self._screen = self._open(self._file, replace(report, model=self._model))
            self._screen.show(replace(report, model=self._model))

    def end(self, summary: Summary | None) -> None:
        """End the bar: with a summary, or, after a failure, as it is."""
        self._forget_name()
        self._is_opening = False
        with self._ignoring_closed_file():
            if summary is None or self._file is None:
                self._close()
            elif self._screen is None:
                self._print(self._file, summary_line(summary, self._model))
            else:
                screen, self._screen = self._screen, None
                screen.finish(summary_line(summary, self._model))

    def _forget_name(self) -> None:
        if _names_in_use.get(self._model) is self:
            del _names_in_use[self._model]

    def _close(self) -> None:
        if self._screen is not None:
            screen, self._screen = self._screen, None
            screen.close()

    @contextmanager
    def _ignoring_closed_file(self) -> Iterator[None]:
        """Show nothing more if the file cannot be written (closed, full, no reader): that must not end the load."""
        try:
            yield
        except (OSError, ValueError):
            self._file = None
            if self._screen is not None:
                self._screen.abandon()
                self._screen = None

    def _open(self, file: TextIO, report: ProgressReport) -> TerminalBar | NotebookBar | _Lines:
        if self._is_default and is_notebook(file):
            return NotebookBar(report)
        if not can_redraw(file):
            return _Lines(file, self._verb)
        if not take_terminal(file):
            return _Lines(file, self._verb, CLEAR_LINE)
        from .screens import TerminalBar  # imports tqdm, which loads without a bar do not need

        return TerminalBar(file, report)

    def _print(self, file: TextIO, line: str) -> None:
        """Print a line without a bar, on a terminal above the bars of others."""
        if self._is_default and is_notebook(file):
            show_line(line)
        elif not can_redraw(file):
            _print(file, line)
        elif not take_terminal(file):
            _print(file, CLEAR_LINE + line)
        else:
            from tqdm import tqdm

            leave_terminal(file)
            tqdm.write(line, file=file)
            getattr(file, "flush", bool)()


def _claim_name(model: str, bar: Bar) -> str:
    """Return the last part of a name, or as many as no other bar shows now."""
    if not model:
        return model
    parts = model.split("/")
    names = ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    numbered = (f"{parts[-1]} ({number})" for number in itertools.count(2))
    # `setdefault` is one operation: two threads do not get the same name.
    return next(name for name in itertools.chain(names, numbered) if _names_in_use.setdefault(name, bar) is bar)


class _Lines:
    """Lines of a log: each 10 percent, or after 5 seconds; of a load from cache, only after 5 seconds.

    Parameters
    ----------
    file : text file
    verb : str
    before : str
        Goes before each line.
    """

    _PERCENT, _SECONDS = 10, 5.0

    def __init__(self, file: TextIO, verb: str, before: str = "") -> None:
        self._file = file
        self._before = before
        self._verb = verb
        self._percent = -self._PERCENT
        self._time = 0.0
        self._waiting: str | None = None

    def show(self, report: ProgressReport) -> None:
        """Print a line if it is time to."""
        percent = report.bytes_done * 100 // report.bytes_total if report.bytes_total else int(report.progress * 100)
        is_due = report.time_elapsed - self._time >= self._SECONDS
        is_known = report.shards_total > 0  # until then, the model is being opened, which seldom takes long
        is_due |= is_known and report.waiting not in (None, self._waiting)
        if is_known and not report.cache_only and percent < 100:  # the summary has the end
            is_due |= percent - self._percent >= self._PERCENT
        if is_due:
            self._percent, self._time, self._waiting = percent, report.time_elapsed, report.waiting
            _print(self._file, self._before + log_line(report, self._verb))

    def finish(self, line: str) -> None:
        """Print the last line."""
        _print(self._file, self._before + line)

    def close(self) -> None:
        """Do nothing: the lines that were printed stay."""

    def abandon(self) -> None:
        """Do nothing."""


def _print(file: TextIO, line: str) -> None:
    print(line, file=file)
    getattr(file, "flush", bool)()  # may be missing, as isatty may
