"""The table of faults in docs/ names the files of its tests."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
TABLE = (ROOT / "docs" / "faults.rst").read_text("utf-8")


def rows() -> dict[int, str]:
    """Return the last column of each row, by the number of the row."""
    found = {}
    for item in re.split(r"\n   \* - ", TABLE)[2:]:
        number, *_, tests = re.split(r"\n     - ?", item.rstrip("\n"))
        found[int(number)] = " ".join(tests.split())
    return found


@functools.cache
def files_with_tests() -> dict[int, set[str]]:
    """Return, for each row, the files that have tests named after it."""
    found: dict[int, set[str]] = {}
    tests = Path(__file__).parent
    for path in sorted(tests.rglob("test_*.py")):
        name = path.relative_to(tests).with_name(path.stem.removeprefix("test_")).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and (match := re.match(r"test_row_(\d+)_", node.name)):
                found.setdefault(int(match[1]), set()).add(name)
    return found


def test_the_rows_are_numbered() -> None:
    assert list(rows()) == sorted(rows())
    assert set(rows()) >= set(range(1, 110))


@pytest.mark.parametrize("row", list(rows()))
def test_each_row_names_the_files_of_its_tests(row: int) -> None:
    assert rows()[row] == ", ".join(sorted(files_with_tests()[row]))


def test_every_row_that_tests_name_exists() -> None:
    assert files_with_tests().keys() <= rows().keys()
