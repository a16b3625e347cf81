"""Configuration and tokenizer come with the weights; rows 92 to 94 of docs/faults.rst."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.format.strict_json import MAX_KEPT_BYTES

from ..helpers.companions import mlc_model, write_json
from ..helpers.models import simple_model
from ..helpers.servers import FileServer, ScriptedServer, reply

Serve = Callable[..., FileServer]
CONFIG, PACKAGE = "mlc-chat-config.json", "mlc-model-manifest.json"
COMPANIONS = [CONFIG, "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    mlc_model(tmp_path / "model")
    return tmp_path / "model"


def asked(server: FileServer) -> list[str]:
    """Return the files asked for since the last call, without the shards."""
    paths = [request.path.lstrip("/") for request in server.requests]
    server.requests.clear()
    return [path for path in paths if not path.endswith(".bin")]


def same_files(directory: Path, model: Path) -> set[str]:
    """Return the names of files that are the same in both directories."""
    files = (path for path in directory.iterdir() if path.is_file())
    return {path.name for path in files if path.read_bytes() == (model / path.name).read_bytes()}


@pytest.mark.parametrize("verb", ["load", "stream", "fetch"])
def test_a_new_model_comes_with_its_companions_and_is_not_asked_again(model: Path, serve: Serve, verb: str) -> None:
    server = serve(model)

    def use() -> None:
        result = getattr(ndcache, verb)(server.url)
        if verb == "stream":
            list(result)

    use()
    assert asked(server) == ["tensor-cache.json", *COMPANIONS]
    use()
    assert asked(server) == ["tensor-cache.json"]
    assert server.probes == 1, f"{PACKAGE} is absent, which is remembered"
    directory = ndcache.fetch(server.url)
    assert asked(server) == ["tensor-cache.json"]
    assert same_files(directory, model) == {path.name for path in model.iterdir()}


def test_files_are_asked_for_once_shards_have_begun_and_counted_apart(model: Path, serve: Serve) -> None:
    server = serve(model)
    server.gate.clear()
    with ndcache.Loader() as loader:
        found: list[ndcache.Weights[Any]] = []
        thread = threading.Thread(target=lambda: found.append(loader.load(server.url)))
        thread.start()
        while not any(request.path.endswith("tokenizer_config.json") for request in list(server.requests)):
            time.sleep(0.001)
        server.gate.set()
        thread.join(60)
    (weights,) = found
    stats, sizes = weights.stats, [(model / name).stat().st_size for name in COMPANIONS]
    assert (stats.files, stats.file_bytes, stats.failed_files) == (tuple(COMPANIONS), sum(sizes), {})
    assert stats.network_bytes == weights.manifest.nbytes, "the bytes of shards, which the progress is about"
    weights.close()


def test_a_changed_manifest_asks_again_with_conditions_and_force_without(model: Path, serve: Serve) -> None:
    server = serve(model)
    ndcache.fetch(server.url)
    asked(server)
    write_json(model / "tokenizer.json", {"version": "2.0"})
    ndcache.load(server.url).close()
    assert asked(server) == ["tensor-cache.json"], "the manifest is the same"
    ndcache.fetch(server.url, force=True)
    conditions = [request.headers.get("if-none-match") for request in server.requests if "token" in request.path]
    assert len(conditions) == 2
    assert not any(conditions), "everything is sent again"
    asked(server)
    manifest = json.loads((model / "tensor-cache.json").read_text())
    write_json(model / "tensor-cache.json", {**manifest, "metadata": {"version": 2}})
    (model / "tokenizer_config.json").unlink()
    write_json(model / CONFIG, {"tokenizer_files": ["tokenizer.json"]})
    ndcache.load(server.url).close()
    conditions = [request.headers.get("if-none-match") for request in server.requests if "token" in request.path]
    assert all(conditions), "what has not changed is not sent again"
    directory = ndcache.fetch(server.url)
    assert asked(server).count("tokenizer.json") == 1
    assert same_files(directory, model) == {path.name for path in model.iterdir()}
    assert not (directory / "tokenizer_config.json").exists(), "the server has it no longer"


def test_the_package_manifest_names_the_configuration(model: Path, serve: Serve) -> None:
    shutil.move(model / CONFIG, model / "chat.json")
    write_json(model / PACKAGE, {"schema": "mlc.model-package", "chat_config": "chat.json"})
    server = serve(model)
    directory = ndcache.fetch(server.url)
    assert asked(server) == ["tensor-cache.json", PACKAGE, "chat.json", *COMPANIONS[1:]]
    assert same_files(directory, model) == {path.name for path in model.iterdir()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"files": False}, set()),
        ({"exclude": ["*_config.json"]}, {CONFIG, "tokenizer.json"}),
        ({"exclude": CONFIG}, set()),
        ({"include": ["README.md", "model.py"]}, {*COMPANIONS, "README.md", "model.py"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_files_include_and_exclude(model: Path, serve: Serve, options: dict[str, Any], expected: set[str]) -> None:
    for name in ("README.md", "model.py", "other.txt"):
        (model / name).write_text(name)
    server = serve(model)
    directory = ndcache.fetch(server.url, **options)
    shards = {"tensor-cache.json", *(path.name for path in model.glob("*.bin"))}
    assert same_files(directory, model) - shards == expected
    asked(server)
    ndcache.fetch(server.url, **options)
    ndcache.load(server.url, files=False).close()
    assert asked(server) == ["tensor-cache.json"] * 2


def test_a_name_that_was_wrong_is_not_asked_for_again(model: Path, serve: Serve) -> None:
    (model / "README.md").write_text("read me")
    server = serve(model)
    with pytest.raises(ndcache.NotFoundError, match=r"READNE\.md"):
        ndcache.fetch(server.url, include="READNE.md")
    directory = ndcache.fetch(server.url, include="README.md")
    assert same_files(directory, model) == {path.name for path in model.iterdir()}


def test_a_pattern_needs_a_listing(model: Path, serve: Serve) -> None:
    with pytest.raises(ValueError, match=r"'\*\.md'.*give exact names"):
        ndcache.fetch(serve(model).url, include=["*.md"])


# --- failures -----------------------------------------------------------------------------------------


def fails(server: FileServer, error: type[ndcache.NdcacheError], name: str) -> str:
    """Check that `fetch` raises and keeps the shards, and that `load` warns once and names the file."""
    with pytest.raises(error, match=name) as caught:
        ndcache.fetch(server.url, retries=0)
    assert caught.value.shard == name
    assert ndcache.is_cached(server.url)
    ndcache.delete(server.url)
    with pytest.warns(RuntimeWarning, match="the companion file .* was not fetched") as warned:
        weights = ndcache.load(server.url, retries=0)
    assert len(warned) == 1
    assert list(weights.stats.failed_files) == [name]
    weights.close()
    return str(caught.value)


def test_row_92_a_companion_that_is_missing_or_fails(model: Path, serve: Serve) -> None:
    (model / "tokenizer.json").unlink()
    server = serve(model)
    fails(server, ndcache.NotFoundError, "tokenizer.json")
    asked(server)
    weights = ndcache.load(server.url)
    assert asked(server) == ["tensor-cache.json"], "it will not be there before the model changes"
    assert list(weights.stats.failed_files) == ["tokenizer.json"]
    weights.close()
    mlc_model(model)
    directory = ndcache.fetch(server.url)  # asks for what it lacks
    assert (directory / "tokenizer.json").exists()
    ndcache.delete(server.url)
    server.status["/tokenizer.json"] = 500
    fails(server, ndcache.ServerError, "tokenizer.json")
    del server.status["/tokenizer.json"]
    ndcache.load(server.url).close()  # a failure that may pass is tried again
    assert (directory / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../tokenizer.json", "'..' component"),
        ("/etc/passwd", "absolute"),
        (".ndcache/source.json", "own folder"),
        ("Params_shard_0.bin", "take the place of another file"),
        ("tensor-cache.json/x", "take the place of another file"),
        ("tokenizer.py", "may hold code"),
        ("weights.pkl", "may hold code"),
    ],
)
def test_row_93_a_companion_that_must_not_be_fetched(model: Path, serve: Serve, name: str, message: str) -> None:
    write_json(model / CONFIG, {"tokenizer_files": [name]})
    server = serve(model)
    assert message in fails(server, ndcache.UnsafePathError, name)
    assert not any(name in request.path for request in server.requests)


@pytest.mark.parametrize("length", [(64 << 20) + 1, None], ids=["announced", "endless"])
def test_row_94_a_companion_that_is_too_large(
    model: Path, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, length: int | None
) -> None:
    monkeypatch.setattr("ndcache.companions.request.MAX_FILE_BYTES", 1000 if length is None else 64 << 20)
    for path in model.iterdir():
        scripted.script[f"/{path.name}"] = [reply(200, path.read_bytes())]
    scripted.script["/tokenizer_config.json"] = [reply(200, b" " * 2000, length=length)]
    with pytest.raises(ndcache.SizeMismatchError, match="tokenizer_config"):
        ndcache.fetch(scripted.url, retries=0)
    assert ndcache.is_cached(scripted.url)


@pytest.mark.parametrize(
    ("config", "message"),
    [(b"{", "is not JSON"), (b"[]", "not a JSON object"), (b'{"tokenizer_files": "x"}', "not an array of strings")],
)
def test_a_configuration_that_cannot_be_read(model: Path, serve: Serve, config: bytes, message: str) -> None:
    (model / CONFIG).write_bytes(config)
    with pytest.raises(ndcache.ManifestSyntaxError, match=message):
        ndcache.fetch(serve(model).url)


def test_a_web_page_in_place_of_a_file(model: Path, scripted: ScriptedServer) -> None:
    """A server that sends its front page for every unknown path has no configuration."""
    simple_model(model.parent / "plain")
    for path in (model.parent / "plain").iterdir():
        scripted.script[f"/{path.name}"] = [reply(200, path.read_bytes())]
    page = reply(200, b"<html>", {"Content-Type": "text/html; charset=utf-8"})
    scripted.script |= {f"/{name}": [page] for name in (CONFIG, PACKAGE)}
    assert {path.name for path in ndcache.fetch(scripted.url).iterdir()} == {
        ".ndcache",
        *(path.name for path in (model.parent / "plain").iterdir()),
    }
    asked = [request.path for request in scripted.requests]
    assert [asked.count(f"/{name}") for name in (CONFIG, PACKAGE)] == [1, 1], "what is not there is asked for once"


# --- the cache ----------------------------------------------------------------------------------------


def test_verify_sets_aside_a_damaged_companion_and_the_next_load_fetches_it(model: Path, serve: Serve) -> None:
    server = serve(model)
    directory = ndcache.fetch(server.url)
    report = ndcache.verify(server.url)
    assert report.files == tuple(COMPANIONS)
    assert {name: report.checked[name] for name in COMPANIONS} == dict.fromkeys(COMPANIONS, "sha256")
    (directory / "tokenizer.json").write_text("damaged")
    (directory / "tokenizer_config.json").unlink()
    report = ndcache.verify(server.url)
    assert (report.bad, report.missing) == (("tokenizer.json",), ("tokenizer_config.json",))
    ndcache.load(server.url).close()
    assert ndcache.verify(server.url).ok
    assert same_files(directory, model) == {path.name for path in model.iterdir()}


def test_verify_of_a_directory_compares_what_was_noted_and_only_reads(
    model: Path, serve: Serve, tmp_path: Path
) -> None:
    target = ndcache.fetch(serve(model).url, local_dir=tmp_path / "target", exclude="tokenizer_config.json")
    report = ndcache.verify(target)
    assert (report.ok, report.missing, report.files) == (True, (), (CONFIG, "tokenizer.json"))
    assert {report.checked[name] for name in report.files} == {"sha256"}
    (target / "tokenizer.json").write_text("damaged")
    (target / CONFIG).unlink()
    report = ndcache.verify(target)
    assert (report.ok, report.bad, report.missing) == (False, ("tokenizer.json",), (CONFIG,))
    assert (target / "tokenizer.json").read_text() == "damaged"


def test_verify_of_a_directory_that_ndcache_did_not_make(model: Path, tmp_path: Path) -> None:
    from ..helpers.served_manifests import sri

    assert ndcache.verify(model).files == (), "nothing is known of them, and they are there"
    required = {"tensor-cache.json": sri((model / "tensor-cache.json").read_bytes()), "tokenizer.json": sri(b"other")}
    assert ndcache.verify(model, integrity=required).bad == ("tokenizer.json",)
    copied = ndcache.fetch(model, local_dir=tmp_path / "copied", exclude="tokenizer_config.json")
    assert ndcache.verify(copied).checked["tokenizer.json"] == "size"
    assert ndcache.verify(copied).missing == ()
    (model / "tokenizer.json").unlink()
    assert ndcache.verify(model).missing == ("tokenizer.json",), "the configuration lists it"


def test_verify_names_files_that_could_not_be_fetched(model: Path, serve: Serve) -> None:
    (model / "tokenizer.json").unlink()
    server = serve(model)
    server.status["/tokenizer_config.json"] = 500
    with pytest.raises(ndcache.NdcacheError):
        ndcache.fetch(server.url, retries=0)
    report = ndcache.verify(server.url)
    assert set(report.missing) == {"tokenizer.json", "tokenizer_config.json"}


def test_an_edited_file_is_kept_aside_when_the_server_has_a_new_one(model: Path, serve: Serve) -> None:
    server = serve(model)
    directory = ndcache.fetch(server.url)
    (directory / CONFIG).write_text("mine")
    write_json(model / CONFIG, {"tokenizer_files": []})
    ndcache.fetch(server.url, force=True)
    assert json.loads((directory / CONFIG).read_text()) == {"tokenizer_files": []}
    assert (directory / ".ndcache" / "aside" / CONFIG).read_text() == "mine"


def test_a_warm_load_reads_no_companion(model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clean-up at the end of a load must not take a large tokenizer for a manifest that it does not know."""
    server = serve(model)
    ndcache.load(server.url).close()
    opened: list[str] = []
    real = ndcache.store.directory.ModelDirectory.read  # type: ignore[attr-defined]

    def noting(self: Any, name: str, limit: int) -> bytes | None:
        opened.append(name)
        assert limit <= MAX_KEPT_BYTES
        found: bytes | None = real(self, name, limit)
        return found

    monkeypatch.setattr("ndcache.store.directory.ModelDirectory.read", noting)
    ndcache.load(server.url).close()
    assert set(opened) == {"tensor-cache.json"}


