"""The state that the methods of a loader share."""

from __future__ import annotations

from ..options import LoaderOptions, Source
from ..processes.beside import HelperProcesses
from ..resources import LoaderResources

__all__ = ["LoaderBase"]


class LoaderBase:
    """Hold the options of a loader, and what its calls share.

    Parameters
    ----------
    options : LoaderOptions
    resources : LoaderResources
    """

    def __init__(self, options: LoaderOptions, resources: LoaderResources) -> None:
        self._options = options
        self._resources = resources

    def _helpers(self, source: Source) -> HelperProcesses:
        return HelperProcesses(source, self._options, self._resources.login.environ)
