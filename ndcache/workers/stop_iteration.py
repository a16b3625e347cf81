"""A StopIteration of the caller's code, on its way through generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

__all__ = ["Carried", "carried", "delivered"]


class Carried(BaseException):
    """Carries a StopIteration out of a generator, which would make a RuntimeError of it (PEP 479).

    Attributes
    ----------
    error : StopIteration
    """

    def __init__(self, error: StopIteration) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def carried() -> Iterator[None]:
    """Around what may raise StopIteration in a generator."""
    try:
        yield
    except StopIteration as error:
        raise Carried(error) from None


class delivered:  # noqa: N801 - used as a function, but one of contextlib's is a generator, too
    """Around what uses such a generator: the StopIteration is raised as what it is."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Carried):
            raise error.error from error.error.__cause__
