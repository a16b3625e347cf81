"""Test that ``python -m benchmarks`` runs: all contenders load the right bytes, and the figures have their form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .helpers.requirements import need_program

pytestmark = pytest.mark.once

_ROOT = Path(__file__).parent.parent


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Return the JSON of a run with tiny inputs."""
    written = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", str(written), *arguments],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, Any] = json.loads(written.read_text())
    return figures


@pytest.mark.parametrize(
    ("suite", "contenders"),
    [
        ("cold", ["ndcache load", "ndcache fetch", "four quarters", "one at a time, CPU"]),
        ("memory", ["fetch, small", "fetch, 8 times as large"]),
        ("warm-cpu", ["ndcache bf16", "one at a time bf16", "ndcache raw"]),
        ("import", ["import ndcache", "import requests, numpy"]),
    ],
)
def test_a_quick_run(tmp_path: Path, suite: str, contenders: list[str]) -> None:
    if suite in ("cold", "memory"):
        need_program("nginx")
    figures = run(tmp_path, suite)
    assert figures["quick"] is True
    assert {"cpu", "cores", "memory", "kernel", "python", "versions", "gpu", "commit"} <= figures["machine"].keys()
    (result,) = figures["suites"]
    assert result["suite"] == suite
    rows = {row["label"]: row for row in result["rows"]}
    # A contender that loads wrong bytes is left out, with the reason.
    assert set(contenders) <= rows.keys(), result["left_out"]
    assert not [reason for reason in result["left_out"].values() if "bytes instead of" in reason]
    for row in rows.values():
        assert len(row["seconds"]) == 1
        assert row["median"] == row["seconds"][0] > 0
        assert row["bytes"] > 0
    for target in result["targets"]:
        assert target["met"] in (True, False, None)


def test_an_unknown_suite() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "warm-gpo"], cwd=_ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no such suite: warm-gpo" in done.stderr
