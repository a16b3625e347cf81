"""The page of a load in a real browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache.report.page import render_page
from ndcache.report.words import format_rate, format_seconds, format_size

from ..helpers import models
from ..helpers.browser import Browser, open_browser

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


def page(tmp_path: Path, shards: int, *, scale: float = 1.0) -> Path:
    """Write the page of a load of so many shards by 8 workers; each takes `scale` seconds."""
    events: list[dict[str, Any]] = []
    known = {}
    for index in range(shards):
        name, worker, start = f"params_shard_{index}.bin", index % 8 + 1, index // 8
        known[name] = (32 << 20, "cache" if index % 4 == 3 else "network", "md5")
        url = f"https://host/a/rather/long/path/of/a/model/{name}"
        for phase, begin, length, args in (
            ("request", 0.0, 0.1, {"url": url, "range": "bytes=0-"}),
            ("network", 0.1, 0.7, {"nbytes": 32 << 20, "hash (s)": 0.14 * scale}),
            ("publish", 0.8, 0.05, {}),
            ("read", 0.85, 0.03, {}),
            ("decode", 0.88, 0.1, {}),
        ):
            place = {"ts": (start + begin) * scale * 1e6, "dur": length * scale * 1e6, "tid": worker}
            events.append({"name": phase, "cat": "ndcache", "ph": "X", **place, "args": {"file": name, **args}})
    names = [{"name": "thread_name", "ph": "M", "tid": tid, "args": {"name": f"ndcache_{tid}"}} for tid in range(1, 9)]
    facts = {"source": "https://host/a/rather/long/path/of/a/model/", "shards": known, "workers": 8}
    path = tmp_path / "load.html"
    path.write_text(render_page({"traceEvents": [*names, *events], "otherData": facts}), "utf-8")
    return path


def rows(browser: Browser) -> list[str]:
    found: list[str] = browser.run(
        "return [...document.querySelectorAll('#shards tbody tr')].map(r => r.cells[0].textContent)"
    )
    return found


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390], ids=["desktop", "phone"])
def test_the_page_opens(browser: Browser, tmp_path: Path, width: int, is_dark: bool) -> None:
    browser.resize(width, 844, is_dark=is_dark)
    browser.open(page(tmp_path, 40, scale=0.1))
    assert browser.messages() == []
    assert browser.run(
        "const s = document.getElementById('shares'), bars = [...s.children].map(bar => bar.offsetWidth);"
        "return s.clientWidth - bars.reduce((sum, width) => sum + width)"
    ) == pytest.approx(0, abs=3)
    assert "network was the limit" in browser.run("return document.getElementById('headline').textContent")
    assert browser.run("return document.documentElement.scrollWidth") == width
    assert len(rows(browser)) == 40
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, background[4:-1].split(","))) < 128) == is_dark
    if folder := os.environ.get("NDCACHE_TEST_SCREENSHOTS"):
        Path(folder, f"report-{width}-{'dark' if is_dark else 'light'}.png").write_bytes(browser.screenshot())


def test_numbers_are_written_as_in_the_texts_above(browser: Browser, tmp_path: Path) -> None:
    times = [0.0123, 0.9996, 1.8, 12.0, 99.6, 3700.0]
    sizes = [999, 3 << 10, 40 << 20, 5 << 30, 2 << 40, 1 << 20]
    events, known, start = [], {}, 0.0
    for index, (seconds, nbytes) in enumerate(zip(times, sizes, strict=True)):
        known[name := str(index)] = (nbytes, "network", "md5")
        place = {"ts": start * 1e6, "dur": seconds * 1e6, "tid": 1}
        events.append(
            {"name": "network", "cat": "ndcache", "ph": "X", **place, "args": {"file": name, "nbytes": nbytes}}
        )
        start += seconds
    path = tmp_path / "load.html"
    path.write_text(render_page({"traceEvents": events, "otherData": {"shards": known, "seconds": start}}), "utf-8")
    browser.resize(1200, 844)
    browser.open(path)
    assert browser.run(
        "return [...document.querySelectorAll('#shards tbody tr')].map(r => [1, 4, 5].map(i => r.cells[i].textContent))"
    ) == [
        [format_size(nbytes), format_seconds(seconds), format_rate(nbytes, seconds)]
        for nbytes, seconds in zip(sizes, times, strict=True)
    ]
    words = browser.run("return [headline, legend].map(each => each.textContent)")
    assert all(format_seconds(start) in each for each in words)


def test_a_long_name_leaves_all_columns_of_a_table_on_the_page(browser: Browser, tmp_path: Path) -> None:
    models.write_model(tmp_path, [{"x" * 150: np.ones(3, np.float32), "short": np.ones((3, 4, 5), np.float32)}])
    page = tmp_path / "table.html"
    page.write_text(f"<!DOCTYPE html>{ndcache.load(tmp_path)._repr_html_()}", "utf-8")
    browser.resize(800, 600)
    browser.open(page)
    assert browser.run(
        "const cells = [...document.querySelectorAll('tr:last-child td')];"
        "return [cells.at(-1).getBoundingClientRect().right <= 800, new Set(cells.map(c => c.offsetHeight)).size]"
    ) == [True, 1]
    long, short = browser.run("return [...document.querySelectorAll('tbody tr')].map(row => row.offsetHeight)")
    assert long > 2 * short


def test_hovering_and_filtering(browser: Browser, tmp_path: Path) -> None:
    browser.resize(1200, 844)
    browser.open(page(tmp_path, 40))
    box = browser.run(
        "const c = document.getElementById('waterfall'); c.scrollIntoView({block: 'center'});"
        "const b = c.getBoundingClientRect(); return [b.left, b.top, b.width]"
    )
    tip = "const t = document.getElementById('tip'); return t.hidden ? '' : t.textContent"
    browser.point_at(box[0] + 78 + (box[2] - 78) * 0.08, box[1] + 5)  # 0.4 s of 5: receiving the first shard
    assert browser.run(tip).splitlines()[:3] == ["receiving, 700 ms", "params_shard_0.bin", "of it digest: 140 ms"]
    browser.point_at(5, 5)
    assert browser.run(tip) == ""

    type_in = "const f = document.getElementById('filter'); f.value = {!r}; f.dispatchEvent(new Event('input'))"
    browser.run(type_in.format("shard_3"))
    assert rows(browser) == [f"params_shard_{index}.bin" for index in (3, *range(30, 40))]
    browser.run("const o = document.getElementById('origin'); o.value = 'cache'; o.dispatchEvent(new Event('change'))")
    assert rows(browser) == [f"params_shard_{index}.bin" for index in (3, 31, 35, 39)]
    browser.run(
        "document.querySelector('#shards th button').click(); document.querySelector('#shards th button').click()"
    )
    assert rows(browser)[0] == "params_shard_39.bin"
    browser.run("document.querySelector('#shards tbody tr').click()")
    assert " to " in browser.run("return document.getElementById('shown').textContent")
    assert browser.messages() == []


def test_ten_thousand_shards_respond(browser: Browser, tmp_path: Path) -> None:
    """A second of a quiet machine: of CPU time, as wall time also counts what else runs here."""
    browser.resize(1200, 844)
    browser.devtools("Performance.enable", timeDomain="threadTicks")
    browser.open(page(tmp_path, 10_000))
    before = browser.cpu_seconds()
    browser.run(
        "const f = document.getElementById('filter'); f.value = '77'; f.dispatchEvent(new Event('input'));"
        "document.getElementById('in').click()"
    )
    assert browser.cpu_seconds() - before < 1
    assert len(rows(browser)) == 100
    assert "of 10,000 shards" in browser.run("return document.getElementById('count').textContent")
    assert browser.messages() == []
