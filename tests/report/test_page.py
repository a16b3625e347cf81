"""The page of a load: what it says, and when it is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache.cli.commands import main
from ndcache.report.limits import shares
from ndcache.report.page import render_page
from ndcache.report.timeline import read_timeline
from ndcache.report.verdict import judge

from ..helpers import models
from ..helpers.loads import page_data
from ..helpers.servers import FileServer

Serve = Callable[..., FileServer]
Row = tuple[str, int, float, float, Mapping[str, Any]]


def trace(rows: Sequence[Row], **facts: Any) -> dict[str, Any]:
    """Return the content of a trace with these phases, threads (0 is the caller's), starts, ends and arguments."""
    names = [
        {"name": "thread_name", "ph": "M", "tid": tid, "args": {"name": f"ndcache_{tid}" if tid else "MainThread"}}
        for tid in {row[1] for row in rows}
    ]
    events = [
        {
            "name": name,
            "cat": "ndcache",
            "ph": "X",
            "ts": start * 1e6,
            "dur": (end - start) * 1e6,
            "tid": tid,
            "args": a,
        }
        for name, tid, start, end, a in rows
    ]
    return {"traceEvents": [*names, *events], "otherData": facts}


def test_a_page_of_a_download(tmp_path: Path, serve: Serve) -> None:
    models.simple_model(tmp_path / "model", shards=5)
    url = serve(tmp_path / "model").url.replace("http://", "http://user:secret@")
    page = tmp_path / "load.html"
    ndcache.load(f"{url}?token=secret", cache_dir=tmp_path / "cache", report=page)
    text = page.read_text("utf-8")
    assert "secret" not in text
    assert not re.search(r"""(src|href)=["']?https?:""", text)
    data = page_data(text)
    assert (data["outcome"], data["error"]) == ("done", "")
    assert [(data["files"][row[0]], row[2], row[3]) for row in data["shards"]] == [
        (f"params_shard_{index}.bin", "network", "md5") for index in range(5)
    ]
    assert dict(data["facts"])["shards"] == "5 of 5"
    assert {"request", "network", "read", "place", "wait"} <= {name for name, _ in data["phases"]}
    assert data["threads"][0] == "caller"
    assert sum(seconds for _, seconds in data["shares"]) == pytest.approx(data["total"])
    ndcache.load(url, cache_dir=tmp_path / "cache", report=page)
    data = page_data(page.read_text("utf-8"))
    assert {row[2] for row in data["shards"]} == {"cache"}
    assert dict(data["facts"])["loaded"] == "320.0 KiB, mapped"
    ndcache.fetch(url, cache_dir=tmp_path / "cache", report=page)
    assert dict(page_data(page.read_text("utf-8"))["facts"])["loaded"] == "320.0 KiB, cached"


def test_a_page_is_written_when_the_load_fails(tmp_path: Path, serve: Serve) -> None:
    models.simple_model(tmp_path / "model", shards=3)
    server = serve(tmp_path / "model")
    server.status["/params_shard_1.bin"] = 404
    page = tmp_path / "load.html"
    with pytest.raises(ndcache.NotFoundError):
        ndcache.load(server.url, cache_dir=tmp_path / "cache", report=page)
    data = page_data(page.read_text("utf-8"))
    assert data["outcome"] == "failed"
    assert data["error"].startswith("NotFoundError: the server has no such file")
    assert "" in {row[2] for row in data["shards"]}
    assert not list(tmp_path.glob("load.html.*"))


def test_a_page_of_a_fetch(tmp_path: Path, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    models.simple_model(tmp_path / "model", shards=2)
    url, page = serve(tmp_path / "model").url, tmp_path / "fetch.html"
    main(["fetch", url, "-q", "--report", str(page)], standalone_mode=False)
    facts = dict(page_data(page.read_text("utf-8"))["facts"])
    assert facts["shards"] == "2 of 2"
    assert "tensors" not in facts
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fetch", url, url, "--report", str(page)])
    assert "--report is for one model" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ndcache.CancelledError])
