"""What commands print in terminals of all kinds is what the snapshots have; see walk.py."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from ndcache.cli.commands import main

from ..helpers.servers import FileServer

if sys.platform == "win32":
    pytest.skip("terminals of POSIX", allow_module_level=True)

from . import walk

pytestmark = pytest.mark.once


def test_every_command_is_walked() -> None:
    walked = {step.partition(" ")[0] for step in walk.STEPS if step.endswith("--help")}
    assert walked - {"--help"} == main.commands.keys()


def test_what_is_printed_is_in_the_snapshots(serve: Callable[..., FileServer]) -> None:
    with walk.workplace() as directory:
        stalled = serve(directory / "m")
        stalled.stalled = walk.STALLED
        shown = walk.walk(serve(directory / "m").url, stalled.url, directory)
    for place, text in shown.items():
        expected = (walk.SNAPSHOTS / f"{place}.txt").read_text(encoding="utf-8")
        assert text == expected, f"{place}: look at what has changed, and run python -m tests.cli.walk"
