"""Files without a digest: `stream` yields the tensors that are there while the rest is downloaded."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import ndcache
import ndcache.torch
from ndcache.devices import segments
from ndcache.devices.cpu import CpuDevice, CpuUpload
from ndcache.devices.gpu.device import GpuDevice
from ndcache.devices.torch.cpu import TorchCpuDevice
from ndcache.export.pieces import PieceDevice, PieceUpload
from ndcache.sources.downloads import download
from ndcache.store.directory import ModelDirectory

from ..helpers import models
from ..helpers.devices import assert_tensors, stop
from ..helpers.loads import loading_threads, wait_until
from ..helpers.requirements import need_module
from ..helpers.servers import Connection, Request, ScriptedServer, reply
from ..helpers.tensor_files import write_files

SEGMENT = 8192

Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (CpuDevice, GpuDevice, TorchCpuDevice, PieceDevice):
        monkeypatch.setattr(kind, "segment_bytes", SEGMENT)


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest) -> Any:
    return request.param if request.param == "cpu" else request.getfixturevalue("gpu")


@dataclass
class Origin:
    """One large file on a server, each tensor of which is a segment. The file stops in its middle until `go` is set.

    Attributes
    ----------
    url : str
        Of the model.
    arrays : dict of str to array
    data : bytes
        The file.
    etag : str or None
    headers : dict of str to str
        More headers of its responses.
    breaks_off : bool
        Whether the first response ends when `go` is set. The next ones do not stop.
    """

    url: str
    arrays: Arrays
    data: bytes
    etag: str | None = '"1"'
    headers: dict[str, str] = field(default_factory=dict)
    breaks_off: bool = False
    go: threading.Event = field(default_factory=threading.Event)
    ranges: list[str | None] = field(default_factory=list)

    def __call__(self, connection: Connection, request: Request) -> None:
        if request.headers.get("if-none-match") == '"1"':  # the header of a safetensors file
            connection.send(reply(304, headers={"ETag": '"1"'}))
            return
        asked = request.headers.get("range")
        is_same = request.headers.get("if-range") in (None, self.etag)
        start, end, headers = 0, len(self.data), dict(self.headers)
        if self.etag is not None:
            headers["ETag"] = self.etag
            if asked is not None and is_same:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, end = int(first), int(last) + 1
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(self.data)}"
        self.ranges.append(asked)
        half, status = len(self.data) // 2, 206 if "Content-Range" in headers else 200
        with contextlib.suppress(OSError):
            connection.send(reply(status, b"", headers, length=end - start) + self.data[start : min(end, half)])
            if end > half:
                self.go.wait(60)
                if not (self.breaks_off and len(self.ranges) == 1):
                    connection.send(self.data[max(start, half) : end])


def write(directory: Path, kind: str, seed: int = 0) -> tuple[Path, Arrays]:
    """Write a model of one file with 8 segments; `kind` is ``"NDArray"``, ``"md5"`` or ``"safetensors"``."""
    arrays = {f"t{n}": models.random_array((SEGMENT // 4,), seed=seed + n) for n in range(8)}
    if kind == "safetensors":
        (path,) = write_files(directory, arrays, 1).values()
        return path, arrays
    models.write_model(directory, [arrays], md5=kind == "md5")
    return directory / "params_shard_0.bin", arrays


def origin(server: ScriptedServer, directory: Path, kind: str = "NDArray") -> Origin:
    """Serve a model; see `write`."""
    path, arrays = write(directory, kind)
    served = Origin(server.url, arrays, path.read_bytes())
    server.script[f"/{path.name}"] = [served]
    if kind == "safetensors":
        end, size = int.from_bytes(served.data[:8], "little") + 8, len(served.data)
        headers = {"ETag": '"1"', "Content-Range": f"bytes 0-{end - 1}/{size}"}
        server.script[f"/{path.name}"].insert(0, reply(206, served.data[:end], headers))
    else:
        server.script["/tensor-cache.json"] = [reply(200, (directory / "tensor-cache.json").read_bytes())]
    return served


def take(tensors: Iterator[tuple[str, Any]], count: int = 3) -> list[tuple[str, Any]]:
    return list(itertools.islice(tensors, count))


def part_bytes(cache_dir: Path) -> int:
    """Return the size of the partial file."""
    found = [path.stat().st_size for path in cache_dir.rglob("params_shard_0.bin.*") if path.suffix != ".json"]
    return sum(found)


@pytest.mark.parametrize("kind", ["NDArray", "safetensors", "md5"])
@pytest.mark.parametrize("in_ranges", [False, True], ids=["one connection", "ranges"])
def test_tensors_come_before_the_file_is_complete(
    tmp_path: Path, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, device: Any, kind: str, in_ranges: bool
) -> None:
    if in_ranges:
        monkeypatch.setattr(download, "RANGE_THRESHOLD", 0)
        monkeypatch.setattr(download, "RANGE_BYTES", (SEGMENT // 2, SEGMENT // 2))
    served = origin(scripted, tmp_path / "model", kind)
    verify: Any = "never" if kind == "md5" else "download"
    tensors = ndcache.stream(served.url, device, verify=verify)
    first = take(tensors)
    assert len(first) == 3
    served.go.set()
    assert_tensors(dict(first + list(tensors)), served.arrays)
    assert (len(served.ranges) > 8) == in_ranges
    requests = len(served.ranges)
    assert_tensors(ndcache.load(served.url, verify=verify), served.arrays)
    assert len(served.ranges) == requests, "it was published"


def test_a_file_of_usual_size_comes_in_segments(
    tmp_path: Path, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuDevice, "segment_bytes", 64 << 20)
    monkeypatch.setattr(segments, "_FIRST_SEGMENT_BYTES", SEGMENT)
    served, staged, stage = origin(scripted, tmp_path / "model"), list[int](), CpuUpload.stage
    tensors = ndcache.stream(served.url)
    first = take(tensors)
    served.go.set()
    assert_tensors(dict(first + list(tensors)), served.arrays)

    def note(upload: Any, file: Any, segment: Any) -> Any:
        staged.append(len(segment.records))
        return stage(upload, file, segment)

    monkeypatch.setattr(CpuUpload, "stage", note)
    assert_tensors(dict(ndcache.stream(served.url)), served.arrays)
    assert staged == [8], "a cached file is one segment"


@pytest.mark.parametrize("kind", ["NDArray", "safetensors"])
def test_a_file_is_converted_while_it_comes(
    tmp_path: Path, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    served, stage, were_early = origin(scripted, tmp_path / "model", kind), PieceUpload.stage, list[bool]()

    def note(upload: Any, file: Any, segment: Any) -> Any:
        were_early.append(segment.is_early)
        served.go.set()
        return stage(upload, file, segment)

    monkeypatch.setattr(PieceUpload, "stage", note)
    ndcache.convert(served.url, tmp_path / "out.npz")
    assert were_early[0]
    assert_tensors(dict(np.load(tmp_path / "out.npz")), served.arrays)


@pytest.mark.parametrize("options", [{"max_workers": 1}, {"processes": 2}, {"cache_dir": os.devnull + "/cache"}])
@pytest.mark.filterwarnings("ignore:what is fetched from .* is not kept:RuntimeWarning")
def test_other_options(tmp_path: Path, scripted: ScriptedServer, options: Any) -> None:
    served = origin(scripted, tmp_path / "model")
    tensors = ndcache.stream(served.url, names=["t0", "t2", "t3", "t5", "t6"], **options)
    first = take(tensors)
    served.go.set()
    chosen = {name: served.arrays[name] for name in ("t0", "t2", "t3", "t5", "t6")}
    assert_tensors(dict(first + list(tensors)), chosen)


@pytest.mark.torch
@pytest.mark.parametrize("copy", [False, True])
def test_tensors_of_torch_can_be_written_to(tmp_path: Path, scripted: ScriptedServer, copy: bool) -> None:
    need_module("torch")
    served = origin(scripted, tmp_path / "model")
    tensors = ndcache.torch.stream(served.url, copy=copy)
    first = take(tensors)
    assert_tensors(dict(first), dict(take(iter(served.arrays.items()))))
    for _, tensor in first:
        tensor.zero_()
    served.go.set()
    assert len(list(tensors)) == 5
    assert not any(np.asarray(tensor).any() for _, tensor in first)
    assert_tensors(ndcache.load(served.url), served.arrays)


@pytest.mark.parametrize("how", ["md5", "the server's"])
def test_nothing_is_yielded_before_a_digest_is_compared(
    tmp_path: Path, scripted: ScriptedServer, cache_dir: Path, device: Any, how: str
) -> None:
    served = origin(scripted, tmp_path / "model", "md5" if how == "md5" else "NDArray")
    if how == "the server's":
        served.headers = {"X-Linked-Etag": '"' + hashlib.sha256(served.data).hexdigest() + '"'}
    half, staged = len(served.data) // 2, served.data[-1:]
    served.data = served.data[:-1] + bytes([staged[0] ^ 1])
    tensors = ndcache.stream(served.url, device, retries=0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, tensors)
        try:
            wait_until(lambda: part_bytes(cache_dir) == half)
            assert not waiting.done()
        finally:
            served.go.set()
        with pytest.raises(ndcache.ChecksumError):
            waiting.result(60)


def test_no_more_is_staged_than_the_memory_limit_allows(
    tmp_path: Path, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, staged, stage = origin(scripted, tmp_path / "model"), list[str](), CpuUpload.stage

    def note(upload: Any, file: Any, segment: Any) -> Any:
        staged.append(segment.records[0].name)
        return stage(upload, file, segment)

    monkeypatch.setattr(CpuUpload, "stage", note)
    tensors = ndcache.stream(served.url, memory_limit=2 * SEGMENT)
    taken = [next(tensors)]
    wait_until(lambda: len(staged) == 2)
    served.go.set()
    for tensor in tensors:
        taken.append(tensor)
        assert len(staged) <= len(taken) + 1
    assert_tensors(dict(taken), served.arrays)


# --- what goes wrong


@pytest.mark.parametrize("etag", ['"1"', None], ids=["ETag", "no ETag"])
def test_row_110_a_connection_that_breaks_off(
    tmp_path: Path, scripted: ScriptedServer, device: Any, etag: str | None
) -> None:
    served = origin(scripted, tmp_path / "model")
    served.etag, served.breaks_off = etag, True
    tensors = ndcache.stream(served.url, device)
    first = take(tensors)
    served.go.set()
    assert_tensors(dict(first + list(tensors)), served.arrays)
    half, end = len(served.data) // 2, len(served.data) - 1
    assert served.ranges == [None, None if etag is None else f"bytes={half}-{end}"]
    assert_tensors(ndcache.load(served.url), served.arrays)


def test_row_110_the_connection_breaks_off_for_good(tmp_path: Path, scripted: ScriptedServer, device: Any) -> None:
    served = origin(scripted, tmp_path / "model")
    served.breaks_off = True
    tensors, into = ndcache.stream(served.url, device, retries=0), list[Any]()
    into += take(tensors)
    served.go.set()
    with pytest.raises(ndcache.TruncatedError):
        into += tensors
    assert_tensors(dict(into), {name: served.arrays[name] for name, _ in into})


@pytest.mark.parametrize("is_same", [True, False], ids=["same", "other"])
def test_row_110_another_process_publishes_the_file(
    tmp_path: Path, scripted: ScriptedServer, cache_dir: Path, is_same: bool
) -> None:
    served = origin(scripted, tmp_path / "model")
    tensors = ndcache.stream(served.url)
    first = take(tensors)
    (manifest,) = cache_dir.rglob("tensor-cache.json")
    cache = ModelDirectory(manifest.parent)
    with cache.partials.create("params_shard_0.bin") as partial:
        partial.write(served.data if is_same else served.data[::-1])
        content_id = f"tensor-cache.json {hashlib.sha256(manifest.read_bytes()).hexdigest()}"
        cache.publish(partial, "params_shard_0.bin", content_id=content_id).close()  # and removes other partial files
    served.go.set()
    if is_same:
        assert_tensors(dict(first + list(tensors)), served.arrays)
    else:
        with pytest.raises(ndcache.RemoteChangedError, match="had been given out"):
            list(tensors)


@pytest.mark.parametrize("etag", ['"2"', None], ids=["ETag", "no ETag"])
@pytest.mark.parametrize("kind", ["NDArray", "safetensors"])
def test_row_111_a_file_that_changes_is_not_mixed(
    tmp_path: Path, scripted: ScriptedServer, device: Any, kind: str, etag: str | None
) -> None:
    served = origin(scripted, tmp_path / "model", kind)
    served.etag, served.breaks_off = None if etag is None else '"1"', True
    tensors, seen = ndcache.stream(served.url, device), list[Any]()
    seen += take(tensors)
    arrays, (other, _) = served.arrays, write(tmp_path / "other", kind, seed=99)
    served.data, served.etag = other.read_bytes(), etag
    served.go.set()
    with pytest.raises(ndcache.RemoteChangedError, match="had been given out") as caught:
        seen += tensors
    assert caught.value.shard in ("params_shard_0.bin", "model.safetensors")
    assert not caught.value.retryable
    assert_tensors(dict(seen), {name: arrays[name] for name, _ in seen})


def test_row_111_memory_of_the_callers_is_named(tmp_path: Path, scripted: ScriptedServer) -> None:
    served = origin(scripted, tmp_path / "model")
    served.breaks_off = True
    into = {name: np.full_like(array, np.nan) for name, array in served.arrays.items()}
    tensors = ndcache.stream(served.url, into=into)
    take(tensors)
    served.etag = '"2"'
    served.go.set()
    with pytest.raises(ndcache.RemoteChangedError) as caught:
        list(tensors)
    defined = [name for name in into if name not in caught.value.undefined]
    assert defined[:3] == ["t0", "t1", "t2"]
    assert "t7" in caught.value.undefined
    assert_tensors({name: into[name] for name in defined}, {name: served.arrays[name] for name in defined})


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", ["close", "cancel", "Ctrl-C"])
def test_row_112_the_next_call_continues_a_stream_that_ended(
    tmp_path: Path, scripted: ScriptedServer, device: Any, how: str
) -> None:
    served, cancel = origin(scripted, tmp_path / "model"), threading.Event()
    tensors: Any = ndcache.stream(served.url, device, cancel=cancel)
    assert len(take(tensors, 4)) == 4
    if how == "close":
        tensors.close()
    else:
        stopping = threading.Timer(0.05, stop, [how, cancel])
        stopping.start()
        with pytest.raises(KeyboardInterrupt if how == "Ctrl-C" else ndcache.CancelledError):
            next(tensors)
        stopping.join()
    assert not loading_threads()
    again = ndcache.stream(served.url, device)
    first = take(again)  # from what is there, before anything else comes
    half, end = len(served.data) // 2, len(served.data) - 1
    assert served.ranges == [None, f"bytes={half}-{end}"]
    served.go.set()
    assert_tensors(dict(first + list(again)), served.arrays)
