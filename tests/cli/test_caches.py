"""The commands for models in the cache: ls, rm, prune and verify."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from click.testing import Result

import ndcache
from ndcache.cli import commands as cli
from ndcache.format import integrity
from ndcache.format.integrity import update_from_file
from ndcache.store.housekeeping import pruning
from ndcache.store.housekeeping.matching import match_source
from ndcache.store.housekeeping.quantities import parse_duration, parse_size
from ndcache.store.housekeeping.usage import unused

from ..helpers.commands import new_runner
from ..helpers.models import simple_model
from ..helpers.servers import FileServer

DAY = 86400
NAMES = ("one", "other", "third")


def invoke(*args: object) -> Result:
    return new_runner().invoke(cli.main, [str(arg) for arg in args], prog_name="ndcache")


def lines(*args: object) -> list[str]:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def use(model: ndcache.cache.CachedModel, days_ago: float) -> None:
    """Change when a model was used last."""
    os.utime(model.path / ".ndcache" / "used", (time.time() - days_ago * DAY,) * 2)


@pytest.fixture
def urls(tmp_path: Path, serve: Callable[..., FileServer]) -> dict[str, str]:
    """Fetch three models of 1, 2 and 3 shards, which were used 40, 20 and 0 days ago; the second lacks a shard."""
    for number, name in enumerate(NAMES):
        simple_model(tmp_path / "www" / name, shards=number + 1, seed=10 * number)
    server = serve(tmp_path / "www")
    found = {name: f"{server.url}{name}/" for name in NAMES}
    for name, days in zip(NAMES, (40, 20, 0), strict=True):
        directory = ndcache.fetch(found[name])
        use(next(model for model in ndcache.cache.models() if model.path == directory), days)
    (next(model.path for model in ndcache.cache.models() if "other" in model.source) / "params_shard_1.bin").unlink()
    return found


def test_ls_shows_state_size_age_and_last_use(urls: dict[str, str]) -> None:
    header, *rows, empty, total = lines("ls", "--sort", "used")
    assert header.split() == ["source", "state", "size", "age", "last", "use"]
    assert [row.split()[0] for row in rows] == [urls[name] for name in reversed(NAMES)]
    assert [re.split("  +", row)[1] for row in rows] == ["complete", "1 of 2 shards", "complete"]
    assert [re.split("  +", row)[-1] for row in rows] == ["now", "20 days ago", "40 days ago"]
    assert (empty, total.split(",")[0]) == ("", "3 models")
    models = json.loads(invoke("ls", "--json").stdout)
    assert [(model["shards"], model["shards_total"], model["complete"]) for model in models] == [
        (1, 1, True),
        (1, 2, False),
        (3, 3, True),
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["one", "other", "third"]),
        (["--sort", "size"], ["third", "other", "one"]),
        (["--sort", "size", "--reverse"], ["one", "other", "third"]),
        (["--sort", "state"], ["other", "one", "third"]),
        (["--filter", "partial"], ["other"]),
        (["--filter", "used>30d", "--filter", "complete"], ["one"]),
        (["--filter", "used>10d", "size<1GB", " Partial "], ["other"]),
        (["AGE < 1 hour", "--filter", "size > 100 kB"], ["third"]),
        (["*o*e*/"], ["one", "other"]),
        (["in-use"], []),
    ],
)
def test_ls_filters_and_sorts(urls: dict[str, str], arguments: list[str], expected: list[str]) -> None:
    found = lines("ls", "-q", *arguments)
    assert [next(name for name in NAMES if f"/{name}/" in line) for line in found] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter", "partly"], "'partly' is no filter, at character 1: write size>1GB"),
        (["--filter", "size>many"], "in 'size>many', at character 6: 'many' is no size"),
        (["used > soon"], "in 'used > soon', at character 8: 'soon' is no duration"),
        ([" siez>1GB"], "' siez>1GB' is no filter, at character 2"),
    ],
)
def test_filters_that_cannot_be_read_are_refused(arguments: list[str], message: str) -> None:
    result = invoke("ls", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())


def left() -> list[str]:
    return [next(name for name in NAMES if f"/{name}/" in model.source) for model in ndcache.cache.models()]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--older-than", "30d"], ["other", "third"]),
        (["--older-than", "10d", "--keep-last", "2"], ["other", "third"]),
        (["--keep-last", "1"], ["third"]),
        (["--partial"], ["one", "third"]),
        (["--partial", "--older-than", "30d"], ["third"]),
        (["--aside"], ["one", "other", "third"]),
        (["--older-than", "0"], []),
        (["--max-size", "220kB"], ["third"]),
        (["--max-size", "1B"], []),
        (["--max-size", "1B", "--keep-last", "2"], ["other", "third"]),
    ],
)
def test_prune(urls: dict[str, str], arguments: list[str], expected: list[str]) -> None:
    before = left()
    dry = lines("prune", "--dry-run", *arguments)
    assert left() == before
    done = lines("prune", *arguments)
    assert left() == expected
    assert [line.partition(": ")[0] for line in done[:-1]] == [line.partition(": ")[0] for line in dry[:-1]]
    assert len(done) == 1 + len(before) - len(expected)
    assert done[-1].endswith(" kept")
    assert "would be freed" in dry[-1]


def test_a_clock_that_was_set_back_keeps_nothing_forever(urls: dict[str, str]) -> None:
    for model in ndcache.cache.models():
        use(model, -1)
    assert {model.last_used <= datetime.now(timezone.utc) for model in ndcache.cache.models()} == {True}
    assert lines("ls", "--filter", "used>1m") == []
    assert len(ndcache.cache.prune(older_than=0).removed) == len(NAMES)


def test_bytes_that_models_of_several_scopes_share_count_once(urls: dict[str, str], tmp_path: Path) -> None:
    """Two scopes have the same bytes, as after a copy with hard links; an interrupted deletion left some, too."""
    (model,) = (model for model in ndcache.cache.models() if "third" in model.source)
    root = model.path.parents[1]
    for copy in ("work/third", "default/old.01234567.deleted"):
        shutil.copytree(model.path, root / copy, copy_function=os.link)
    everything = sum(each.size for each in ndcache.cache.models())
    assert lines("rm", "--scope", "work", "-n", "*")[0] == f"{urls['third']} (scope work): 0 B would be freed"
    plan = ndcache.cache.prune(max_size=0, scope="work", dry_run=True)
    assert (plan.freed, plan.size) == (0, 0)
    swept = ndcache.cache.prune(aside=True)
    assert (swept.freed, swept.size) == (0, everything)
    emptied = ndcache.cache.prune(keep_last=0)
    assert (emptied.freed, emptied.size) == (everything, 0)


def test_what_another_process_removes_meanwhile_does_not_count(
    urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_and_lock(layout: Any) -> Any:
        ndcache.delete(urls["one"])
        return unused(layout)

    monkeypatch.setattr(pruning, "unused", remove_and_lock)
    report = ndcache.cache.prune(older_than="30d")
    assert (report.removed, report.freed, report.failed) == ((), 0, ())
    assert report.size == sum(model.size for model in ndcache.cache.models())


def test_prune_needs_a_rule_and_removes_what_was_set_aside(urls: dict[str, str]) -> None:
    assert invoke("prune").exit_code == 2
    with pytest.raises(ValueError, match="say what to remove"):
        ndcache.cache.prune()
    (directory,) = (model.path for model in ndcache.cache.models() if "third" in model.source)
    (directory / "params_shard_0.bin").write_bytes(bytes(1 << 16))
    assert not ndcache.verify(urls["third"]).ok
    (model,) = (model for model in ndcache.cache.models() if "third" in model.source)
    assert (model.aside_size, model.state) == (1 << 16, "2 of 3 shards")
    assert f"{urls['third']}: would be kept without its leftovers" in invoke("prune", "--aside", "--dry-run").output
    report = ndcache.cache.prune(aside=True)
    assert (report.cleaned, report.removed, report.freed) == ((model,), (), 1 << 16)
    assert not (directory / ".ndcache" / "aside").exists()


def test_rm_takes_patterns_all_and_dry_run_and_fails_if_nothing_matches(urls: dict[str, str]) -> None:
    assert len(lines("rm", "--dry-run", "--all")) == 3
    assert lines("rm", "--dry-run", "--all", "-q") == []
    plan = json.loads(invoke("rm", "--dry-run", "--json", "--all").stdout)
    assert ([model["source"] for model in plan["removed"]], plan["dry_run"]) == (list(urls.values()), True)
    assert json.loads(invoke("prune", "--dry-run", "--json", "--keep-last", "0").stdout) == plan
    assert len(ndcache.cache.models()) == 3
    assert invoke("rm", "one").stderr == f"error: one is not in the cache; did you mean {urls['one']}?\n"
    assert invoke("rm", "").stderr.startswith("error: the source is empty")
    for typed in ("/", ".", "http://"):
        assert "did you mean" not in invoke("rm", typed).stderr
    result = invoke("rm", "*/o*/", "*nothing*", "https://host/absent/")
    assert result.exit_code == 1
    assert [line.split(": ")[0] for line in result.stdout.splitlines()] == [urls["one"], urls["other"]]
    assert result.stderr.splitlines() == [
        "error: nothing in the cache matches *nothing*",
        "error: https://host/absent/ is not in the cache",
    ]
    with ndcache.load(urls["third"]):
        kept = invoke("rm", urls["third"])
        assert (kept.exit_code, kept.stdout) == (1, "")
        assert kept.stderr == f"error: {urls['third']} is in use and was kept; --force removes it\n"
        assert len(lines("rm", "--force", urls["third"])) == 1
    assert invoke("rm").exit_code == invoke("rm", "x", "--all").exit_code == 2
    assert invoke("rm", "--all").exit_code == 0


def test_row_122_verify_of_all_models_says_what_is_missing(urls: dict[str, str]) -> None:
    result = invoke("verify", "--all")
    gap = "the model is not complete: 1 of 2 files is missing, and the next load downloads it"
    assert (result.exit_code, result.stderr) == (0, f"warning: {urls['other']}: {gap}\n")
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("source")] == list(urls.values())
    failed = invoke("verify", urls["other"], "--fail-on-missing")
    assert (failed.exit_code, failed.stderr) == (1, f"error: {gap}\n")
    report = ndcache.verify(urls["other"])
    assert (report.ok, report.complete) == (True, False)
    (directory,) = (model.path for model in ndcache.cache.models() if "third" in model.source)
    (directory / "params_shard_0.bin").write_bytes(bytes(1 << 16))
    bad = invoke("verify", "--all")
    assert bad.exit_code == 1
    assert bad.stderr.splitlines()[-1] == (
        f"error: {urls['third']}: 1 shard bad and set aside; the next load downloads it again"
    )
    assert not (directory / "params_shard_0.bin").exists()
    reports: list[Any] = []
    assert ndcache.verify(urls["one"], progress=reports.append).complete
    assert [report.shards_done for report in reports] == [0, 0, 1]


def test_row_122_verify_names_models_without_a_manifest(
    tmp_path: Path, urls: dict[str, str], serve: Callable[..., FileServer]
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "tokenizer.json").write_text("{}")
    single = serve(tmp_path / "files").url
    with ndcache.Loader() as loader:
        loader.fetch_file(f"{single}tokenizer.json")
    damaged, lost, _, alone = sorted(
        ndcache.cache.models(), key=lambda model: [*urls.values(), single].index(model.source)
    )
    (damaged.path / "tensor-cache.json").write_text('{"records": [1]}')
    (lost.path / "tensor-cache.json").unlink()
    result = invoke("verify", "--all")
    assert result.exit_code == 1
    gap = "the model is not complete: 2 of 3 files are missing, and the next load downloads them"
    assert {
        f"error: {damaged.source}: 1 file bad and set aside; the next load downloads it again",
        f"warning: {lost.source}: {gap}",
        f"warning: {alone.source}: there is no manifest that says which shards there should be",
    } <= set(result.stderr.splitlines())
    assert [invoke("verify", source, "--fail-on-missing").exit_code for source in (lost.source, alone.source)] == [1, 0]
    assert ndcache.verify(alone.source).checked == {"tokenizer.json": "md5"}
    assert ndcache.load(damaged.source).manifest.shards  # fetched again


def test_verify_counts_bytes_as_they_are_read_and_checks_small_models_together(
    urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The five files of all three models are read at once, and reports say how much of them was."""
    reports: list[ndcache.ProgressReport] = []
    all_are_read, told = threading.Barrier(5), threading.Event()

    def read(hashers: Any, file: BinaryIO, check: Any, count: Callable[[int], None]) -> None:
        all_are_read.wait(30)
        count(1 << 15)
        assert told.wait(30)
        update_from_file(hashers, file, check, lambda nbytes: count(nbytes // 2))

    def listen(report: ndcache.ProgressReport) -> None:
        reports.append(report)
        if report.bytes_done == (5 << 15) + (1 << 16):  # and there is nothing to read of the missing one
            told.set()

    monkeypatch.setattr(integrity, "update_from_file", read)
    found = ndcache.cache.verify(progress=listen, progress_interval=0.01)
    assert [report.ok for _, report in found] == [True] * 3
    assert told.is_set()
    assert [report.bytes_done for report in reports] == sorted(report.bytes_done for report in reports)
    assert reports[-1].bytes_done == reports[-1].bytes_total == 6 << 16


def test_the_cache_is_tagged_unless_the_directory_has_other_things(
    tmp_path: Path, urls: dict[str, str], cache_dir: Path
) -> None:
    assert (cache_dir / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    ndcache.fetch(urls["one"], cache_dir=tmp_path / "mine")
    assert not (tmp_path / "mine" / "CACHEDIR.TAG").exists()


def test_the_last_use_is_that_of_loads_and_not_of_looks(urls: dict[str, str]) -> None:
    def used() -> list[float]:
        return [model.last_used.timestamp() for model in ndcache.cache.models()]

    before = used()
    ndcache.verify(urls["one"])
    ndcache.is_cached(urls["one"])
    ndcache.read_manifest(urls["one"])
    assert used() == before
    ndcache.load(urls["one"], offline=True).close()
    assert time.time() - used()[0] < 60
    (model,) = (model for model in ndcache.cache.models() if "one" in model.source)
    use(model, 3)
    with ndcache.load(model.path):  # in place
        (again,) = (model for model in ndcache.cache.models() if "one" in model.source)
        assert again.in_use
        assert again.last_used - model.last_used < timedelta(minutes=5)


def test_nothing_is_left_of_a_model_that_is_deleted_while_it_is_used(urls: dict[str, str], cache_dir: Path) -> None:
    with ndcache.load(urls["third"]):
        ndcache.delete(urls["third"])
    for name in ("one", "other"):
        ndcache.delete(urls[name])
    assert [path for path in cache_dir.glob("*/*") if path.is_dir()] == []


def test_pruning_is_no_use_of_a_model(urls: dict[str, str]) -> None:
    (model,) = (model for model in ndcache.cache.models() if "one" in model.source)
    (model.path / ".ndcache" / "used").unlink()  # as earlier versions of ndcache left it
    aside = model.path / ".ndcache" / "aside"
    aside.mkdir()
    (aside / "params_shard_0.bin").write_bytes(b"bad")
    assert ndcache.cache.prune(aside=True).freed == 3
    assert not (model.path / ".ndcache" / "used").exists()


def test_a_model_has_a_repr_that_one_can_read(urls: dict[str, str]) -> None:
    (model,) = (model for model in ndcache.cache.models() if "other" in model.source)
    used = f"{model.last_used:%Y-%m-%d %H:%M}"
    size = f"{model.size / 1024:.1f}"
    assert repr(model) == f"<CachedModel {urls['other']}: 1 of 2 shards, {size} KiB, last used {used} UTC>"


@pytest.mark.parametrize(
    ("pattern", "is_meant"),
    [("http://[::1]:80/*", True), ("*/a?b", True), ("http://[::1]:80/a?*", True), ("*/aXb", False), ("*/a[?]b", False)],
)
def test_only_stars_have_a_meaning_in_patterns(urls: dict[str, str], pattern: str, is_meant: bool) -> None:
    model = dataclasses.replace(ndcache.cache.models()[0], source="http://[::1]:80/a?b")
    assert match_source(pattern)(model) is is_meant


@pytest.mark.parametrize(
    ("text", "size"),
    [("50GB", 50 * 10**9), ("1.5 GiB", 3 << 29), ("10k", 10_000), ("1kib", 1024), ("7", 7), (8, 8), ("0", 0)],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 30 * DAY), ("12h", DAY / 2), ("1.5m", 90), ("2 weeks", 14 * DAY), (timedelta(1), DAY), ("0", 0), (0, 0)],
)
def test_durations(text: Any, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 potato", "1e3", float("nan"), -1, "9" * 400 + "y", math.inf])
def test_what_is_no_size_and_no_duration(text: Any) -> None:
    for parse in (parse_size, parse_duration):
        with pytest.raises(ValueError, match="is no "):
            parse(text)


# --- models of other accounts ---------------------------------------------------------------------------

AS_ANOTHER_ACCOUNT = """
import contextlib, io, os, sys
from ndcache.cli.commands import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main(sys.argv[1:], prog_name="ndcache")  # that account may not read the modules
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
main(sys.argv[1:], prog_name="ndcache")
"""


@pytest.mark.once
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another account")
@pytest.mark.parametrize("args", [["ls"], ["prune", "--partial"], ["verify", "--all"]], ids=" ".join)
def test_models_that_this_account_may_not_read_are_named(args: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:  # every account can enter it, unlike pytest's own
        os.chmod(place, 0o755)
        simple_model(Path(place, "model"), shards=1)
        root = Path(place, "cache")
        with contextlib.closing(FileServer(Path(place, "model"))) as server:
            hidden = ndcache.fetch(server.url, cache_dir=root)
            other = ndcache.fetch(server.url, cache_dir=root, scope="other").parent
        for folder, mode in ((root, 0o755), (root / "default", 0o755), (hidden, 0o700), (other, 0o700)):
            folder.chmod(mode)
        command = [sys.executable, "-c", AS_ANOTHER_ACCOUNT, *args, "--json", "--cache-dir", str(root)]
        found = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
    warning = f"warning: 2 folders of the cache left out, as this account may not read them: {other}, {hidden}\n"
    assert warning in found.stderr
    value = json.loads(found.stdout)
    unreadable = value["unreadable"] if args[0] == "prune" else [each["path"] for each in value if "error" in each]
    assert unreadable == [str(other), str(hidden)]


def test_verify_all_of_an_empty_cache_says_so() -> None:
    result = invoke("verify", "--all")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "the cache is empty\n")
