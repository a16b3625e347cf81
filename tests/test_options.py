"""The options of a loader: described once, and the same in every signature."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache import cached, loader, loaders
from ndcache.api import fetching, loading, streaming
from ndcache.loaders import tensors
from ndcache.options import OPTION_NAMES, LoaderOptions

VERBS = ["load", "stream", "fetch", "read_manifest", "is_cached", "verify", "delete"]

#: The keyword arguments of one definition: name, annotation, default.
Keywords = list[tuple[str, str, Any]]


def keywords_by_function(module: Any) -> dict[str, list[Keywords]]:
    """Return the keyword-only arguments of each function and method of a module, once for each of its overloads."""
    found: dict[str, list[Keywords]] = {}
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            keywords = [
                (each.arg, ast.unparse(each.annotation or ast.Constant(None)), eval(ast.unparse(default)))
                for each, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                if default is not None
            ]
            if node.args.kwarg is None:
                found.setdefault(node.name, []).append(keywords)
    return found


OPTIONS: Keywords = [
    (option.name, ast.unparse(ast.parse(str(option.type))), option.default)
    for option in dataclasses.fields(LoaderOptions)
]


@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        (loader, "__init__", 1),
        (loading, "load", 4),
        (streaming, "stream", 4),
        (fetching, "fetch", 2),
        *((cached, name, 1) for name in ("read_manifest", "is_cached", "verify", "delete")),
    ],
)
def test_signatures_repeat_the_options(module: Any, name: str, count: int) -> None:
    """Compare names, order, types and defaults with `LoaderOptions`."""
    signatures = keywords_by_function(module)[name]
    assert len(signatures) == count
    for keywords in signatures:
        assert keywords[-len(OPTIONS) :] == OPTIONS


@pytest.mark.parametrize(
    ("methods", "module", "name"),
    [(tensors, loading, "load"), (tensors, streaming, "stream"), (loaders.fetching, fetching, "fetch")],
)
def test_loader_methods_repeat_the_other_arguments(methods: Any, module: Any, name: str) -> None:
    own = keywords_by_function(methods)[name]
    assert own == [keywords[: -len(OPTIONS)] for keywords in keywords_by_function(module)[name]]
    assert all(own)


@pytest.mark.parametrize("name", VERBS)
def test_the_signature_at_run_time_is_that_of_type_checkers(name: str) -> None:
    parameters = inspect.signature(getattr(ndcache, name)).parameters
    assert [each for each in parameters.values() if each.kind is each.VAR_KEYWORD] == []
    assert list(parameters)[-len(OPTION_NAMES) :] == list(OPTION_NAMES)
    assert [parameters[option].default for option in OPTION_NAMES] == [default for _, _, default in OPTIONS]


@pytest.mark.parametrize("target", [*(getattr(ndcache, name) for name in VERBS), ndcache.Loader])
def test_docstrings_have_the_options_with_their_meaning(target: Any) -> None:
    text = inspect.getdoc(target) or ""
    for option in dataclasses.fields(LoaderOptions):
        assert f"\n{option.name} : {option.metadata['kind']}" in text
        assert option.metadata["meaning"][:30] in text
    assert "{options}" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_options_are_frozen_and_checked() -> None:
    options = LoaderOptions(max_workers=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.max_workers = 4  # type: ignore[misc]
    with pytest.raises(ValueError, match="max_workers must be a number of at least 1, not 0"):
        dataclasses.replace(options, max_workers=0)


# --- mistakes -----------------------------------------------------------------------------------------


def unknown_keyword(call: Callable[[], object]) -> str:
    with pytest.raises(TypeError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", VERBS)
def test_an_unknown_option_is_named_with_a_suggestion(name: str) -> None:
    verb = getattr(ndcache, name)
    assert unknown_keyword(lambda: verb("http://host/", max_worker=3)) == (
        f"{name}() got an unexpected keyword argument 'max_worker'. Did you mean 'max_workers'?"
    )
    assert unknown_keyword(lambda: verb("http://host/", zzz=3)) == f"{name}() got an unexpected keyword argument 'zzz'"


def test_an_unknown_option_of_a_loader_is_named_with_a_suggestion() -> None:
    call: Any = ndcache.Loader
    assert unknown_keyword(lambda: call(ofline=True)).endswith("argument 'ofline'. Did you mean 'offline'?")


@pytest.mark.parametrize("name", ["load", "stream", "fetch"])
@pytest.mark.parametrize("owner", [ndcache, ndcache.Loader()], ids=["function", "method"])
def test_unknown_arguments_are_named_with_a_suggestion(name: str, owner: Any) -> None:
    verb = getattr(owner, name)
    assert "Did you mean 'progress'?" in unknown_keyword(lambda: verb("http://host/", progres=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_workers": 0}, "max_workers"),
        ({"processes": 0}, "processes"),
        ({"processes": "all"}, "processes"),
        ({"memory_limit": 0}, "memory_limit"),
        ({"verify": "sometimes"}, "verify"),
        ({"scope": ""}, "scope"),
        ({"scope": "../x"}, "scope"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": (1, 2, 3)}, "timeout"),
        ({"timeout": (1, "2")}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"cache_dir": ""}, "cache_dir must be a path on this machine, not ''$"),
        ({"cache_dir": "hf://owner/name"}, "cache_dir must be a path on this machine"),
        ({"limit_rate": 0}, "limit_rate"),
        ({"limit_rate": float("nan")}, "limit_rate"),
        ({"limit_rate": "10 Mbit/s"}, "limit_rate"),
        ({"limit_rate": "0"}, "limit_rate"),
        ({"progress_interval": -1}, "progress_interval"),
        ({"revision": ""}, "revision must be a branch, a tag or a commit, not ''$"),
    ],
)
def test_options_have_values_that_make_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ndcache.Loader(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_workers": "3"},
        {"max_workers": True},
        {"processes": True},
        {"processes": 1.5},
        {"memory_limit": "1G"},
        {"verify": None},
        {"scope": 3},
        {"timeout": "3"},
        {"timeout": None},
        {"retries": "3"},
        {"retries": 1.5},
        {"offline": "no"},
        {"session": "x"},
        {"cancel": True},
        {"cache_dir": 3},
        {"limit_rate": b"1M"},
        {"limit_rate": True},
        {"progress_interval": "1"},
        {"revision": 1},
        {"token": 1},
        {"headers": [("a", "b")]},
    ],
    ids=str,
)
def test_options_have_types(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        ndcache.Loader(**options)


def test_errors_say_that_an_option_may_be_none_where_that_helps() -> None:
    with pytest.raises(TypeError, match=r"^revision must be a branch, a tag or a commit, or None, not 3$"):
        ndcache.Loader(revision=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^token must be a text without spaces or control characters$"):
        ndcache.Loader(token="a b")


@pytest.mark.parametrize(
    "options",
    [
        {"token": ""},
        {"token": "secret secret"},
        {"token": "secret\r\nHost: x"},
        {"token": b"secret"},
        {"headers": {"secret": 1}},
        {"headers": {"X-Key": "secret\n"}},
        {"headers": {"X Key": "secret"}},
        {"headers": {"range": "secret"}},
    ],
    ids=str,
)
def test_errors_about_secret_options_do_not_show_them(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))) as caught:
        ndcache.Loader(**options)
    assert "secret" not in str(caught.value)


def test_the_representation_of_options_has_no_secrets() -> None:
    assert "secret" not in repr(LoaderOptions(token="secret", headers={"X-Key": "secret"}))


@pytest.mark.parametrize("verb", [ndcache.load, ndcache.stream])
def test_a_report_goes_to_a_path(verb: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="report must be a path or None, not 3"):
        verb(tmp_path, report=3)


@pytest.mark.parametrize(
    ("verb", "flag"),
    [
        *(("load", flag) for flag in ("decode", "copy", "files")),
        *(("stream", flag) for flag in ("decode", "copy", "files")),
        *(("fetch", flag) for flag in ("files", "force", "dry_run")),
        ("convert", "decode"),
    ],
)
def test_a_flag_is_true_or_false(tmp_path: Path, verb: str, flag: str) -> None:
    more = (tmp_path / "target",) if verb == "convert" else ()
    with pytest.raises(TypeError, match=f"^{flag} must be True or False, not 'float16'"):
        getattr(ndcache, verb)(tmp_path, *more, **{flag: "float16"})
