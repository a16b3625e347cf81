"""Carry a StopIteration of the caller's own code out of ndcache's generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

__all__ = ["WrappedStopIteration", "unwrap_stop_iteration", "wrap_stop_iteration"]


class WrappedStopIteration(BaseException):
    """Carry a StopIteration out of a generator, which would turn it into a RuntimeError (PEP 479).

    Attributes
    ----------
    error : StopIteration
    """

    def __init__(self, error: StopIteration) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def wrap_stop_iteration() -> Iterator[None]:
    """Wrap a StopIteration that the block raises. Use this in a generator."""
    try:
        yield
    except StopIteration as error:
        raise WrappedStopIteration(error) from None


class unwrap_stop_iteration:  # noqa: N801 - used as a function; a @contextmanager would itself be a generator
    """Raise the original StopIteration when the block, which uses a generator, raises `WrappedStopIteration`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, WrappedStopIteration):
            raise error.error from error.error.__cause__
