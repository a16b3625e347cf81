"""Ask for what a test needs beyond ndcache's own dependencies.

Where it is missing, the test is skipped; it fails if NDCACHE_TEST_REQUIRE_ALL is set.
"""

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
    """Import a module and return it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        _missing(f"the module {name} cannot be imported: {error}")


def need_cuda() -> ModuleType:
    """Import PyTorch and return it, with all GPUs of CUDA initialised; there must be one."""
    torch = need_module("torch")
    if not torch.cuda.is_available():
        _missing("PyTorch finds no GPU of CUDA")
    for index in range(torch.cuda.device_count()):
        torch.zeros(1, device=index)
    return torch


def need_program(name: str) -> str:
    """Return the path of a program."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")
    return path or _missing(f"the program {name} is not installed")


def need_s3rver() -> Path:
    """Return the path of npm's s3rver: NDCACHE_TEST_S3RVER has the directory into which npm has installed it."""
    program = Path(os.environ.get("NDCACHE_TEST_S3RVER", ""), "node_modules", "s3rver", "bin", "s3rver.js")
    if not program.is_file():
        _missing(f"npm's s3rver is not installed at {program}: see CONTRIBUTING.rst")
    need_program("node")
    return program


def need_file(distribution: str, name: str) -> Path:
    """Return the path of a file, given by name, that a distribution installs; the distribution is not imported."""
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
    pytest.skip(reason, allow_module_level=True)