def test_offline_needs_what_was_there(model: Path, serve: Serve) -> None:
    server = serve(model)
    directory = ndcache.fetch(server.url)
    ndcache.fetch(server.url, offline=True)
    (directory / "tokenizer.json").unlink()
    ndcache.load(server.url, offline=True).close()
    with pytest.raises(ndcache.OfflineError, match=r"tokenizer\.json") as caught:
        ndcache.fetch(server.url, offline=True)
    assert caught.value.missing == ("tokenizer.json",)


@pytest.mark.parametrize("is_lost", [False, True])
def test_offline_into_a_directory(model: Path, serve: Serve, tmp_path: Path, is_lost: bool) -> None:
    """The directory has no note yet: that of the cache says what there must be."""
    server = serve(model)
    directory = ndcache.fetch(server.url)
    (directory / ".ndcache" / "companions.json").write_text(  # as a load leaves it, after which one is asked for again
        (directory / ".ndcache" / "companions.json")
        .read_text()
        .replace('"pending": []', '"pending": ["tokenizer.json"]')
    )
    if is_lost:
        (directory / "tokenizer.json").unlink()
        with pytest.raises(ndcache.OfflineError, match=r"tokenizer\.json"):
            ndcache.fetch(server.url, offline=True, local_dir=tmp_path / "mine")
        with pytest.raises(ndcache.OfflineError, match=r"tokenizer\.json"):
            ndcache.fetch(server.url, offline=True, local_dir=tmp_path / "mine", dry_run=True)
    else:
        mine = ndcache.fetch(server.url, offline=True, local_dir=tmp_path / "mine")
        assert same_files(mine, model) == {path.name for path in model.iterdir()}
