"""The CPU: views of mapped files, and arrays with memory of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ndcache
from ndcache.devices import cpu as cpu_module
from ndcache.devices.segments import Segment
from ndcache.stats import LoadStats

from ..helpers import models
from ..helpers.devices import SHAPES


def test_raw_tensors_are_read_only_views(tmp_path: Path) -> None:
    models.write_model(tmp_path, [{"raw": models.random_array((8,)), "half": models.random_array((8,), "float16")}])
    models.write_model(tmp_path / "bf16", [{"t": models.random_array((8,))}], encoding="f32-to-bf16")
    raw = ndcache.load(tmp_path)
    assert not raw["raw"].flags.writeable
    assert not raw["raw"].flags.owndata
    expanded = ndcache.load(tmp_path / "bf16")["t"]
    assert expanded.flags.writeable


@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_copies_own_their_memory(tmp_path: Path, encoding: str) -> None:
    arrays = {f"t{n}": models.random_array(shape, seed=n) for n, shape in enumerate(SHAPES)}
    models.write_model(tmp_path, [arrays], encoding=encoding, gap=b"x")
    expected = ndcache.load(tmp_path)
    for decode in (True, False):
        for name, array in ndcache.load(tmp_path, copy=True, decode=decode).items():
            assert array.flags.owndata, name
            assert array.flags.writeable, name
            assert not np.shares_memory(array, expected[name])
    for name, array in ndcache.load(tmp_path, copy=True).items():
        assert array.tobytes() == expected[name].tobytes(), name
    assert dict(ndcache.stream(tmp_path, copy=True))["t0"].flags.owndata


def test_mapped_shards_hold_no_descriptors(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    arrays = models.simple_model(tmp_path, shards=600, shard_bytes=8)
    script = (
        "import ndcache, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))\n"
        "weights = ndcache.load(sys.argv[1])\n"
        "print(len(weights), sum(float(a.sum()) for a in weights.values()))"
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)
    output = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    count, total = output.split()
    assert int(count) == 600
    assert float(total) == sum(float(array.sum()) for array in arrays.values())


def test_a_file_that_shrinks_before_it_is_mapped_is_refused(tmp_path: Path) -> None:
    models.simple_model(tmp_path, shards=1)
    (shard,) = ndcache.read_manifest(tmp_path).shards
    os.truncate(tmp_path / "params_shard_0.bin", 5)
    upload = cpu_module.CpuUpload(LoadStats(), decode=True, copy=False, may_map=True, into={})
    with open(tmp_path / "params_shard_0.bin", "rb") as file, pytest.raises(ndcache.SizeMismatchError):
        upload.stage(file, Segment(shard, shard.records, shard.nbytes))
