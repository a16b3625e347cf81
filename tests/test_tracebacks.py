"""Tracebacks of expected errors are short, and hide nothing that a person may need."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache import mlc
from ndcache.caller import PublicFrame

from .helpers import models
from .helpers.requirements import need_module

NOWHERE = "/nowhere/model"


def frames(error: BaseException) -> list[str]:
    """Return the names of ndcache's functions in a traceback."""
    package = os.path.dirname(ndcache.__file__)
    return [each.name for each in traceback.extract_tb(error.__traceback__) if each.filename.startswith(package)]


def closed_weights() -> ndcache.Weights[Any]:
    with tempfile.TemporaryDirectory() as directory:
        ndcache.dump({"x": np.ones(3, np.float32)}, directory)
        weights = ndcache.load(directory, copy=True)
    weights.close()
    return weights


CALLS: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "load": (lambda: ndcache.load(NOWHERE), ndcache.NotFoundError),
    "fetch": (lambda: ndcache.fetch(NOWHERE), ndcache.NotFoundError),
    "stream": (lambda: ndcache.stream(NOWHERE), ndcache.NotFoundError),
    "verify": (lambda: ndcache.Loader().verify(NOWHERE), ndcache.NotFoundError),
    "__init__": (lambda: ndcache.Loader(max_worker=2), TypeError),  # type: ignore[call-arg]
    "dump": (lambda: ndcache.dump({"a": object()}, NOWHERE), ndcache.UnsupportedDtypeError),
    "prune": (lambda: ndcache.cache.prune(keep_last=-1), ValueError),
    "fetch_ndarray_cache": (lambda: ndcache.tvm.fetch_ndarray_cache(NOWHERE), ndcache.NotFoundError),
    "fetch_with_cache": (lambda: ndcache.tvm.ArtifactCache().fetch_with_cache(NOWHERE), ndcache.NotFoundError),
    "fetch_file": (lambda: ndcache.Loader(offline=True).fetch_file("https://host/x.json"), ndcache.OfflineError),
    "__getitem__": (lambda: closed_weights()["x"], ValueError),
    "__len__": (lambda: len(closed_weights()), ValueError),
    "__iter__": (lambda: list(closed_weights()), ValueError),
    "__contains__": (lambda: "x" in closed_weights(), ValueError),
    "match": (lambda: closed_weights().match("*"), ValueError),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_expected_error_has_one_frame(name: str) -> None:
    call, kind = CALLS[name]
    with pytest.raises(kind) as caught:
        call()
    assert frames(caught.value) == [name]


@pytest.mark.parametrize("kind", [ndcache.Loader, ndcache.Weights, ndcache.tvm.ArtifactCache])
def test_methods_are_folded(kind: type[Any]) -> None:
    shown = {
        name
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and "__tracebackhide__" not in method.__code__.co_varnames
    }
    assert shown - {"get", "items", "keys", "values"} == {"close"}  # those of Mapping


def test_errors_of_arguments_have_one_frame(tmp_path: Path) -> None:
    models.simple_model(tmp_path, shards=1)
    cases: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"max_workers": 0}, ValueError),
        ({"names": ["layer.7"]}, KeyError),
        ({"nam": 1}, TypeError),
    ]
    for wrong, kind in cases:
        with pytest.raises(kind) as caught:
            ndcache.load(tmp_path, **wrong)
        assert frames(caught.value) == ["load"]


#: Public functions by the names of their frames; arguments of the wrong type, and the text that the error has.
WRONG: list[tuple[str, Callable[..., Any], dict[str, Any], str]] = [
    ("load", ndcache.load, {"names": 5}, "names must be a text or several texts, not 5"),
    ("load", ndcache.load, {"trace": 5}, "trace must be a path or None, not 5"),
    ("load", ndcache.Loader().load, {"report": 5}, "report must be a path or None, not 5"),
    ("stream", ndcache.stream, {"trace": 5}, "trace must be a path or None, not 5"),
    ("fetch", ndcache.fetch, {"include": 5}, "include must be a text or several texts, not 5"),
    ("fetch", ndcache.fetch, {"exclude": [1]}, "exclude must be a text or several texts, not [1]"),
    ("fetch", ndcache.fetch, {"local_dir": 5}, "local_dir must be a path or None, not 5"),
    ("convert", ndcache.convert, {"target": 5}, "target must be a path, not 5"),
    ("convert", ndcache.convert, {"target": "x", "shard_bytes": 2.5}, "shard_bytes must be a number of bytes, not 2.5"),
    ("convert", ndcache.convert, {"target": "x", "metadata": 5}, "metadata must be a mapping, not int"),
    ("lock", ndcache.Loader().lock, {"path": 5}, "path must be a path or None, not 5"),
]