def test_a_page_of_a_load_that_is_stopped(tmp_path: Path, error: type[BaseException]) -> None:
    models.simple_model(tmp_path / "model", shards=3)

    def progress(report: ndcache.ProgressReport) -> None:
        raise error("a word")

    page = tmp_path / "load.html"
    with pytest.raises(error):
        ndcache.load(tmp_path / "model", report=page, progress=progress)
    data = page_data(page.read_text("utf-8"))
    assert (data["outcome"], data["error"], dict(data["facts"])["loaded"]) == ("stopped", "", "nothing")


def test_a_page_of_a_stream_that_is_closed(tmp_path: Path) -> None:
    models.simple_model(tmp_path / "model", shards=3)
    page = tmp_path / "load.html"
    stream = ndcache.stream(tmp_path / "model", report=page)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert page_data(page.read_text("utf-8"))["outcome"] == "stopped"


def test_a_callback_s_error_keeps_its_message(tmp_path: Path) -> None:
    models.simple_model(tmp_path / "model", shards=1)
    page = tmp_path / "load.html"

    def progress(_: ndcache.ProgressReport) -> None:
        raise ValueError("my password")

    with pytest.raises(ValueError, match="my password"):
        ndcache.load(tmp_path / "model", report=page, progress=progress)
    assert page_data(page.read_text("utf-8"))["error"] == "ValueError"
    assert "password" not in page.read_text("utf-8").replace("without passwords", "")


@pytest.mark.parametrize(
    ("source", "options", "error"),
    [
        ("nowhere", {}, "NotFoundError: there is no such directory or file: "),
        ("model", {"names": ["nope"]}, "NoMatchError: no tensor of tensor-cache.json matches 'nope'"),
        ("model", {"into": {"layer.0": np.zeros(3, "float32")}}, "ValueError: into['layer.0'] has the shape (3,), but"),
    ],
)
def test_a_page_names_the_source_and_the_error(
    tmp_path: Path, source: str, options: dict[str, Any], error: str
) -> None:
    models.simple_model(tmp_path / "model", shards=1)
    page = tmp_path / "load.html"
    with pytest.raises((ndcache.NotFoundError, KeyError, ValueError)):
        ndcache.load(tmp_path / source, report=page, **options)
    data = page_data(page.read_text("utf-8"))
    assert data["error"].startswith(error)
    assert data["title"] == f"Load of {tmp_path / source}"


def test_the_caller_s_own_code_is_no_step_of_the_load() -> None:
    rows: list[Row] = [("place", 0, start, start + 1, {"file": "a"}) for start in (0, 1.00005, 9)]
    timeline = read_timeline(trace(rows))
    assert [(event.start, event.end) for event in timeline.events] == [(0, 2.00005), (9, 10)]
    assert shares(timeline)["rest"] == pytest.approx(6.99995)
    assert judge(timeline).headline.startswith("No step of the load was the limit: 70 % of 10 s")


def test_a_load_without_shards_has_no_advice_about_workers() -> None:
    found = judge(read_timeline(trace([("request", 0, 0, 2, {"url": "h/tensor-cache.json"})], workers=8)))
    assert found.advice == ("The server took 2 s to answer a request.",)


def test_busy_cores_of_how_many() -> None:
    facts: dict[str, Any] = {"cpu_seconds": 1.0, "stats": None}
    known = [
        dict(page_data(render_page(trace([("read", 1, 0, 2, {})], **facts, **more)))["facts"])
        for more in ({}, {"cores": 2})
    ]
    assert [each.get("cores busy") for each in known] == [None, "0.5 of 2"]


def test_texts_cannot_become_elements() -> None:
    rows: list[Row] = [("read", 1, 0, 1, {"file": "</script><b>.bin"})]
    page = render_page(trace(rows, source="<img src=x>", outcome="failed", error="</script><script>"))
    assert page.count("</script>") == 2
    assert "<img src=x>" not in page
    assert page_data(page)["files"] == ["</script><b>.bin"]


def test_time_belongs_to_what_the_workers_do() -> None:
    rows: list[Row] = [
        ("wait", 0, 0, 9, {}),
        ("network", 1, 0, 4, {"file": "a", "nbytes": 4, "hash (s)": 1.0}),
        ("read", 2, 2, 4, {"file": "b"}),
        ("place", 0, 9, 10, {}),
    ]
    found = shares(read_timeline(trace(rows)))
    assert found == pytest.approx(
        {"network": 2.25, "hash": 0.75, "disk": 1, "device": 1, "rest": 5, "limits": 0, "lock": 0, "decode": 0}
    )


