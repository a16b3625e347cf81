"""The code keeps to sizes in which a reader finds the way: see CONTRIBUTING.rst."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import ndcache

pytestmark = pytest.mark.once

PACKAGE = Path(ndcache.__file__).parent
FOLDERS = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
FILES = sorted(PACKAGE.rglob("*.py"))

MOST_MODULES = 14
#: The root also has the public modules.
MOST_MODULES_IN_THE_ROOT = 24
MOST_METHODS = 25
MOST_LINES_OF_A_FUNCTION = 50
MOST_LINES_OF_A_FILE = 450


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix()


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _lines_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or 0) - docstring.lineno + 1
    return lines


@pytest.mark.parametrize("folder", FOLDERS, ids=_name)
def test_a_folder_has_few_modules(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= (MOST_MODULES_IN_THE_ROOT if folder == PACKAGE else MOST_MODULES)


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_a_file_fits_in_the_head(file: Path) -> None:
    text = file.read_text("utf-8")
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    tree = ast.parse(text)
    for function in _functions(tree):
        assert _lines_without_docstring(function) <= MOST_LINES_OF_A_FUNCTION, function.name
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
            assert len(methods) <= MOST_METHODS, node.name


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Importing ``ndcache.load.x`` would replace the function ``ndcache.load`` by a module."""
    functions = {name for name in ndcache.__all__ if inspect.isfunction(getattr(ndcache, name))}
    reserved = {*functions, "convert", "utils", "helpers"}
    names = {path.stem for path in FILES} | {folder.name for folder in FOLDERS}
    assert "load" in functions
    assert names & reserved == set()
