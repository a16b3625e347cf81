"""Shards mapped without descriptors, and read instead where file systems or limits allow no mapping."""

from __future__ import annotations

import errno
import gc
import json
import logging
import mmap
import os
import platform
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache.files.mapping import map_file

from ..helpers import models
from ..helpers.models import assert_same
from ..helpers.processes import run_script
from ..helpers.servers import FileServer

Serve = Callable[..., FileServer]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is open and mapped")
#: The number of mmap, for the filter, by processor.
_MMAP = {"x86_64": 9, "aarch64": 222}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    return tmp_path / "file"


def maps_of(path: Path) -> int:
    with open("/proc/self/maps") as maps:
        return sum(line.rstrip().endswith(str(path)) for line in maps)


@pytest.mark.parametrize("writable", [False, True])
def test_a_part_of_a_file_is_mapped(tmp_path: Path, writable: bool) -> None:
    data = os.urandom(3 * mmap.ALLOCATIONGRANULARITY + 5)
    (tmp_path / "file").write_bytes(data)
    with open(tmp_path / "file", "rb") as opened:
        array = map_file(opened, mmap.ALLOCATIONGRANULARITY + 5, 2 * mmap.ALLOCATIONGRANULARITY, writable=writable)
    assert array.tobytes() == data[2 * mmap.ALLOCATIONGRANULARITY :]
    assert array.flags.writeable is writable


