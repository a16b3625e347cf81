"""Traces: their events, and when they are written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.cli.commands import main
from ndcache.trace import Trace

from .helpers import models
from .helpers.servers import FileServer

Serve = Callable[..., FileServer]


def events(path: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]


def test_a_load_from_a_server(tmp_path: Path, serve: Serve) -> None:
    models.simple_model(tmp_path / "model", shards=6)
    server = serve(tmp_path / "model")
    path = tmp_path / "load.json"
    weights = ndcache.load(server.url, cache_dir=tmp_path / "cache", max_workers=3, trace=path)
    found = events(path)
    by_name = {name: [event for event in found if event["name"] == name] for name in {e["name"] for e in found}}
    for name in ("network", "publish", "read", "decode", "place"):
        files = {event["args"]["file"] for event in by_name[name]}
        assert files >= {shard.data_path for shard in weights.manifest.shards}, name
    assert len(by_name["request"]) == weights.stats.requests + server.probes
    assert len(by_name["manifest"]) == 1
    assert {"hash (s)", "write (s)"} <= by_name["network"][0]["args"].keys()
    assert sum(event["args"]["nbytes"] for event in by_name["network"]) >= weights.stats.nbytes
    # The threads.
    content = json.loads(path.read_text())["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in content if event["name"] == "thread_name"}
    assert {threads[event["tid"]] for event in by_name["wait"]} == {"MainThread"}
    assert all(threads[event["tid"]].startswith("ndcache") for event in by_name["read"] + by_name["decode"])
    # Events of one thread are nested or apart.
    for thread in threads:
        ends: list[float] = []
        for event in sorted((e for e in found if e["tid"] == thread), key=lambda e: (e["ts"], -e["dur"])):
            while ends and ends[-1] <= event["ts"] + 0.001:
                ends.pop()
            assert not ends or event["ts"] + event["dur"] <= ends[-1] + 0.002
            ends.append(event["ts"] + event["dur"])
    # The stats say the same.
    for phase in ("publish", "read", "decode", "finish"):
        total = sum(event["dur"] for event in by_name[phase]) / 1e6
        assert total == pytest.approx(weights.stats.seconds[phase], abs=1e-4)


def test_hashing_local_files_is_counted(tmp_path: Path) -> None:
    models.simple_model(tmp_path, shards=1)
    assert ndcache.load(tmp_path).stats.seconds["hash"] == 0
    assert ndcache.load(tmp_path, verify="always").stats.seconds["hash"] > 0


def test_a_load_outlives_its_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = models.simple_model(tmp_path / "model", shards=1)
    (tmp_path / "traces").mkdir()

    def remove(_: ndcache.ProgressReport) -> None:
        shutil.rmtree(tmp_path / "traces", ignore_errors=True)

    models.assert_same(ndcache.load(tmp_path / "model", trace=tmp_path / "traces" / "t.json", progress=remove), arrays)
    assert "the trace was not written" in caplog.text


@pytest.mark.parametrize("kind", ["trace", "report"])
def test_devices_pipes_and_links_stay(tmp_path: Path, kind: str) -> None:
    """Root may replace /dev/null, and then has a system without it."""
    models.simple_model(tmp_path / "model", shards=1)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("target")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        for name in ("pipe", "link"):
            options: dict[str, Any] = {kind: tmp_path / name}
            ndcache.load(tmp_path / "model", **options)
        written = os.read(reader, 1 << 20).decode()
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    for text in (written, (tmp_path / "target").read_text()):
        assert "traceEvents" in text if kind == "trace" else "</html>" in text
    assert sorted(os.listdir(tmp_path)) == ["link", "model", "pipe", "target"]


def test_the_trace_has_no_secrets(tmp_path: Path, serve: Serve) -> None:
    models.simple_model(tmp_path / "model", shards=1)
    url = serve(tmp_path / "model").url.replace("http://", "http://user:secret@")
    ndcache.fetch(f"{url}?token=secret", cache_dir=tmp_path / "cache", trace=tmp_path / "trace.json")
    assert "secret" not in (tmp_path / "trace.json").read_text()


def test_the_trace_is_written_when_the_load_fails(tmp_path: Path, serve: Serve) -> None:
    models.simple_model(tmp_path / "model", shards=3)
    server = serve(tmp_path / "model")
    server.status["/params_shard_1.bin"] = 404
    path = tmp_path / "trace.json"
    path.write_text("an older one")
    with pytest.raises(ndcache.NotFoundError):
        ndcache.load(server.url, cache_dir=tmp_path / "cache", trace=path)
    assert "request" in {event["name"] for event in events(path)}
    with pytest.raises(ndcache.NotFoundError):
        ndcache.load(tmp_path / "nowhere", trace=path)
    assert os.listdir(tmp_path).count("trace.json") == 1
    assert not list(tmp_path.glob("trace.json.*"))


def test_the_trace_is_written_when_a_stream_is_closed(tmp_path: Path) -> None:
    models.simple_model(tmp_path, shards=3)
    path = tmp_path / "trace.json"
    stream = ndcache.stream(tmp_path, trace=path)
    next(stream)
    assert not path.exists()
    stream.close()  # type: ignore[attr-defined]
    assert "read" in {event["name"] for event in events(path)}


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, serve: Serve) -> None:
    models.simple_model(tmp_path / "model", shards=1)
    server = serve(tmp_path / "model")
    for path, error in ((tmp_path, IsADirectoryError), (tmp_path / "no" / "trace.json", FileNotFoundError)):
        for verb in (ndcache.load, ndcache.stream, ndcache.fetch):
            with pytest.raises(error, match="the trace cannot be written"):
                verb(server.url, cache_dir=tmp_path / "cache", trace=path)
    assert server.requests == []


def test_a_short_load_uses_some_cpu_time() -> None:
    trace = Trace()
    assert sum(range(10_000))
    assert 0 < trace.content()["otherData"]["cpu_seconds"] < 10


def test_no_trace_by_default(tmp_path: Path) -> None:
    models.simple_model(tmp_path / "model", shards=2)
    before = set(tmp_path.rglob("*"))
    stats = ndcache.load(tmp_path / "model").stats
    assert set(tmp_path.rglob("*")) == before
    assert sum(stats.seconds[phase] for phase in ("manifest", "wait", "place", "finish")) <= stats.seconds["total"]


def test_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models.simple_model(tmp_path / "model", shards=2)
    for command in ("load", "fetch"):
        path = tmp_path / f"{command}.json"
        main([command, str(tmp_path / "model"), "-q", "--trace", str(path)], standalone_mode=False)
        assert events(path)
    with pytest.raises(SystemExit) as caught:
        sys.exit(main(["load", str(tmp_path / "model"), "--trace", str(tmp_path / "no" / "x.json")]))
    assert caught.value.code
    err = capfd.readouterr().err
    assert "the trace cannot be written" in err
    assert "Traceback" not in err