@pytest.mark.parametrize(
    ("phase", "headline", "advice"),
    [
        ("network", "The network was the limit: 100 % of 6 s waiting for bytes.", "try more workers (max_workers=4)"),
        ("rate_limit", "The server was the limit", "A token"),
        ("read", "The disk was the limit", "a faster disk"),
        ("decode", "Decoding was the limit", "decode=False"),
        ("hash", "Checking digests was the limit", "only when it is downloaded"),
        ("lock", "Another process was the limit", "share one download"),
    ],
)
def test_the_limit_in_words(phase: str, headline: str, advice: str) -> None:
    rows: list[Row] = [(phase, tid, n, n + 3.0, {"file": f"{tid}{n}", "nbytes": 9}) for tid in (1, 2) for n in (0, 3)]
    verdict = judge(read_timeline(trace(rows, workers=2)))
    assert verdict.headline.startswith(headline)
    assert advice in " ".join(verdict.advice)


def network(files: int, *, nbytes: int = 9, at_once: int = 2) -> list[Row]:
    """Return a second of receiving for each file, by so many workers."""
    return [
        (
            "network",
            1 + index % at_once,
            float(index // at_once),
            index // at_once + 1.0,
            {"file": f"{index}", "nbytes": nbytes},
        )
        for index in range(files)
    ]


@pytest.mark.parametrize(
    ("rows", "facts", "advice"),
    [
        (network(6), {"workers": 2}, "try more workers (max_workers=4)"),
        (network(3), {"workers": 2}, "try more workers (max_workers=3)"),  # for each file one
        (network(2), {"workers": 2}, "2 files came from the network, for 2 workers: more would not help."),
        (
            network(6),
            {"workers": 2, "cpu_seconds": 2.9, "cores": 1},
            "1.0 cores were busy, of 1: more workers would hardly",
        ),
        (network(6), {"workers": 2, "cpu_seconds": 11.7}, "try more workers"),  # of how many cores is not known
        (network(10), {"workers": 8}, "2.0 of 8 workers were busy on average: more would not help."),
        ([*network(6), ("memory_limit", 0, 0, 2, {})], {"workers": 8}, "because of memory_limit"),
        (
            [("request", 1, 0, 3, {"url": "h/0"}), *network(2)],
            {"workers": 1},
            "The server took 3 s to answer a request.",
        ),
    ],
)
def test_advice_about_workers(rows: list[Row], facts: dict[str, Any], advice: str) -> None:
    shards = {row[4]["file"]: [99, "", ""] for row in rows if "file" in row[4]}
    assert advice in " ".join(judge(read_timeline(trace(rows, shards=shards, **facts))).advice)


def test_the_longest_phase_of_the_limit_is_named() -> None:
    rows: list[Row] = [("open_device", 0, 0, 6, {}), ("place", 0, 6, 8, {}), ("read", 1, 8, 10, {})]
    found = judge(read_timeline(trace(rows)))
    assert found.headline == "The device's driver was the limit: 60 % of 10 s opening the device."
    found = judge(read_timeline(trace([("request", 1, 0, 4, {}), ("network", 1, 4, 10, {})])))
    assert found.headline == "The network was the limit: 100 % of 10 s waiting for bytes."
    found = judge(read_timeline(trace([*rows, ("finish", 0, 10, 20, {})])))
    assert found.headline == "The device was the limit: 90 % of 20 s making tensors on it."


def test_the_last_files_came_alone() -> None:
    rows, shards = network(5, at_once=4), {str(index): [99, "", ""] for index in range(5)}
    found = judge(read_timeline(trace(rows, shards=shards, workers=4)))
    assert found.advice[-2:] == (
        "5 files came from the network, for 4 workers: the last ones came alone.",
        "With max_workers=5, all would come at once.",
    )


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        ({"cores": 2, "cpu_seconds": 9.0}, 'verify="never"'),
        ({"cores": 8, "cpu_seconds": 9.0}, 'processes="auto"'),
        ({"cores": 8, "cpu_seconds": 9.0, "processes": 2}, 'verify="never"'),
        ({"cores": 2, "cpu_seconds": 1.0}, "It got 0.2 of 2 cores, and had work for more"),
    ],
)
def test_advice_about_digests(facts: dict[str, Any], advice: str) -> None:
    rows: list[Row] = [("network", 1, 0, 1, {}), ("hash", 1, 1, 6, {}), ("hash", 2, 1, 6, {})]
    assert advice in judge(read_timeline(trace(rows, workers=2, **facts))).advice[-1]