@linux_only
def test_a_mapping_holds_no_descriptor_and_ends_with_its_last_array(file: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with open(file, "rb") as opened:
        array = map_file(opened, 1 << 14)
    assert len(os.listdir("/proc/self/fd")) == before
    assert maps_of(file) == 1
    view, other = array[256:512].view(np.uint32), array.data
    del array
    gc.collect()
    assert view.tobytes() == bytes(range(256))
    del view
    gc.collect()
    assert maps_of(file) == 1
    assert bytes(other[:256]) == bytes(range(256))
    del other
    gc.collect()
    assert maps_of(file) == 0


def test_a_mapping_cannot_be_made_writeable(file: Path) -> None:
    with open(file, "rb") as opened:
        array = map_file(opened, 1 << 14)
    for each in (array, array[7:9], array.view(np.float64)):
        assert not each.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            each.flags.writeable = True
    assert array.data.readonly


@linux_only
def test_writing_to_a_private_mapping_does_not_reach_the_file(file: Path) -> None:
    before = file.read_bytes()
    descriptors = len(os.listdir("/proc/self/fd"))
    with open(file, "rb") as opened:
        array = map_file(opened, 1 << 14, writable=True)
        other = map_file(opened, 1 << 14)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    array[:] = 255
    array[5000:].view(np.uint32)[3] = 7
    assert file.read_bytes() == before == other.tobytes()
    assert maps_of(file) == 2
    del array
    gc.collect()
    assert maps_of(file) == 1


def test_a_pipe_cannot_be_mapped(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as pipe, open(writer, "wb"), pytest.raises((OSError, ValueError)):
        map_file(pipe, 10)


def run(script: str, *args: object) -> Any:
    """Run a script in a process of its own, and return its variable `result`."""
    whole = "import json, sys\nimport numpy as np\nimport ndcache\n" + textwrap.dedent(script)
    return json.loads(run_script(f"{whole}\nprint(json.dumps(result))", *args))


#: Makes the kernel refuse shared mappings with an error of this number, as some file systems do.
OTHERS = (errno.EACCES, errno.ENOMEM, errno.EINVAL, errno.EPERM)
ONCE = pytest.mark.once
REFUSE_MAPS = """
import ctypes, struct
def refuse_maps(system_call, number):
    steps = [
        (0x20, 0, 0, 0),                    # load the system call's number
        (0x15, 0, 3, system_call),          # mmap? if not, allow it
        (0x20, 0, 0, 16 + 8 * 3),           # load its flags
        (0x45, 0, 1, 1),                    # MAP_SHARED? if not, allow it
        (0x06, 0, 0, 0x00050000 | number),  # this error
        (0x06, 0, 0, 0x7FFF0000),           # allowed
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(kept := ctypes.create_string_buffer(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
"""


@linux_only
@pytest.mark.skipif(platform.machine() not in _MMAP, reason="the filter is written for two processors")
@pytest.mark.parametrize("number", [errno.ENODEV, *(pytest.param(number, marks=ONCE) for number in OTHERS)])
def test_row_56_shards_that_cannot_be_mapped_are_read(model: Path, serve: Serve, number: int) -> None:
    arrays = models.simple_model(model)
    server = serve(model)
    script = """
        import logging, mmap
        logs = []
        logging.getLogger("ndcache").setLevel(logging.DEBUG)
        logging.getLogger("ndcache").addHandler(logging.StreamHandler(type("", (), {"write": logs.append})))
        ndcache.fetch(sys.argv[2])
        refuse_maps(int(sys.argv[3]), int(sys.argv[4]))
        try:
            with open(sys.argv[1] + "/params_shard_0.bin", "rb") as file:
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            refused = 0
        except OSError as error:
            refused = error.errno
        loads = [
            ndcache.load(sys.argv[1]),
            ndcache.load(sys.argv[1], copy=True),
            dict(ndcache.stream(sys.argv[1])),
            ndcache.load(sys.argv[2]),
            ndcache.load(sys.argv[2], cache_dir=sys.argv[1] + "/new"),
        ]
        sums = [[float(array.sum()) for array in load.values()] for load in loads]
        writeable = [[array.flags.writeable for array in load.values()] for load in loads]
        result = [refused, sums, writeable, [line for line in logs if "cannot be mapped" in line]]
    """
    refused, sums, writeable, logs = run(
        REFUSE_MAPS + textwrap.dedent(script), model, server.url, _MMAP[platform.machine()], number
    )
    assert refused == number
    assert sums == [[float(array.sum()) for array in arrays.values()]] * 5
    assert writeable == [[is_copy] * 4 for is_copy in (False, True, False, False, False)]
    assert 5 <= len(logs) <= 5 * 8  # a line for each load, or for each worker that began at the same time


def test_row_56_a_mapping_that_fails_is_logged_once(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arrays = models.simple_model(model, shards=20)

    def refuse(*_: object, **__: object) -> Any:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr("ndcache.devices.cpu.map_file", refuse)
    with caplog.at_level(logging.DEBUG, "ndcache"):
        assert_same(ndcache.load(model, max_workers=1), arrays)
    (record,) = (record for record in caplog.records if "mapped" in record.getMessage())
    assert record.levelno == logging.DEBUG
    assert os.strerror(errno.ENODEV) in record.getMessage()


@linux_only
def test_row_56_no_address_space_for_a_mapping_or_an_array_is_a_memory_error(tmp_path: Path) -> None:
    """The error says what there is no memory for."""
    nbytes = 1 << 30
    model = tmp_path / "model"
    models.simple_model(model, shards=1)
    manifest = json.loads((model / "tensor-cache.json").read_text())
    (shard,) = manifest["records"]
    shard["nbytes"] = shard["records"][0]["nbytes"] = nbytes
    shard["records"][0]["shape"] = [nbytes // 4]
    del shard["md5sum"]
    (model / "tensor-cache.json").write_text(json.dumps(manifest))
    os.truncate(model / "params_shard_0.bin", nbytes)
    script = """
        import resource
        ndcache.read_manifest(sys.argv[1])
        limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (1 << 29)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            ndcache.load(sys.argv[1], max_workers=1)
            result = None
        except MemoryError as error:
            result = str(error)
    """
    assert run(script, model) == f"no memory for the {nbytes:,} bytes of params_shard_0.bin"


@linux_only
def test_shards_beyond_the_limit_of_mappings_are_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ndcache.devices.cpu._MAX_MAPS", 3)
    arrays = models.simple_model(model)
    weights = ndcache.load(model)
    assert_same(weights, arrays)
    assert maps_of(model / "params_shard_0.bin") == 0
