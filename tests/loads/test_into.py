"""Loads into memory of the caller's: from a server, from the cache, and loads that fail."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import ndcache
from ndcache.devices import cpu as cpu_module
from ndcache.devices.cpu import CpuUpload
from ndcache.devices.reading import check_size

from ..helpers import models
from ..helpers.loads import QUICK, Serve, assert_same, flip, loading_threads, scripted_model, wait_until
from ..helpers.servers import Connection, Request, ScriptedServer, reply, then_close

Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"


def filled_like(arrays: Mapping[str, np.ndarray[Any, Any]], byte: int = 0xAB) -> Arrays:
    """Return arrays of the same shapes and dtypes whose bytes are all the same."""
    filled = {name: np.empty_like(array) for name, array in arrays.items()}
    for array in filled.values():
        array.reshape(-1).view(np.uint8)[:] = byte
    return filled


def assert_written_or_undefined(into: Arrays, arrays: Arrays, error: BaseException) -> tuple[str, ...]:
    """Assert that everything is written but what the error names; return these names."""
    undefined: tuple[str, ...] = getattr(error, "undefined", ())
    assert [name for name in into if name in undefined] == list(undefined)
    for name in into.keys() - set(undefined):
        assert into[name].tobytes() == arrays[name].tobytes(), name
    return undefined


def test_a_cold_and_a_warm_load(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model, shards=5)
    server = serve(model)
    for requests in (6, 7):  # cold, then one for the manifest
        into = filled_like(arrays)
        weights = ndcache.load(server.url, into=into)
        assert_same(weights, arrays)
        assert all(weights[name] is array for name, array in into.items())
        assert weights.nbytes == sum(array.nbytes for array in arrays.values())
        assert len(server.requests) == requests
        weights.close()
        assert_same(into, arrays)  # the memory is the caller's


@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("may_map", [True, False])
def test_some_tensors_of_each_shard(
    model: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, decode: bool, copy: bool, may_map: bool
) -> None:
    names = [f"t{n}" for n in range(9)]
    arrays = {name: models.random_array((n, 5), "float16" if n == 4 else "float32", n) for n, name in enumerate(names)}
    shards = [{name: arrays[name] for name in part} for part in (names[:4], names[4:5], names[5:])]
    models.write_model(model, shards, encoding=encoding, gap=b"x")
    expected = {name: array.copy() for name, array in ndcache.load(model, decode=decode).items()}
    into = filled_like({name: expected[name] for name in ("t8", "t0", "t4", "t1", "t2", "t5")})
    if not may_map:
        monkeypatch.setattr(cpu_module, "_MAX_MAPS", 0)
    weights = ndcache.load(model, into=into, decode=decode, copy=copy)
    assert_same(weights, expected)
    for name, array in weights.items():
        assert (array is into[name]) if name in into else not any(np.shares_memory(array, own) for own in into.values())
        assert array.flags.writeable or not copy
    into = filled_like(into)
    streamed = dict(ndcache.stream(model, into=into, decode=decode, copy=copy))
    assert_same(streamed, expected)
    assert all(streamed[name] is array for name, array in into.items())


@pytest.mark.parametrize("values", [1, 99, 100, 101, 350])
def test_bfloat16_is_expanded_in_pieces(model: Path, monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    monkeypatch.setattr("ndcache.devices.reading._EXPANDED_AT_ONCE", 100)
    models.write_model(model, [{"t": models.random_array((values,))}], encoding="f32-to-bf16", gap=b"x")
    into = {"t": np.zeros(values, np.float32)}
    assert_same(ndcache.load(model, into=into), dict(ndcache.load(model)))


def test_bytes_beside_a_tensor_stay(model: Path) -> None:
    array = models.random_array((7,), "uint8")
    models.write_model(model, [{"t": array}])
    base = np.full(20, 0xAB, np.uint8)
    ndcache.load(model, into={"t": base[5:12]})
    assert base.tobytes() == b"\xab" * 5 + array.tobytes() + b"\xab" * 8


def test_weights_can_be_loaded_again_in_place(model: Path) -> None:
    first = models.simple_model(model)
    weights = ndcache.load(model, copy=True)
    assert_same(weights, first)
    second = {name: array + 1 for name, array in first.items()}
    models.write_model(model, [{name: array} for name, array in second.items()])
    again = ndcache.load(model, into=weights)
    assert_same(again, second)
    assert_same(weights, second)


def test_names_select_what_into_may_hold(model: Path, serve: Serve) -> None:
    arrays = {f"t{n}": models.random_array((1 << 14,), seed=n) for n in range(40)}
    models.write_model(model, [arrays])
    server = serve(model)
    into = filled_like({"t7": arrays["t7"], "t8": arrays["t8"]})
    weights = ndcache.load(server.url, names=["t8", "t7", "t30"], into=into)
    assert_same(weights, {name: arrays[name] for name in ("t7", "t8", "t30")})
    assert all("range" in request.headers for request in server.shard_requests())
    with pytest.raises(ValueError, match=r"into\['t7'\] is for a tensor that is not loaded$"):
        ndcache.load(server.url, names="t9", into=into)


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_the_process_grows_by_no_tensor(model: Path, encoding: str) -> None:
    models.write_model(model, [{"t": np.zeros(16 << 20, np.float32)}], encoding=encoding)
    models.write_model(model.parent / "small", [{"t": np.zeros(16, np.float32)}], encoding=encoding)
    script = (
        "import ndcache, numpy, sys\n"
        "def peak(): return int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) << 10\n"
        "ndcache.load(sys.argv[2], into={'t': numpy.ones(16, numpy.float32)})\n"
        "into = {'t': numpy.ones(16 << 20, numpy.float32)}\n"
        "before = peak()\n"
        "assert ndcache.load(sys.argv[1], into=into)['t'].any() == False\n"
        "print(peak() - before)"
    )
    arguments = [sys.executable, "-c", script, str(model), str(model.parent / "small")]
    output = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True).stdout
    assert int(output) < 24 << 20  # the result of `any` has 16 MiB; the tensor has 64


# --- memory that does not fit


@pytest.mark.parametrize("call", [ndcache.load, ndcache.stream])
@pytest.mark.parametrize(
    ("into", "kind", "message"),
    [
        ({"layer.1": np.zeros(3, np.float32)}, ValueError, "shape"),
        ({"layer.1": np.zeros(1 << 14, np.float16)}, ValueError, "dtype"),
        ({"layer.1": np.zeros(1 << 15, np.float32)[::2]}, ValueError, "contiguous"),
        ({"layer.1": b""}, TypeError, "is a bytes"),
        ({"layer.x": np.zeros(1 << 14, np.float32)}, ValueError, "did you mean 'layer.3'"),
        (dict.fromkeys(["layer.0", "layer.1"], np.zeros(1 << 14, np.float32)), ValueError, "overlap"),
        ([("layer.1", np.zeros(1 << 14, np.float32))], TypeError, "must be a mapping"),
    ],
    ids=["shape", "dtype", "contiguous", "no memory", "name", "overlap", "no mapping"],
)
def test_row_83_memory_that_does_not_fit_is_refused_before_any_shard_is_requested(
    model: Path, serve: Serve, call: Any, into: Any, kind: type[Exception], message: str
) -> None:
    models.simple_model(model)
    server = serve(model)
    with pytest.raises(kind, match=message) as caught:
        call(server.url, into=into)
    assert server.shard_requests() == []
    if isinstance(into, dict):
        assert getattr(caught.value, "undefined", None) == tuple(into)
        assert not any(np.any(memory) for memory in into.values() if isinstance(memory, np.ndarray))


# --- loads that fail


def test_row_84_a_download_that_ends_early_leaves_its_tensor_undefined(model: Path, scripted: ScriptedServer) -> None:
    arrays = scripted_model(scripted, model, shards=6)
    data = (model / "params_shard_3.bin").read_bytes()
    scripted.script["/params_shard_3.bin"] = [then_close(reply(200, data[:1000], length=len(data)))]
    into = filled_like(arrays)
    with pytest.raises(ndcache.TruncatedError) as caught:
        ndcache.load(scripted.url, into=into, max_workers=1, retries=QUICK)
    assert "layer.3" in assert_written_or_undefined(into, arrays, caught.value)
    back = pickle.loads(pickle.dumps(caught.value))
    assert (back.undefined, back.shard) == (caught.value.undefined, "params_shard_3.bin")


@pytest.mark.parametrize("call", ["load", "stream"])
def test_row_84_wrong_bytes_leave_the_tensor_as_it_was(model: Path, serve: Serve, call: str) -> None:
    arrays = models.simple_model(model, shards=6)
    flip(model / "params_shard_3.bin")
    into = filled_like(arrays)
    with pytest.raises(ndcache.ChecksumError) as caught:
        if call == "load":
            ndcache.load(serve(model).url, into=into, retries=QUICK)
        else:
            arrived = [name for name, _ in ndcache.stream(serve(model).url, into=into, retries=QUICK)]
            assert arrived  # nothing: the loop raises
    undefined = assert_written_or_undefined(into, arrays, caught.value)
    assert undefined[-3:] == ("layer.3", "layer.4", "layer.5")
    assert (into["layer.3"].view(np.uint8) == 0xAB).all()


def test_row_84_a_stream_names_what_it_has_not_yielded(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model, shards=6)
    server = serve(model)
    server.status["/params_shard_4.bin"] = 404
    server.gate.clear()
    into, arrived = filled_like(arrays), []
    with pytest.raises(ndcache.NotFoundError) as caught:
        for name, array in ndcache.stream(server.url, into=into, max_workers=1, progress=lambda _: server.gate.set()):
            arrived.append(name)
            assert array.tobytes() == arrays[name].tobytes()
    assert assert_written_or_undefined(into, arrays, caught.value) == tuple(arrays)[len(arrived) :]


def test_row_84_without_a_manifest_all_is_undefined(model: Path, serve: Serve) -> None:
    arrays = models.simple_model(model)
    server = serve(model.parent / "nothing")
    with pytest.raises(ndcache.NotFoundError) as caught:
        ndcache.load(server.url, into=filled_like(arrays))
    assert caught.value.undefined == tuple(arrays)
    with pytest.raises(ndcache.NotFoundError) as caught:
        ndcache.load(server.url)
    assert caught.value.undefined == ()


def test_row_84_a_local_file_that_shrinks_leaves_its_tensor_undefined(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = models.simple_model(model)

    def cut(file: Any, segment: Any) -> None:
        check_size(file, segment)
        if segment.shard.data_path == "params_shard_2.bin":
            os.truncate(file.name, 1000)

    monkeypatch.setattr(cpu_module, "check_size", cut)
    into = filled_like(arrays)
    with pytest.raises(ndcache.SizeMismatchError) as caught:
        ndcache.load(model, into=into)
    assert "layer.2" in assert_written_or_undefined(into, arrays, caught.value)


@pytest.mark.parametrize("kind", [ZeroDivisionError, MemoryError, StopIteration, SystemExit])
def test_row_84_exceptions_of_the_callers_own_name_what_is_undefined(
    model: Path, serve: Serve, kind: type[BaseException]
) -> None:
    arrays = models.simple_model(model)

    def callback(report: ndcache.ProgressReport) -> None:
        if report.shards_done == 2:
            raise kind

    into = filled_like(arrays)
    with pytest.raises(kind) as caught:
        ndcache.load(serve(model).url, into=into, progress=callback)
    assert assert_written_or_undefined(into, arrays, caught.value) == ("layer.2", "layer.3")


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", ["cancel", "Ctrl-C"])
def test_row_85_a_load_that_is_stopped_names_what_is_undefined(model: Path, scripted: ScriptedServer, how: str) -> None:
    arrays = scripted_model(scripted, model, shards=5)
    cancel = threading.Event()

    def stop(connection: Connection, request: Request) -> None:
        if how == "cancel":
            cancel.set()
        else:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        connection.stall()

    scripted.script["/params_shard_3.bin"] = [stop]
    into = filled_like(arrays)
    with pytest.raises(ndcache.CancelledError if how == "cancel" else KeyboardInterrupt) as caught:
        ndcache.load(scripted.url, into=into, cancel=cancel, timeout=600, max_workers=2)
    assert "layer.3" in assert_written_or_undefined(into, arrays, caught.value)
    assert loading_threads() == []
    assert pickle.loads(pickle.dumps(caught.value)).undefined == getattr(caught.value, "undefined", None)


@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_row_85_nothing_is_written_after_the_call(model: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """A worker is in the middle of a tensor when the load fails: the call returns only when it has stopped."""
    arrays = {f"t{n}": models.random_array((1 << 12,), seed=n) for n in range(4)}
    models.write_model(model, [{name: array} for name, array in arrays.items()], encoding=encoding)
    reading, go_on = threading.Event(), threading.Event()
    original: Callable[..., Any] = CpuUpload.stage

    def stage(upload: CpuUpload, file: Any, segment: Any) -> Any:
        if segment.shard.data_path == "params_shard_2.bin":
            reading.set()
            go_on.wait(60)
        return original(upload, file, segment)

    def callback(report: ndcache.ProgressReport) -> None:
        if report.shards_done == 1:
            wait_until(reading.is_set)
            threading.Timer(0.2, go_on.set).start()
            raise ZeroDivisionError

    monkeypatch.setattr(CpuUpload, "stage", stage)
    into = filled_like(arrays)
    with pytest.raises(ZeroDivisionError) as caught:
        ndcache.load(model, into=into, progress=callback)
    after = {name: array.tobytes() for name, array in into.items()}
    assert go_on.is_set()
    assert loading_threads() == []
    assert "t2" in getattr(caught.value, "undefined", ())
    assert {name: array.tobytes() for name, array in into.items()} == after


@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_several_workers_read_a_large_tensor(model: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setattr("ndcache.devices.segments._MIN_SEGMENT_BYTES", 1 << 14)
    arrays = {"small": models.random_array((7,)), "large": models.random_array((50_001,)), "last": np.ones(5, np.int8)}
    models.write_model(model, [arrays], encoding=encoding, gap=b"x")
    parts = []
    original: Callable[..., Any] = CpuUpload.stage

    def stage(upload: CpuUpload, file: Any, segment: Any) -> Any:
        parts.append((segment.records[0].name, segment.part))
        return original(upload, file, segment)

    monkeypatch.setattr(CpuUpload, "stage", stage)
    expected = {name: array.copy() for name, array in ndcache.load(model, memory_limit=1).items()}
    assert [part for _, part in parts] == [None, None, None]  # views are not cut
    parts.clear()
    into = filled_like({"large": arrays["large"]})
    assert_same(ndcache.load(model, memory_limit=1, into=into), expected)
    large = sorted(part for name, part in parts if name == "large")
    assert len(large) > 5
    assert [start for start, _ in large[1:]] == [end for _, end in large[:-1]]
    assert (large[0][0], large[-1][1]) == (0, ndcache.read_manifest(model)["large"].nbytes)