@pytest.mark.parametrize(("name", "function", "wrong", "text"), WRONG, ids=[f"{each[0]}-{each[3]}" for each in WRONG])
def test_arguments_of_wrong_types_are_named_and_have_one_frame(
    tmp_path: Path, name: str, function: Callable[..., Any], wrong: dict[str, Any], text: str
) -> None:
    models.simple_model(tmp_path, shards=1)
    with pytest.raises(TypeError) as caught:
        function(tmp_path, **wrong)
    assert (str(caught.value), frames(caught.value)) == (text, [name])


#: Public functions by the names of their frames, and calls with a path.
PATHS: list[tuple[str, Callable[[str], Any]]] = [
    ("load", lambda path: ndcache.load(NOWHERE, trace=path)),
    ("stream", lambda path: ndcache.stream(NOWHERE, report=path)),
    ("fetch", lambda path: ndcache.fetch(NOWHERE, local_dir=path)),
    ("convert", lambda path: ndcache.convert(NOWHERE, path)),
    ("lock", lambda path: ndcache.Loader().lock(NOWHERE, path)),
    ("dump", lambda path: ndcache.dump({}, path)),
    ("models", lambda path: ndcache.cache.models(cache_dir=path)),
    ("prune", lambda path: ndcache.cache.prune(keep_last=0, cache_dir=path)),
    ("delete", lambda path: ndcache.cache.delete("*", cache_dir=path)),
    ("verify", lambda path: ndcache.cache.verify(cache_dir=path)),
]


