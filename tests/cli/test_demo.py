"""Test the demonstration: it tells right values from wrong ones, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import ndcache
from ndcache.cli import commands as cli
from ndcache.cli import demo
from ndcache.devices import cpu
from ndcache.format import codec
from ndcache.format.writer import dump

SMALL: dict[str, Any] = {"size_mib": 3, "rate_mib": 256.0}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory in which this process and its children make their temporary directories."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(Path(ndcache.__file__).parents[1]))
    return folder


def test_three_loads_give_the_right_values(temporary: Path, cache_dir: Path) -> None:
    lines: list[str] = []
    reports: list[ndcache.ProgressReport] = []
    report = demo.run_demo("cpu", **SMALL, say=lines.append, progress=reports.append)
    assert report.ok
    one, eight, cached = report.loads
    assert (one.workers, eight.workers, cached.workers) == (1, 8, 8)
    nbytes = report.manifest.nbytes
    assert [load.stats.network_bytes for load in report.loads] == [nbytes, nbytes, 0]
    assert [load.stats.cache_bytes for load in report.loads] == [0, 0, nbytes]
    assert all(load.seconds > 0 for load in report.loads)
    assert [r.progress for r in reports].count(1.0) == 3
    assert re.fullmatch(r"made \d+ tensors, [34]\.\d MiB in \d shards", lines[0])
    assert list(temporary.iterdir()) == []
    assert not cache_dir.exists()


@pytest.mark.once
def test_the_values_are_right_on_the_gpu(temporary: Path, gpu: Any) -> None:
    report = demo.run_demo("gpu", **SMALL)
    assert report.ok
    assert {load.stats.tensors for load in report.loads} == {len(report.manifest)}


def test_model_is_shaped_like_a_quantised_one(tmp_path: Path) -> None:
    params = demo._make_params(40)
    manifest = dump(params, tmp_path / "model", shard_bytes=demo._SHARD_BYTES)
    assert {record.format for record in manifest.records} == {"f32-to-bf16"}
    assert manifest["model.layers.0.self_attn.qkv_proj.q_weight"].dtype == "uint32"
    assert manifest["model.layers.0.self_attn.qkv_proj.q_scale"].dtype == "float16"
    assert manifest["model.layers.0.input_layernorm.weight"].stored_dtype == "bfloat16"
    assert 32 << 20 <= manifest.nbytes <= 48 << 20
    assert len(manifest.shards) >= 3 * demo._WORKERS
    assert max(shard.nbytes for shard in manifest.shards) <= 2 << 20
    assert manifest.nbytes == demo._stored_bytes(params)


def test_model_is_always_the_same() -> None:
    first, second = demo._make_params(2), demo._make_params(2)
    assert list(first) == list(second)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_expected_values_are_rounded_as_ml_dtypes_does() -> None:
    values = np.random.default_rng(0).standard_normal(1 << 16, np.float32)
    ties = np.array([0x3F808000, 0x3F818000, 0x00008000, 0x80000000], np.uint32).view(np.float32)
    for array in (values, ties):
        rounded = array.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(demo._as_loaded(array).view(np.uint32), rounded.view(np.uint32))


def flip_one_bit(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = codec.decode_record

    def decode(record: Any, *data: Any) -> Any:
        values = right(record, *data)
        if record.name != wrong:
            return values
        values = values.copy()
        values.view(np.uint8).reshape(-1)[-1] ^= 1
        return values

    monkeypatch.setattr(cpu, "decode_record", decode)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.down_proj.q_weight"])
def test_a_wrong_value_is_found(temporary: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    flip_one_bit(monkeypatch, name)
    report = demo.run_demo("cpu", **SMALL)
    assert not report.ok
    assert [load.wrong for load in report.loads] == [(name,)] * 3


def test_proxies_and_offline_switches_are_hidden(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NDCACHE_OFFLINE", "1")
    before = dict(os.environ)
    assert demo.run_demo("cpu", **SMALL).ok
    assert dict(os.environ) == before


@pytest.mark.parametrize("wrong", [{"size_mib": 0}, {"rate_mib": 0.0}, {"rate_mib": float("nan")}, {"device": "tpu"}])
def test_wrong_arguments(temporary: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"positive|device"):
        demo.run_demo(**{"device": "cpu", **SMALL, **wrong})
    assert list(temporary.iterdir()) == []


# --- the command --------------------------------------------------------------------------------------

ARGUMENTS = ("demo", "--device", "cpu", "--size-mib", "3")


def test_command_prints_a_table(temporary: Path) -> None:
    command = [sys.executable, "-m", "ndcache", *ARGUMENTS, "--rate-mib", "256"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    header, one, eight, cached, _, verdict = result.stdout.splitlines()
    assert header.split() == ["loaded", "workers", "seconds", "MiB/s", "speed-up"]
    assert re.fullmatch(r"over the network +1 +[\d.]+ +[\d.,]+ +1.0x", one)
    assert re.fullmatch(r"over the network +8 +[\d.]+ +[\d.,]+ +[\d.]+x", eight)
    assert re.fullmatch(r"from the cache +8 +[\d.]+ +[\d.,]+ +[\d.]+x", cached)
    assert verdict.startswith("Every value of ")
    assert len(re.findall(r"^(?:Fetched|Loaded|Mapped) .* in \d+ shards", result.stderr, re.M)) == 3


def test_command_fails_when_a_value_is_wrong(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_one_bit(monkeypatch, "model.norm.weight")
    with pytest.raises(SystemExit) as exit_:
        cli.main([*ARGUMENTS, "--rate-mib", "256", "-q"])
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "error: 1 tensor not as generated: model.norm.weight\n"


@pytest.mark.once
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing_behind(temporary: Path, number: signal.Signals, status: int) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # children inherit that a signal is ignored
    command = [sys.executable, "-m", "ndcache", *ARGUMENTS, "--rate-mib", "0.01", "-q"]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 60
            # A partial file in the cache shows that a download has begun.
            while not list(temporary.glob("ndcache-demo-*/cache-1/*/*/.ndcache/parts/params_shard_*")):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.returncode == status, err
    assert err in ("interrupted\n", "terminated\n")
    assert list(temporary.iterdir()) == []
