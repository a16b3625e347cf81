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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three scripts of users."""
    made = tmp_path_factory.mktemp("scripts")
    shutil.copy(SCRIPT, made)
    (made / "mistakes.py").write_text("import ndcache\n" + "\n".join(MISTAKES))
    names = "".join(f"from ndcache import {name}\nprint({name}.__mro__)\n" for name in errors.__all__)
    (made / "names.py").write_text(names)
    return made


@pytest.fixture(scope="module")
def shown(folder: Path) -> str:
    """Check the scripts as a user would: in a folder of their own, with ndcache as it is installed."""
    need_module("mypy")
    scripts = sorted(path.name for path in folder.glob("*.py"))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache", *scripts]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert f"checked {len(scripts)} source files" in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", [SCRIPT.name, "names.py"])
def test_scripts_have_the_types_that_they_say(folder: Path, shown: str, script: str) -> None:
    assert (folder / script).exists()
    assert script not in shown


def test_mistakes_are_errors(shown: str) -> None:
    found = re.findall(r"^mistakes\.py:(\d+): error: .*\[([a-z-]+)\]$", shown, re.MULTILINE)
    assert {(int(line), code) for line, code in found} == set(enumerate(MISTAKES.values(), 2)), shown
    # Of overloads, older versions of mypy suggest nothing.
    assert len(re.findall(r'did you mean "(max_workers|progress|offline)"\?', shown)) >= 2, shown


def test_the_types_are_shipped() -> None:
    assert importlib.resources.files("ndcache").joinpath("py.typed").is_file()
