"""Test that the examples run as they are, without arguments and without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache

from .helpers.models import random_array
from .helpers.requirements import need_module

_EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    """Run an example and return its standard output."""
    paths = [str(Path(ndcache.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(_EXAMPLES / name), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_examples_are_tested_and_short() -> None:
    tests = Path(__file__).read_text("utf-8")
    examples = sorted(_EXAMPLES.glob("*.py"))
    assert examples
    for path in examples:
        assert f'run("{path.name}"' in tests
        assert len(path.read_text("utf-8").splitlines()) <= 70


def test_plain_load() -> None:
    lines = run("plain_load.py").splitlines()
    assert lines[0].startswith("<Weights: 3 tensors")
    assert lines[1].split(maxsplit=2) == ["embedding", "float32", "(1000, 64)"]


def test_plain_load_of_a_url(tmp_path: Path, serve: Any) -> None:
    ndcache.dump({"x": random_array((3, 4), "int8")}, tmp_path)
    assert run("plain_load.py", serve(tmp_path).url).splitlines()[1].split(maxsplit=2) == ["x", "int8", "(3, 4)"]


@pytest.mark.once
@pytest.mark.usefixtures("gpu")  # to skip where there is none
def test_compute_pass() -> None:
    assert run("compute_pass.py").splitlines()[-1] == "the GPU and NumPy agree"


@pytest.mark.once
@pytest.mark.usefixtures("gpu")
def test_quantised_layer() -> None:
    assert run("quantised_layer.py").splitlines()[-3:] == [
        "layer.q_weight: uint32 (301, 124)",
        "layer.q_scale: float16 (301, 31)",
        "(3, 970) times (970, 301): 903 of 903 products are those of NumPy",
    ]


@pytest.mark.once
@pytest.mark.usefixtures("gpu")
def test_quantised_layer_of_a_url(tmp_path: Path, serve: Any) -> None:
    params = {"up.q_weight": random_array((70, 8), "uint32"), "up.q_scale": np.ones((70, 2), np.float16)}
    ndcache.dump({**params, "down.q_weight": random_array((3, 4), "uint32")}, tmp_path)
    lines = run("quantised_layer.py", serve(tmp_path).url, "up").splitlines()
    assert lines[-1] == "(3, 64) times (64, 70): 210 of 210 products are those of NumPy"


@pytest.mark.once
def test_quantised_layer_without_the_name_of_a_layer_explains_itself() -> None:
    with pytest.raises(AssertionError, match="Usage::"):
        run("quantised_layer.py", "https://127.0.0.1:9/model/")


@pytest.mark.once
@pytest.mark.usefixtures("gpu")
def test_gpu_of_each_worker() -> None:
    need_module("distributed")
    first, *others = run("gpu_of_each_worker.py").splitlines()
    assert first == "the model is on 1 node(s)"
    assert others == ["1 tensors of 120,000 bytes on GPUDevice"] * 2


@pytest.mark.once
@pytest.mark.usefixtures("gpu")
def test_gpu_of_each_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    need_module("ray")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # Ray's sockets need a short path
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        lines = run("gpu_of_each_actor.py").splitlines()
    assert lines[-2:] == ["the model is on 1 node(s)", "1 tensors of 120,000 bytes on GPUDevice"]