@pytest.mark.parametrize(
    ("path", "text"), [("", "is empty$"), ("hf://owner/name", "must be a path on this machine, not 'hf://owner/name'$")]
)
@pytest.mark.parametrize(("name", "call"), PATHS, ids=[name for name, _ in PATHS])
def test_paths_that_are_empty_or_urls_are_refused(name: str, call: Callable[[str], Any], path: str, text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        call(path)
    assert frames(caught.value) == [name]


@pytest.mark.parametrize(
    ("name", "call", "text"),
    [
        ("dump", lambda: ndcache.dump(5, NOWHERE), "params must be"),  # type: ignore[arg-type]
        ("dump", lambda: ndcache.dump({}, 5), "directory must be"),  # type: ignore[arg-type]
        ("dump", lambda: ndcache.dump({}, NOWHERE, shard_bytes=0.5), "shard_bytes must"),  # type: ignore[arg-type]
        ("dump", lambda: ndcache.dump({}, NOWHERE, metadata="x"), "metadata must be"),  # type: ignore[arg-type]
        ("models", lambda: ndcache.cache.models(cache_dir=5), "cache_dir must be"),  # type: ignore[arg-type]
        ("verify", lambda: ndcache.cache.verify(cache_dir=5), "cache_dir must be"),  # type: ignore[arg-type]
        ("prune", lambda: ndcache.cache.prune(older_than=b"1d"), "a duration must be"),  # type: ignore[arg-type]
        ("prune", lambda: ndcache.cache.prune(max_size=b"1G"), "a size must be"),  # type: ignore[arg-type]
        ("dump_tensor_cache", lambda: ndcache.tvm.dump_tensor_cache({}, 5), "cache_dir must"),  # type: ignore[arg-type]
    ],
)
def test_other_arguments_of_wrong_types_have_one_frame(name: str, call: Callable[[], Any], text: str) -> None:
    with pytest.raises(TypeError, match=f"^{text}") as caught:
        call()
    assert frames(caught.value) == [name]


def test_a_selection_that_matches_nothing_has_one_frame(tmp_path: Path) -> None:
    models.simple_model(tmp_path, shards=1)
    manifest = ndcache.read_manifest(tmp_path)
    assert len(manifest.select(name for name in manifest)) == 1
    for wrong in ("zzz", 5):
        with pytest.raises((KeyError, TypeError)) as caught:
            manifest.select(wrong)  # type: ignore[arg-type]
        assert frames(caught.value) == ["select"]


@pytest.mark.parametrize("verb", ["load", "stream", "fetch"])
def test_unknown_arguments_of_methods_have_one_frame_and_say_where_options_belong(verb: str) -> None:
    call: Callable[..., Any] = getattr(ndcache.Loader(), verb)
    with pytest.raises(TypeError) as caught:
        call(NOWHERE, retries=3)
    assert frames(caught.value) == [verb]
    assert str(caught.value) == (
        f"Loader.{verb}() got an unexpected keyword argument 'retries'."
        f" It is an option of Loader: Loader(retries=…).{verb}(…)"
    )


def test_a_cause_that_is_an_error_of_ndcache_has_one_frame(tmp_path: Path, serve: Any) -> None:
    with pytest.raises(ndcache.NotFoundError) as caught:
        ndcache.load(serve(tmp_path).url)
    assert isinstance(caught.value.__cause__, ndcache.NotFoundError)
    assert len(frames(caught.value.__cause__)) == 1


@pytest.mark.once
def test_ipython_shows_the_line_of_the_caller_only(tmp_path: Path) -> None:
    need_module("IPython")
    cell = f"import ndcache\ndef mine():\n    ndcache.load({NOWHERE!r})\nmine()"
    script = f"import IPython; IPython.InteractiveShell.instance().run_cell({cell!r})"
    shown = {
        debug: subprocess.run(
            [sys.executable, "-c", script],
            check=False,
            env={**os.environ, "NDCACHE_DEBUG": debug, "IPYTHONDIR": str(tmp_path)},
            capture_output=True,
            text=True,
        ).stdout
        for debug in ("0", "1")
    }
    shown = {debug: re.sub(r"\x1b\[[0-9;]*m", "", text) for debug, text in shown.items()}
    assert "there is no such directory or file" in shown["0"]
    assert "in mine()" in shown["0"]
    assert "loading.py" not in shown["0"]
    assert "resolve.py" in shown["1"]


def test_a_policy_that_forbids_a_download_has_one_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLC_LLM_HOME", str(tmp_path))
    monkeypatch.setenv("MLC_DOWNLOAD_CACHE_POLICY", "OFF")
    with pytest.raises(RuntimeError, match="MLC_DOWNLOAD_CACHE_POLICY=OFF") as caught:
        mlc.download_and_cache_mlc_weights("HF://owner/name")
    assert frames(caught.value) == ["download_and_cache_mlc_weights"]


def test_the_cause_keeps_its_frames(tmp_path: Path) -> None:
    with pytest.raises(ndcache.ConnectError) as caught:
        ndcache.load("http://127.0.0.1:1/model/", cache_dir=tmp_path, retries=0)
    assert frames(caught.value) == ["load"]
    cause = caught.value.__cause__
    assert isinstance(cause, ConnectionRefusedError)
    assert len(frames(cause)) > 1


def test_an_error_while_iterating_has_one_frame(tmp_path: Path) -> None:
    models.simple_model(tmp_path, shards=2)
    arriving = ndcache.stream(tmp_path, max_workers=1, cancel=(cancel := threading.Event()))
    next(arriving)
    cancel.set()
    with pytest.raises(ndcache.CancelledError) as caught:
        list(arriving)
    assert len(frames(caught.value)) == 1


def test_errors_of_callbacks_and_bugs_keep_their_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.simple_model(tmp_path, shards=1)

    def progress(report: ndcache.ProgressReport) -> None:
        raise ValueError("of the callback")

    with pytest.raises(ValueError, match="of the callback") as caught:
        ndcache.load(tmp_path, progress=progress)
    assert len(frames(caught.value)) > 2
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "progress"

    monkeypatch.setattr(ndcache.Manifest, "select", lambda self, names: dict[str, int]()["a bug"])
    with pytest.raises(KeyError, match="a bug") as found:
        ndcache.load(tmp_path)
    assert len(frames(found.value)) > 2


def test_debugging_shows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDCACHE_DEBUG", "1")
    with pytest.raises(ndcache.NotFoundError) as caught:
        ndcache.load(NOWHERE)
    assert len(frames(caught.value)) > 2
    with PublicFrame() as hides:
        assert not hides


@pytest.mark.once
def test_pytest_folds_the_public_function(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text(f"import ndcache\n\ndef test_it():\n    ndcache.load({NOWHERE!r})\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    shown = {
        debug: subprocess.run(
            command,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "NDCACHE_DEBUG": debug},
            capture_output=True,
            text=True,
        ).stdout
        for debug in ("0", "1")
    }
    assert "NotFoundError" in shown["0"]
    assert ">       ndcache.load(" in shown["0"] or ">   ndcache.load(" in shown["0"].replace("      ", "  ")
    assert "loading.py" not in shown["0"]
    assert "resolve.py" in shown["1"]
