"""Bars that tqdm draws on a terminal: it knows of all the bars of a process, others' included."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.std import Bar as Glyphs  # type: ignore[attr-defined]

from .lines import at_end, bar_line
from .reports import ProgressReport
from .terminal import leave_terminal

__all__ = ["TerminalBar"]

logger = logging.getLogger("ndcache")

#: Columns and rows where nobody tells the size of the terminal.
_COLUMNS, _ROWS = 79, 24


class TerminalBar(tqdm):  # type: ignore[type-arg]
    """A line on a terminal that this process has taken, with the words of ndcache.

    Parameters
    ----------
    file : text file
    report : ProgressReport
    """

    monitor_interval = 0  # no monitor thread, which would outlive the load
    # tqdm's own lock would stay locked if Ctrl-C came while it draws.
    _drawing = threading.RLock()

    def __init__(self, file: TextIO, report: ProgressReport) -> None:
        self._report = report
        is_measured = _has_size(file)
        columns, rows = (None, None) if is_measured else (_COLUMNS, _ROWS)
        super().__init__(
            file=file,
            total=report.bytes_total,
            leave=False,
            dynamic_ncols=is_measured,
            ncols=columns,
            nrows=rows,
        )
        self._log = _LinesAbove(self)
        logger.addHandler(self._log)

    def __str__(self) -> str:
        columns, ascii = (self.format_dict[key] for key in ("ncols", "ascii"))
        charset = Glyphs.ASCII if ascii else Glyphs.UTF
        return bar_line(
            self._report,
            columns or _COLUMNS,
            lambda fraction, width: format(Glyphs(min(fraction, 1.0), width, charset)),
            ".." if ascii else "…",
        )

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Draw the line again."""
        if not self.disable:
            with self._drawing:
                self.display()

    def show(self, report: ProgressReport) -> None:
        """Draw a report."""
        self._report, self.n = report, report.bytes_done
        self.refresh()

    def finish(self, line: str) -> None:
        """Put a line in the place of the bar."""
        self._leave()
        self.last_print_t = self.start_t  # or tqdm takes a bar that it has not updated itself for one never drawn
        super().close()
        with self._drawing:
            # tqdm leaves the cursor behind a bar that was not in the first line.
            self.write(f"\r{line}", file=self.fp)

    def close(self) -> None:
        """Leave the bar as it is, above those that follow."""
        if not self.disable:
            self._report = at_end(self._report)
            self.finish(str(self))

    def abandon(self) -> None:
        """Draw nothing more: the file cannot be written."""
        self._leave()
        self.disable = True
        self._decr_instances(self)  # type: ignore[attr-defined]

    def _leave(self) -> None:
        logger.removeHandler(self._log)
        leave_terminal(self.fp)


class _LinesAbove(logging.Handler):
    """Print log records above the bars if nobody else handles them: Python itself would print them into the bar.

    Parameters
    ----------
    bar : TerminalBar
    """

    def __init__(self, bar: TerminalBar) -> None:
        super().__init__(logging.WARNING)
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, unless another bar does."""
        mine = [each for each in logger.handlers if isinstance(each, _LinesAbove)]
        is_handled = len(logger.handlers) > len(mine) or (logger.propagate and logging.getLogger().handlers)
        if not is_handled and mine[:1] == [self] and logging.lastResort is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.write(record.getMessage(), file=self._bar.fp)


def _has_size(file: TextIO) -> bool:
    """Return whether the terminal knows its size. If it says 0 columns or rows, tqdm would draw bars of that size."""
    try:
        return min(os.get_terminal_size(file.fileno())) > 0
    except (OSError, ValueError, AttributeError):
        return False
