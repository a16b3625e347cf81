"""The widget of a bar in a Jupyter notebook, which tqdm draws by way of ipywidgets."""

from __future__ import annotations

import re
from typing import Any

from tqdm.notebook import IProgress, tqdm_notebook  # type: ignore[attr-defined]

from .lines import bar_parts
from .reports import ProgressReport

__all__ = ["WidgetBar"]


class WidgetBar(tqdm_notebook):  # type: ignore[type-arg]
    """A widget with the words of ndcache; the caller displays its `container`.

    Parameters
    ----------
    report : ProgressReport
    """

    monitor_interval = 0  # no monitor thread, which would outlive the load

    def __init__(self, report: ProgressReport) -> None:
        self._report = report
        super().__init__(total=report.bytes_total, display=False)
        left, _, right = self.container.children
        left.layout.flex = right.layout.flex = "none"  # the bar becomes short before a text is broken

    @staticmethod
    def can_be_drawn() -> bool:
        """Return whether ipywidgets is installed."""
        return IProgress is not None

    def format_meter(self, *_: Any, bar_format: str | None = None, **__: Any) -> str:  # type: ignore[override]
        """Return the texts beside the bar; for pages without widgets, they are all that is shown."""
        text = ("<bar/>" if "<bar/>" in (bar_format or "") else "  ").join(bar_parts(self._report))
        # tqdm makes other spaces as wide as digits, so that they would part numbers from their units.
        return re.sub(r"(?<! ) (?! )", "\xa0", text)

    def show(self, report: ProgressReport) -> None:
        """Draw a report."""
        if report.bytes_total != self.total:  # it was not known before the model was open
            self.reset(report.bytes_total)
        self._report, self.n = report, report.bytes_done
        self.display(check_delay=False)

    def close(self) -> None:
        """Remove the widget, and all its parts, from the page and from the memory of the kernel."""
        if not self.disable:
            self.leave, self.total = False, None  # or tqdm takes a load that has failed for one to be shown in red
            super().close()
            for part in (self.container, *self.container.children):
                for each in (getattr(part, "style", None), part.layout, part):
                    if each is not None:
                        each.close()
