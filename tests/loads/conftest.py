"""Fixtures of tests of loads."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"
