"""Say on which node of a cluster an error happened."""

from __future__ import annotations

from ..errors import NdcacheError

__all__ = ["on_node"]


def on_node(error: Exception, worker: str) -> Exception:
    """Return an error of a task, as an error of the call that names the worker."""
    if isinstance(error, NdcacheError):
        error.node = worker
        return error
    wrapped = NdcacheError(f"a task failed with {type(error).__name__}: {error}")
    wrapped.node = worker
    wrapped.__cause__ = error
    return wrapped
