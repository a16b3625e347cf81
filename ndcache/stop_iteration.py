"""A StopIteration of the caller's code, on its way through generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def delivered() -> Iterator[None]:
    """Around what uses such a generator: the StopIteration is raised as what it is."""
    try:
        yield
    except Carried as carrier:
        raise carrier.error from carrier.error.__cause__
