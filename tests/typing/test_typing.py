"""Type checkers see what users write as it is meant."""

from __future__ import annotations

import importlib.resources
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ndcache import errors

from ..helpers.requirements import need_module

pytestmark = pytest.mark.once

SCRIPT = Path(__file__).with_name("user_script.py")

#: A line of a script, and the error that it is.
MISTAKES = {
    'ndcache.load("", max_worker=3)': "call-overload",
    'ndcache.load("", max_workers="3")': "call-overload",
    'ndcache.load("", device=3)': "call-overload",
    'ndcache.load("", verify="sometimes")': "call-overload",
    'ndcache.stream("", progres=True)': "call-overload",
    'ndcache.load("", into=[1])': "call-overload",
    'ndcache.fetch("", max_worker=3)': "call-overload",
    'ndcache.verify("", timeout="3")': "arg-type",
    "ndcache.Loader(ofline=True)": "call-arg",
    'ndcache.loda("")': "attr-defined",
}


def mypy(script: Path) -> str:
    """Check a script as a user would: in a folder of its own, with ndcache as it is installed."""
    need_module("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache", script.name]
    return subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=False).stdout


def test_a_users_script_has_the_types_that_it_says(tmp_path: Path) -> None:
    assert mypy(Path(shutil.copy(SCRIPT, tmp_path))).startswith("Success")


def test_mistakes_are_errors(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import ndcache\n" + "\n".join(MISTAKES))
    shown = mypy(script)
    found = re.findall(r"^script\.py:(\d+): error: .*\[([a-z-]+)\]$", shown, re.MULTILINE)
    assert {(int(line), code) for line, code in found} == set(enumerate(MISTAKES.values(), 2)), shown
    # Of overloads, older versions of mypy suggest nothing.
    assert len(re.findall(r'did you mean "(max_workers|progress|offline)"\?', shown)) >= 2, shown


def test_every_error_can_be_imported_by_its_name(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("".join(f"from ndcache import {name}\nprint({name}.__mro__)\n" for name in errors.__all__))
    assert mypy(script).startswith("Success")


def test_the_types_are_shipped() -> None:
    assert importlib.resources.files("ndcache").joinpath("py.typed").is_file()
