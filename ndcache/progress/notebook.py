"""A bar in a Jupyter notebook: one output of the cell, which becomes one line at the end.

With ipywidgets, it is a widget, which tqdm draws. Without it, tqdm would print text, of which the notebook's file keeps
each step, and in which several bars at once cannot be told apart. So each report replaces the output instead.
"""

from __future__ import annotations

import html
import sys
import time
from typing import Any, TextIO

from .lines import at_end, bar_parts
from .reports import ProgressReport

__all__ = ["NotebookBar", "is_notebook", "show_line"]

#: The least seconds between two updates: each of them is a message to the page.
_SECONDS = 0.2


class NotebookBar:
    """A bar in the output of a cell. The notebook's file keeps only how it looked last.

    Parameters
    ----------
    report : ProgressReport
    """

    def __init__(self, report: ProgressReport) -> None:
        from .widget import WidgetBar  # imports ipywidgets, if it is installed

        self._report = report
        self._shown = time.monotonic()
        self._widget = WidgetBar(report) if WidgetBar.can_be_drawn() else None
        if self._widget is None:
            self._output = _display(_content(report), raw=True)
        else:
            self._output = _display(self._widget.container)

    def show(self, report: ProgressReport) -> None:
        """Draw a report."""
        self._report = report
        if (now := time.monotonic()) - self._shown < _SECONDS:
            return
        self._shown = now
        if self._widget is None:
            self._output.update(_content(report), raw=True)
        else:
            self._widget.show(report)

    def finish(self, line: str) -> None:
        """Put a line in the place of the bar."""
        self._output.update({"text/plain": line}, raw=True)
        if self._widget is not None:
            self._widget.close()

    def close(self) -> None:
        """Leave the last report in the place of the bar, without rate and time left."""
        self.finish("  ".join(bar_parts(at_end(self._report))))

    def abandon(self) -> None:
        """Do nothing: what was drawn stays."""


def show_line(line: str) -> None:
    """Show a line in the output of a cell. On standard error, it would look like an error."""
    _display({"text/plain": line}, raw=True)


def is_notebook(file: TextIO) -> bool:
    """Return whether a file is the standard error of a kernel of Jupyter, and not something in its place."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else getattr(ipython, "get_ipython", lambda: None)()
    is_redirected = type(file).__module__ in ("_io", "io", "codecs", "tempfile")
    return getattr(shell, "kernel", None) is not None and not is_redirected


def _display(content: object, **options: Any) -> Any:
    from IPython.display import display

    return display(content, display_id=True, **options)


def _content(report: ProgressReport) -> dict[str, str]:
    left, right = bar_parts(report)
    bar = f'<progress value="{report.progress:.4f}" style="flex:0 1 20em;min-width:4em"></progress>'
    # The bar becomes short before a text is cut.
    style = "display:flex;align-items:center;gap:1ch;font-family:monospace;white-space:pre"
    texts = [f"<span>{html.escape(text)}</span>" for text in (left, right)]
    return {"text/plain": f"{left}  {right}", "text/html": f'<div style="{style}">{bar.join(texts)}</div>'}
