"""Test that ``python -m benchmarks`` runs: all contenders load the right bytes, and the figures have their form."""

from __future__ import annotations

import importlib.util
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


def run(tmp_path: Path, *arguments: str, **environ: str) -> tuple[dict[str, Any], str]:
    """Return the JSON of a run with tiny inputs, and what it printed."""
    written = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", str(written), *arguments],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT), **environ},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, Any] = json.loads(written.read_text())
    return figures, done.stdout


@pytest.mark.parametrize(
    ("suite", "contenders"),
    [
        ("cold", ["ndcache load", "ndcache fetch", "four quarters", "one at a time, CPU"]),
        ("tls", ["ndcache load", "four quarters"]),
        ("small", ["ndcache load, 8 workers", "ndcache load, 1 worker"]),
        ("memory", ["fetch, small", "fetch, 8 times as large"]),
        ("warm-cpu", ["ndcache bf16", "one at a time bf16", "ndcache raw"]),
        ("large-file", ["raw, 8 shards", "raw, one file", "bf16, 8 shards", "bf16, one file"]),
        ("rate", ["ndcache load, 8 workers", "one file, 8 workers"]),
        ("import", ["import ndcache", "import requests, numpy"]),
    ],
)
def test_a_quick_run(tmp_path: Path, suite: str, contenders: list[str]) -> None:
    if suite in ("cold", "tls", "small", "memory", "rate"):
        need_program("nginx")
    figures, _ = run(tmp_path, suite)
    assert figures["quick"] is True
    assert {"cpu", "cores", "memory", "kernel", "python", "versions", "gpu", "commit"} <= figures["machine"].keys()
    (result,) = figures["suites"]
    assert result["suite"] == suite
    rows = {row["label"]: row for row in result["rows"]}
    # A contender that loads wrong bytes is left out, with the reason.
    assert set(contenders) <= rows.keys(), result["left_out"]
    assert not [reason for reason in result["left_out"].values() if "bytes instead of" in reason]
    _check(result)


def test_the_suites_for_safetensors_files(tmp_path: Path) -> None:
    need_program("nginx")
    figures, _ = run(tmp_path, "safetensors")
    results = {result["suite"]: result for result in figures["suites"]}
    assert list(results) == ["safetensors-cold", "safetensors-warm"]
    for result in results.values():
        assert {"ndcache load", "ndcache load, copies"} <= {row["label"] for row in result["rows"]}
        _check(result)


def test_the_suites_for_many_cores(tmp_path: Path) -> None:
    need_program("nginx")
    figures, printed = run(tmp_path, "cold-many-cores", "processes", "--profile", "--only", "ndcache|process")
    results = {result["suite"]: result for result in figures["suites"]}
    assert list(results) == ["cold-many-cores", "cold-many-cores-tls", "processes", "processes-together"]
    plain, secure, processes, together = ({row["label"]: row for row in result["rows"]} for result in results.values())
    counts = {f"ndcache load, {count} workers" for count in (8, 16)} | {"ndcache load, 16, no digests"}
    assert counts <= plain.keys() & secure.keys()
    assert {f"ndcache load, processes={count}" for count in (1, 2, 4, "auto")} <= processes.keys()
    assert together.keys() == {"one process of 8 workers", "four processes of 8 workers"}
    for result in results.values():
        _check(result)
    assert "lock_wait_ms" in plain["ndcache load, 8 workers"]["profile"]
    assert "threads of ndcache load, 8 workers" in printed
    sent = results["processes-together"]["targets"][1]
    assert sent["label"] == "bytes sent / model"
    assert 1 <= sent["median"] < 1.5  # the model and its manifest, once


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("suites", "ours", "others"),
    [
        (("gpu", "gpu-bf16"), "ndcache wgpu", {"InstantTensor", "fastsafetensors", "Run:ai streamer"}),
        (("gpu-sizes",), "ndcache wgpu", {"ndcache CUDA", "InstantTensor", "safetensors prefetch"}),
        (("gpu-large-file",), "wgpu, one file", {"wgpu, 8 shards", "CUDA, 8 shards", "CUDA, one file"}),
        (("two-gpus",), "wgpu, two GPUs", {"wgpu, one GPU", "CUDA, one GPU", "CUDA, two GPUs"}),
        (("torch-cpu",), "NumPy, raw", {"torch, raw", "torch, bf16", "NumPy, bf16"}),
    ],
)
def test_the_suites_for_gpus(tmp_path: Path, suites: tuple[str, ...], ours: str, others: set[str]) -> None:
    """Peers that need CUDA, or are not installed, are left out, but each is named."""
    figures, printed = run(tmp_path, *suites)
    assert len(figures["suites"]) >= len(suites)
    for result in figures["suites"]:
        _check(result)
        rows = {row["label"]: row for row in result["rows"]}
        measured = [row for label, row in rows.items() if label.startswith(ours)]
        assert measured, result["left_out"]
        assert all(len(row["later"]) == 1 and row["later"][0] > 0 and row["peak"] > 0 for row in measured)
        assert others <= rows.keys() | result["left_out"].keys()
        assert not [reason for reason in result["left_out"].values() if "bytes instead of" in reason]
    assert "later s" in printed


