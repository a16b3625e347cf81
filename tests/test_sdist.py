"""The source distribution holds all that its tests need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from .helpers.requirements import need_module

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
FOLDERS = ("ndcache", "tests", "docs", "examples", "benchmarks")
_LEAVE_OUT = shutil.ignore_patterns("__pycache__", "_build", ".*", "*.egg-info")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist from a copy, so that no list of files of an earlier build is used, and unpack it."""
    need_module("setuptools")
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=_LEAVE_OUT)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    shutil.copytree(ROOT / ".ci", source / ".ci")
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=source, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_every_file_is_in_it(unpacked: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "_build"} & set(path.parts)
    }
    expected |= {"setup.cfg", "setup.py", "tox.ini", "ruff.toml", "LICENSE", "README.rst", "CHANGELOG.rst", ".ci/run"}
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert expected - found == set()
    assert not [name for name in found if name.endswith((".pyc", ".so"))]


def test_its_tests_run(unpacked: Path) -> None:
    folders = ["tests/format/test_dtypes.py", "tests/location", "tests/test_faults.py", "tests/test_readme.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *folders],
        cwd=unpacked,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
