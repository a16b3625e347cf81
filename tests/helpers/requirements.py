"""What some tests need beyond ndcache's own dependencies: skipped on a user's machine, required where all must run."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest


def need_module(name: str) -> ModuleType:
    """The imported module; without it the test is skipped, or fails where NDCACHE_TEST_REQUIRE_ALL is set."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        _missing(f"the module {name} cannot be imported: {error}")


def need_program(name: str) -> str:
    """The program's path."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")
    return path or _missing(f"the program {name} is not installed")


def need_file(distribution: str, name: str) -> Path:
    """A file that a distribution installs, by its name; the distribution itself is not imported."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        _missing(f"the distribution {distribution} is not installed")
    for file in files:
        if file.name == name and (path := Path(str(file.locate()))).is_file():
            return path
    _missing(f"the distribution {distribution} has no file {name}")


def _missing(reason: str) -> NoReturn:
    if os.environ.get("NDCACHE_TEST_REQUIRE_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)
