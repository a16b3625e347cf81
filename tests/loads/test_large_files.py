"""Files that are larger than a segment: they are obtained once, staged by segments, and never given out unverified."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import ndcache
from ndcache.devices import segments
from ndcache.devices.cpu import CpuDevice, CpuUpload
from ndcache.devices.gpu.device import GpuDevice
from ndcache.devices.gpu.upload import GpuUpload
from ndcache.sources.local import LocalModel

from ..helpers import models
from ..helpers.devices import BufferWatch, assert_tensors
from ..helpers.loads import Serve, flip, loading_threads, wait_until

SEGMENT = 8192
#: Records with nothing, with less than a word, with a segment and a bit, and with many segments.
SIZES: list[tuple[int, ...]] = [(30_001,), (3,), (0,), (2048,), (100, 77), (5,), (), (2049,), (0, 4), (4, 4096), (700,)]

Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "segment_bytes", SEGMENT)
    monkeypatch.setattr(GpuDevice, "segment_bytes", SEGMENT)


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest) -> Any:
    return request.param if request.param == "cpu" else request.getfixturevalue("gpu")


def write_large(model: Path, *, encoding: str = "raw", shuffle: bool = False, md5: bool = True) -> Arrays:
    """Write a model of a large file, a small one, and another large one; return its tensors."""
    arrays = {f"t{n}": models.random_array(shape, seed=n) for n, shape in enumerate(3 * SIZES)}
    names = list(arrays)
    files = [names[: len(SIZES)], names[len(SIZES) : len(SIZES) + 3], names[len(SIZES) + 3 :]]
    manifest = models.write_model(
        model, [{name: arrays[name] for name in file} for file in files], encoding=encoding, gap=b"x", md5=md5
    )
    if shuffle:
        for shard in manifest["records"]:
            random.Random(0).shuffle(shard["records"])
        (model / "tensor-cache.json").write_text(json.dumps(manifest))
        order = [record["name"] for shard in manifest["records"] for record in shard["records"]]
        arrays = {name: arrays[name] for name in order}
    if encoding == "f32-to-bf16":
        arrays = {name: models.through_bf16(array) for name, array in arrays.items()}
    return arrays


def one_large(model: Path, tensors: int = 8, nbytes: int = SEGMENT) -> Arrays:
    """Write a model of one file, each of whose tensors is a segment on the CPU."""
    arrays = {f"t{n}": models.random_array((nbytes // 4,), seed=n) for n in range(tensors)}
    models.write_model(model, [arrays])
    return arrays


# --- the same tensors from everywhere


def from_directory(model: Path, serve: Serve, **options: Any) -> Iterator[Any]:
    yield model, options


def from_server(model: Path, serve: Serve, **options: Any) -> Iterator[Any]:
    server = serve(model)
    yield server.url, options
    assert len(server.shard_requests()) == 3, "each file is fetched once"
    yield server.url, options
    yield server.url, {**options, "verify": "always"}
    assert len(server.shard_requests()) == 3


def held_in_memory(model: Path, serve: Serve, **options: Any) -> Iterator[Any]:
    yield serve(model).url, {**options, "cache_dir": os.devnull + "/cache"}


def beside_helpers(model: Path, serve: Serve, **options: Any) -> Iterator[Any]:
    yield serve(model).url, {**options, "processes": 2}


@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
@pytest.mark.parametrize("shuffle", [False, pytest.param(True, marks=pytest.mark.once)], ids=["in order", "shuffled"])
@pytest.mark.parametrize("source", [from_directory, from_server, held_in_memory, beside_helpers])
@pytest.mark.filterwarnings("ignore:what is fetched from .* is not kept:RuntimeWarning")
def test_every_layout_from_every_source(
    tmp_path: Path,
    serve: Serve,
    device: Any,
    encoding: str,
    shuffle: bool,
    source: Callable[..., Iterator[tuple[Any, dict[str, Any]]]],
) -> None:
    arrays = write_large(tmp_path / "model", encoding=encoding, shuffle=shuffle)
    for location, options in source(tmp_path / "model", serve):
        for limit in (1, 5 * SEGMENT, 1 << 20):
            with ndcache.load(location, device, memory_limit=limit, **options) as weights:
                assert_tensors(weights, arrays)
                assert (weights.stats.shards, weights.stats.tensors) == (3, len(arrays))
        assert_tensors(dict(ndcache.stream(location, device, **options)), arrays)


@pytest.mark.parametrize("md5", [True, False])
def test_some_tensors_of_a_large_file(tmp_path: Path, serve: Serve, device: Any, md5: bool) -> None:
    arrays = {f"t{n}": models.random_array((1 << 18,), seed=n) for n in range(8)}
    models.write_model(tmp_path / "model", [arrays], gap=b"x", md5=md5)
    server = serve(tmp_path / "model")
    chosen = {name: arrays[name] for name in ("t1", "t2", "t6")}
    with ndcache.load(server.url, device, names=list(chosen)) as weights:
        assert_tensors(weights, chosen)
    assert server.shard_requests()
    assert weights.stats.nbytes < 4 << 20, "the rest of the file is a hole"
    server.requests.clear()
    for location in (server.url, tmp_path / "model"):
        with ndcache.load(location, device, names=list(chosen)) as weights:
            assert_tensors(weights, chosen)
    assert server.shard_requests() == []


def test_a_mirror_gives_a_large_file(tmp_path: Path, serve: Serve, device: Any) -> None:
    arrays = write_large(tmp_path / "model")
    server, mirror = serve(tmp_path / "model"), serve(tmp_path / "model")
    server.status = {"/params_shard_0.bin": 404}
    with ndcache.load(server.url, device, mirrors=[mirror.url]) as weights:
        assert_tensors(weights, arrays)
    assert len(mirror.shard_requests()) >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
def test_each_segment_maps_its_part_of_the_file(tmp_path: Path) -> None:
    arrays = one_large(tmp_path, 6, 2 * SEGMENT)
    tensors = dict(ndcache.stream(tmp_path))
    del tensors["t1"], tensors["t4"]
    gc.collect()
    with open("/proc/self/maps") as maps:
        sizes = [
            int(end, 16) - int(start, 16)
            for line in maps
            if line.rstrip().endswith("params_shard_0.bin")
            for start, end in [line.split()[0].split("-")]
        ]
    # Neighbours may be mapped next to each other, and are then one line.
    assert sum(sizes) == 4 * 2 * SEGMENT
    assert_tensors(tensors, {name: arrays[name] for name in tensors})


def test_files_that_cannot_be_mapped_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = write_large(tmp_path, shuffle=True)
    monkeypatch.setattr("ndcache.devices.cpu._MAX_MAPS", 3)  # of three files, but more segments
    with ndcache.load(tmp_path) as weights:
        assert_tensors(weights, arrays)


# --- progress, order, memory


def test_a_file_counts_when_its_last_tensor_is_placed(tmp_path: Path, device: Any) -> None:
    arrays = write_large(tmp_path)
    reports: list[ndcache.ProgressReport] = []
    done_after = []
    for name, _ in ndcache.stream(tmp_path, device, progress=reports.append):
        done_after.append((name, reports[-1].shards_done))
    counts = [sum(1 for _, done in done_after if done == shards) for shards in range(3)]
    assert counts == [len(SIZES), 3, len(arrays) - len(SIZES) - 3]
    assert [report.text.partition("]")[0].partition("[")[2] for report in reports[1:]] == ["0/3", "1/3", "2/3", "3/3"]
    assert (reports[-1].progress, reports[-1].bytes_done) == (1.0, ndcache.read_manifest(tmp_path).nbytes)


@pytest.mark.parametrize("limit", [SEGMENT, 3 * SEGMENT, 8 * SEGMENT])
def test_the_memory_limit_holds_within_a_file(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(segments, "_MIN_SEGMENT_BYTES", SEGMENT)
    arrays = {"w": models.random_array((100 * SEGMENT // 4,))}
    models.write_model(tmp_path, [arrays], gap=b"x")
    watch = BufferWatch(gpu, monkeypatch)
    with ndcache.load(tmp_path, gpu, memory_limit=limit) as weights:
        assert_tensors(weights, arrays)
        assert weights.stats.peak_bytes_in_flight <= limit
    staging = [buffer for buffer in watch.made if buffer.usage & 2]  # MAP_WRITE
    assert sum(buffer.size for buffer in staging) <= limit + limit // 8
    assert sum(buffer.size == arrays["w"].nbytes for buffer in watch.made) == 1


@pytest.mark.filterwarnings("ignore:what is fetched from .* is not kept:RuntimeWarning")
def test_a_file_in_memory_counts_as_a_whole(tmp_path: Path, serve: Serve) -> None:
    arrays = {f"t{n}": models.random_array((SEGMENT // 4,), seed=n) for n in range(12)}
    names = list(arrays)
    models.write_model(tmp_path / "model", [{name: arrays[name] for name in names[n : n + 6]} for n in (0, 6)])
    url, nowhere = serve(tmp_path / "model").url, os.devnull + "/cache"
    for limit, peak in ((7 * SEGMENT, 6 * SEGMENT), (SEGMENT, 6 * SEGMENT), (13 * SEGMENT, 12 * SEGMENT)):
        with ndcache.load(url, cache_dir=nowhere, memory_limit=limit) as weights:
            assert_tensors(weights, arrays)
            assert weights.stats.peak_bytes_in_flight == peak
    with ndcache.load(url, memory_limit=3 * SEGMENT) as weights:
        assert weights.stats.peak_bytes_in_flight == 3 * SEGMENT


def test_nothing_of_a_segment_is_kept_while_the_next_is_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_MIN_SEGMENT_BYTES", SEGMENT)
    arrays = {f"t{n}": models.random_array((SEGMENT // 4,), seed=n) for n in range(12)}
    models.write_model(tmp_path, [arrays], encoding="f32-to-bf16")  # two tensors in each segment
    staged: list[weakref.ref[Any]] = []
    alive: list[int] = []
    original = CpuUpload.stage

    def stage(*arguments: Any) -> Any:
        alive.append(sum(reference() is not None for reference in staged))
        made = original(*arguments)
        staged.extend(map(weakref.ref, made))
        return made

    monkeypatch.setattr(CpuUpload, "stage", stage)
    for _name, array in ndcache.stream(tmp_path, memory_limit=1):
        del array
    assert alive == [0] * 6


# --- workers


def test_segments_that_wait_for_their_file_hold_no_worker(tmp_path: Path, serve: Serve) -> None:
    large = {f"t{n}": models.random_array((SEGMENT // 4,), seed=n) for n in range(6)}
    small = {"small": models.random_array((10,))}
    models.write_model(tmp_path / "model", [large, small])
    server = serve(tmp_path / "model")
    server.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(ndcache.load, server.url, max_workers=2)
        wait_until(lambda: len(server.shard_requests()) == 2)
        server.gate.set()
        assert_tensors(loading.result(60), large | small)


@pytest.mark.parametrize("call", [CpuUpload, GpuUpload], ids=["cpu", "gpu"])
def test_several_workers_stage_one_file(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    if call is CpuUpload:
        device, arrays = "cpu", one_large(tmp_path, 4)
    else:
        device, arrays = request.getfixturevalue("gpu"), one_large(tmp_path, 1, 4 * SEGMENT)
    together, original = threading.Barrier(4), call.stage

    def stage(*arguments: Any) -> Any:
        together.wait(60)
        return original(*arguments)

    monkeypatch.setattr(call, "stage", stage)
    with ndcache.load(tmp_path, device) as weights:
        assert_tensors(weights, arrays)


def test_a_file_that_another_load_downloads_is_waited_for(tmp_path: Path, serve: Serve) -> None:
    arrays = one_large(tmp_path / "model")
    server = serve(tmp_path / "model")
    server.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(ndcache.load, server.url, max_workers=workers) for workers in (1, 4)]
        wait_until(lambda: len(server.shard_requests()) == 1)
        server.gate.set()
        for loading in loads:
            assert_tensors(loading.result(60), arrays)
    assert len(server.shard_requests()) == 1


# --- what is wrong is never given out


@pytest.mark.parametrize("how", ["download", "always", "directory"])
def test_nothing_of_a_file_with_a_wrong_digest_is_yielded(tmp_path: Path, serve: Serve, device: Any, how: str) -> None:
    arrays = write_large(tmp_path / "model")
    good = list(arrays)[: len(SIZES) + 3]
    source: Any = tmp_path / "model"
    if how == "download":
        source = serve(tmp_path / "model").url
        flip(tmp_path / "model" / "params_shard_2.bin")
    elif how == "directory":
        flip(tmp_path / "model" / "params_shard_2.bin")
    else:
        server = serve(tmp_path / "model")
        directory = ndcache.fetch(server.url)
        source = server.url
        flip(directory / "params_shard_2.bin")
        flip(tmp_path / "model" / "params_shard_2.bin")
    options: dict[str, Any] = {"retries": 0, "verify": "download" if how == "download" else "always"}
    seen = []
    with pytest.raises(ndcache.ChecksumError):
        for name, _ in ndcache.stream(source, device, **options):
            seen.append(name)
    assert seen == good[: len(seen)]
    with pytest.raises(ndcache.ChecksumError):
        ndcache.load(source, device, **options)


def test_a_file_that_shrinks_between_two_segments_is_refused(tmp_path: Path, device: Any) -> None:
    one_large(tmp_path, 40)
    tensors = ndcache.stream(tmp_path, device, max_workers=1, memory_limit=1)
    next(tensors)
    os.truncate(tmp_path / "params_shard_0.bin", 5)
    with pytest.raises(ndcache.SizeMismatchError, match="5 bytes"):
        list(tensors)


# --- ends


@pytest.mark.parametrize("how", ["close", "drop", "cancel", "raise"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_stream_ends_in_the_middle_of_a_file(
    tmp_path: Path, serve: Serve, device: Any, how: str, cached: bool
) -> None:
    one_large(tmp_path / "model", 40)
    source = serve(tmp_path / "model").url
    if cached:
        ndcache.fetch(source)
    cancel = threading.Event()
    tensors: Any = ndcache.stream(source, device, cancel=cancel, memory_limit=4 * SEGMENT)
    next(tensors)
    if how == "close":
        tensors.close()
    elif how == "drop":
        del tensors
    elif how == "cancel":
        cancel.set()
        with pytest.raises(ndcache.CancelledError):
            list(tensors)
    else:
        with pytest.raises(ZeroDivisionError):
            tensors.throw(ZeroDivisionError)
    assert not loading_threads()  # and no file is open, as for every test


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_other_segments_wait(tmp_path: Path, serve: Serve, device: Any) -> None:
    arrays = one_large(tmp_path / "model", 10)
    server = serve(tmp_path / "model")
    server.gate.clear()

    def press() -> None:
        wait_until(lambda: bool(server.shard_requests()))
        signal.raise_signal(signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        ndcache.load(server.url, device)
    presser.join()
    assert not loading_threads()
    server.gate.set()
    with ndcache.load(server.url, device) as weights:
        assert_tensors(weights, arrays)


@pytest.mark.parametrize("failing", [0, 3, 7])
def test_an_error_in_any_segment_closes_the_file(
    tmp_path: Path, device: Any, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    one_large(tmp_path, 8)
    for kind in (CpuUpload, GpuUpload):
        original = kind.stage

        def stage(upload: Any, file: Any, segment: Any, original: Any = original) -> Any:
            if segment.records[0].name == f"t{failing}":
                raise ZeroDivisionError
            return original(upload, file, segment)

        monkeypatch.setattr(kind, "stage", stage)
    with pytest.raises(ZeroDivisionError):
        ndcache.load(tmp_path, device)


def test_a_file_is_closed_once_its_last_segment_is_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_large(tmp_path, 8)
    opened: list[Any] = []
    obtain = LocalModel.obtain

    def obtain_and_note(*arguments: Any) -> Any:
        opened.append(obtain(*arguments))
        return opened[-1]

    monkeypatch.setattr(LocalModel, "obtain", obtain_and_note)
    with closing(ndcache.stream(tmp_path, max_workers=2)) as tensors:  # type: ignore[type-var]
        next(tensors)
        wait_until(lambda: opened[0].file.closed)  # while seven tensors are still to be taken
        assert len(list(tensors)) == 7
    assert len(opened) == 1


# --- real sizes


def sparse_model(directory: Path, sizes: list[int]) -> Arrays:
    """Write a model of one sparse file; each tensor of bytes begins and ends with random ones."""
    directory.mkdir(exist_ok=True)
    path, records, offset, edges = directory / "params_shard_0.bin", [], 1, {}
    with open(path, "wb") as file:
        for index, nbytes in enumerate(sizes):
            edges[f"t{index}"] = models.random_array((2 * 64,), "uint8", seed=index)
            for start, part in ((offset, edges[f"t{index}"][:64]), (offset + nbytes - 64, edges[f"t{index}"][64:])):
                file.seek(start)
                file.write(part.tobytes())
            item = {"name": f"t{index}", "shape": [nbytes], "dtype": "uint8", "format": "raw"}
            records.append({**item, "nbytes": nbytes, "byteOffset": offset})
            offset += nbytes
    shard = {"dataPath": path.name, "format": "raw-shard", "nbytes": offset, "records": records}
    (directory / "tensor-cache.json").write_text(json.dumps({"metadata": {}, "records": [shard]}))
    return edges


@pytest.fixture
def _real_segments(monkeypatch: pytest.MonkeyPatch, _small_segments: None) -> None:
    monkeypatch.setattr(CpuDevice, "segment_bytes", 64 << 20)
    monkeypatch.setattr(GpuDevice, "segment_bytes", 32 << 20)


@pytest.mark.once
@pytest.mark.usefixtures("_real_segments")
def test_a_record_of_a_gigabyte(tmp_path: Path, device: Any) -> None:
    edges = sparse_model(tmp_path, [1 << 30 if device == "cpu" else 1 << 27])
    with ndcache.load(tmp_path, device, memory_limit=64 << 20) as weights:
        array = np.asarray(weights["t0"])
        assert array[:64].tobytes() + array[-64:].tobytes() == edges["t0"].tobytes()
        assert not array[64:-64].any()


@pytest.mark.once
@pytest.mark.usefixtures("_real_segments")
def test_a_file_of_five_gigabytes(tmp_path: Path, device: Any) -> None:
    sizes = [1500 << 20, 40 << 20, 2500 << 20, 70 << 20, 1000 << 20, 33 << 20, 1 << 20]
    edges = sparse_model(tmp_path, sizes)
    names = [f"t{n}" for n, nbytes in enumerate(sizes) if device == "cpu" or nbytes <= 1 << 27]
    loaded = []
    for name, tensor in ndcache.stream(tmp_path, device, names=names, memory_limit=128 << 20):
        array = np.asarray(tensor)
        assert array[:64].tobytes() + array[-64:].tobytes() == edges[name].tobytes(), name
        loaded.append(name)
    assert loaded == names