def test_a_load_that_fails_at_once_has_no_limit() -> None:
    assert judge(read_timeline(trace([("backoff", 1, 0, 0.5, {})], outcome="failed"))).headline == ""


def test_less_than_half_of_the_time_is_no_limit() -> None:
    rows: list[Row] = [("network", 1, 0, 4, {}), ("decode", 1, 4, 7, {}), ("read", 1, 7, 10, {})]
    found = judge(read_timeline(trace(rows)))
    assert found.headline == "The network took the largest part of the time: 40 % of 10 s waiting for bytes."


def test_many_small_files_from_the_cache() -> None:
    shards = {str(index): [4096, "cache", "md5"] for index in range(40)}
    found = judge(read_timeline(trace([("read", 1, 9, 10, {})], shards=shards)))
    assert found.advice == ("There are 40 files of 4.0 KiB on average: fewer, larger shards would help.",)


def test_workers_may_share_a_large_file() -> None:
    rows = [(name, tid, start, end, {**args, "file": "0"}) for name, tid, start, end, args in network(8, at_once=4)]
    found = judge(read_timeline(trace(rows, shards={"0": [1 << 30, "", ""]}, workers=4)))
    assert "max_workers=8" in found.advice[-1]


@pytest.mark.parametrize(
    ("nbytes", "cpu_seconds", "headline", "advice"),
    [
        (4096, 36.0, "The number of files was the limit: 100 % of 40 s writing, syncing and naming", "hardly help"),
        (4096, 1.0, "The number of files was the limit: 100 % of 40 s writing, syncing and naming", "larger shards"),
        (4 << 20, 1.0, "The disk was the limit: 100 % of 40 s", "faster disk"),
    ],
)
def test_many_small_files_are_not_called_a_slow_disk(
    nbytes: int, cpu_seconds: float, headline: str, advice: str
) -> None:
    rows: list[Row] = [("publish", 1, float(index), index + 1.0, {"file": str(index)}) for index in range(40)]
    shards = {str(index): [nbytes, "", ""] for index in range(40)}
    network: Row = ("network", 2, 0, 0.001, {"file": "0", "nbytes": 9})
    found = judge(read_timeline(trace([network, *rows], shards=shards, cpu_seconds=cpu_seconds, cores=2)))
    assert found.headline.startswith(headline)
    assert advice in found.advice[-1]


def test_a_request_that_the_server_s_limits_hold_up() -> None:
    row: Row = ("request", 1, 0, 4, {"url": "h/a.bin", "rate_limit (s)": 3.0})
    timeline = read_timeline(trace([row], outcome="failed"))
    assert [(event.phase, event.start, event.end) for event in timeline.events] == [
        ("rate_limit", 0, 3),
        ("request", 3, 4),
    ]
    assert judge(timeline).headline == "Until then: 75 % of 4 s waiting because it refuses more requests."


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.simple_model(tmp_path / "model", shards=2)
    page, recorded = tmp_path / "page.html", tmp_path / "trace.json"
    main(
        ["load", str(tmp_path / "model"), "-q", "--report", str(page), "--trace", str(recorded)], standalone_mode=False
    )
    capsys.readouterr()
    main(["report", str(recorded)], standalone_mode=False)
    assert capsys.readouterr().out.strip() == str(tmp_path / "trace.html")
    assert page_data((tmp_path / "trace.html").read_text("utf-8")) == page_data(page.read_text("utf-8"))
    for wrong in ("no JSON", "[1]", '{"traceEvents": [{}]}'):
        recorded.write_text(wrong)
        with pytest.raises(SystemExit) as caught:
            main(["report", str(recorded)])
        assert caught.value.code == 1
        assert "this is not a trace that ndcache wrote" in capsys.readouterr().err
