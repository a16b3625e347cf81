"""Run commands in the tests' own process."""

from __future__ import annotations

from collections.abc import Callable

import click.testing

__all__ = ["new_runner"]


def new_runner() -> click.testing.CliRunner:
    """Return a runner that keeps output and errors apart, whatever the version of click."""
    runner: Callable[..., click.testing.CliRunner] = click.testing.CliRunner
    try:
        return runner(mix_stderr=False)
    except TypeError:  # since click 8.2, they are always apart
        return runner()