@pytest.mark.usefixtures("gpu")
def test_a_contender_that_crashes_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os; os.abort()")
    figures, _ = run(
        tmp_path, "gpu", "--only", "wgpu|fast|page", PYTHONPATH=os.pathsep.join([str(tmp_path), str(_ROOT)])
    )
    (result,) = figures["suites"]
    assert [row["label"] for row in result["rows"]] == ["ndcache wgpu", "page cache (limit)"]
    assert result["left_out"] == {"fastsafetensors": "exit status -6"}


def test_settings_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (first,) = run(tmp_path / "first", "gpu", "--only", "page cache")[0]["suites"][0]["rows"]
    assert len(first["settings"]) >= 2
    assert first["setting"] == first["settings"][0]["setting"]
    chosen = str(tmp_path / "first" / "figures.json")
    figures, printed = run(tmp_path, "gpu", "--only", "page cache", "--settings", chosen)
    (second,) = figures["suites"][0]["rows"]
    assert (second["setting"], second["settings"]) == (first["setting"], [])
    assert f"setting of page cache (limit): {first['setting']}, without a comparison in this run" in printed


def test_the_time_is_up(tmp_path: Path) -> None:
    figures, _ = run(tmp_path, "large-file", "--minutes", "0.0001", "--rst", str(tmp_path / "tables.rst"))
    (result,) = figures["suites"]
    assert result["rows"] == []
    assert set(result["left_out"].values()) == {"the time was up"}


def test_the_suite_for_clusters(tmp_path: Path) -> None:
    need_program("nginx")
    figures, printed = run(tmp_path, "cluster")
    (result,) = figures["suites"]
    _check(result)
    labels = {row["label"] for row in result["rows"]}
    assert "one node, one connection" in labels
    for engine, label in (("distributed", "Dask, 2 nodes"), ("ray", "Ray, 2 nodes")):
        if importlib.util.find_spec(engine) is None:
            assert "No module named" in result["left_out"][label]
            continue
        assert label in labels, result["left_out"]
        (sent,) = (target for target in result["targets"] if target["label"] == f"{label}: bytes sent / model")
        assert 1 <= sent["median"] < 1.5  # the model and its manifest, once
        assert f"target: one node, one connection / {label}:" in printed


def test_the_fastest_setting_is_used(tmp_path: Path) -> None:
    need_program("nginx")
    need_program("curl")
    tables = tmp_path / "tables.rst"
    figures, printed = run(tmp_path, "tls", "--rst", str(tables))
    assert figures["machine"]["versions"].keys() >= {"curl", "nginx", "OpenSSL"}
    (curl,) = (row for row in figures["suites"][0]["rows"] if row["peer"] == "curl")
    settings = curl["settings"]
    assert len(settings) >= 3
    assert settings == sorted(settings, key=lambda setting: setting["seconds"])
    assert f"setting of curl --parallel: {settings[0]['setting']} (" in printed
    (line,) = (line for line in tables.read_text().splitlines() if line.startswith("curl --parallel  "))
    assert line.endswith(f"  {settings[0]['setting']}")


def test_programs_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    nginx = need_program("nginx")
    figures, printed = run(tmp_path, "tls", PATH=str(tmp_path), NGINX=nginx)
    (result,) = figures["suites"]
    assert result["left_out"]["curl --parallel"] == "curl is not installed"
    assert {row["label"] for row in result["rows"]} >= {"ndcache load", "four quarters"}
    assert "left out: curl --parallel (curl is not installed)" in printed
    assert "target: curl / ndcache load: not measured" in printed


def test_too_little_room_is_said(tmp_path: Path) -> None:
    need_program("nginx")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "cold-many-cores", "--size", "1000000GiB", "--folder", str(tmp_path)],
        cwd=_ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "GB free and this needs" in done.stdout


def _check(result: dict[str, Any]) -> None:
    """Check the form of one result of a quick run."""
    for row in result["rows"]:
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
