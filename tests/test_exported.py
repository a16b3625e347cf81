"""The public names of ndcache: complete, documented, and imported only when used."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ndcache
import ndcache.torch
from ndcache import api, cached, dump, errors, tvm

API = [
    *("load", "stream", "fetch", "read_manifest", "is_cached", "verify", "delete", "dump", "convert", "Loader"),
    *("Weights", "GPUTensor", "Manifest", "Shard", "Record"),
    *("ProgressReport", "VerifyReport", "ConvertReport", "FetchPlan", "PlannedFile", "LoadStats", "RetryPolicy"),
    "__version__",
]

MODULES = sorted(
    found.name for found in pkgutil.walk_packages(ndcache.__path__, "ndcache.") if found.name != "ndcache.__main__"
)


def test_all_is_complete() -> None:
    assert set(ndcache.__all__) == {*API, *errors.__all__}
    assert set(api.__all__) | set(cached.__all__) <= set(ndcache.__all__)
    public = {name for name, value in vars(ndcache).items() if not name.startswith("_")}
    others = {name for name in public if not isinstance(getattr(ndcache, name), ModuleType)} - set(ndcache.__all__)
    assert others <= {"annotations"}


def test_all_is_sorted_and_without_repetition() -> None:
    assert ndcache.__all__ == sorted(set(ndcache.__all__), key=_as_ruff_sorts)


def test_all_and_the_imports_can_be_read_without_running_anything() -> None:
    """Editors and type checkers see what `import ndcache` gives."""
    tree = ast.parse(Path(ndcache.__file__).read_text(encoding="utf-8"))
    assigned = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert ast.literal_eval(assigned["__all__"]) == ndcache.__all__
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    names = {alias.asname for node in imported for alias in node.names if alias.asname == alias.name}
    assert names == {*ndcache.__all__, "cache", "errors", "tvm"}


@pytest.mark.parametrize("name", ndcache.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(ndcache, name) is not None


def test_dump_is_the_function() -> None:
    assert callable(dump)
    assert dump is ndcache.dump


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Importing ``ndcache.fetch`` would turn the function into a module."""
    public = {name for name in ndcache.__all__ if inspect.isfunction(getattr(ndcache, name))}
    assert {"load", "stream", "fetch", "dump", "verify", "delete", "read_manifest", "is_cached"} <= public
    words = {word for name in MODULES for word in name.split(".")[1:]}
    assert words & {*public, *ndcache.__all__, "convert", "utils", "helpers"} == set()


def test_import_is_light() -> None:
    loaded = modules_after("import ndcache")
    assert "ndcache" in loaded
    assert not loaded & {"numpy", "requests", "tqdm", "wgpu", "torch", "rich", "click", "safetensors", "tvm"}


@pytest.mark.parametrize(
    "statement", ["from ndcache import *", "from ndcache import load", "import ndcache; ndcache.tvm"]
)
def test_what_is_used_is_imported_as_a_whole(statement: str) -> None:
    loaded = modules_after(statement)
    assert {"ndcache", "numpy", "requests"} <= loaded
    assert not loaded & {"wgpu", "torch", "rich", "click", "safetensors", "tvm"}


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys, json; print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    command = [sys.executable, "-c", code]
    return set(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@pytest.mark.parametrize(
    "first", ["ndcache.workers.pool", "ndcache.loader", "ndcache.tvm", "ndcache.errors", "ndcache.cli.commands"]
)
def test_names_are_there_whatever_is_imported_first(first: str) -> None:
    uses = "assert callable(ndcache.fetch) and callable(ndcache.dump); ndcache.errors.NdcacheError"
    code = f"import {first}, ndcache; {uses}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_that_are_not_there() -> None:
    assert not hasattr(ndcache, "loda")
    assert not hasattr(ndcache, "__wrapped__")
    with pytest.raises(ImportError, match="loda"):
        exec("from ndcache import loda")
    assert {"load", "NdcacheError", "__version__", "cache", "tvm"} <= set(dir(ndcache))


@pytest.mark.parametrize("name", ["wgpu", "torch", "rich", "click", "safetensors"])
def test_imports_without(name: str) -> None:
    code = f"import sys; sys.modules[{name!r}] = None; import ndcache; ndcache.Loader().close()"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- words --------------------------------------------------------------------------------------------


def documented(value: Any, where: str) -> Iterator[tuple[str, str | None]]:
    """Yield the docstrings of a class or function, and of the public members that a class defines itself."""
    yield where, value.__doc__
    if not inspect.isclass(value):
        return
    for name, member in vars(value).items():
        if name.startswith("_"):
            continue
        if isinstance(member, (property, staticmethod, classmethod)) or inspect.isfunction(member):
            # From the class that first had it, if it is an overridden one.
            yield f"{where}.{name}", inspect.getdoc(getattr(value, name))


@pytest.mark.parametrize("module", [ndcache, tvm, ndcache.torch])
def test_docstrings(module: ModuleType) -> None:
    found = {module.__name__: module.__doc__}
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            found.update(documented(value, name))
    assert [where for where, text in found.items() if not (text or "").strip()] == []
    assert len(found) > len(module.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name: str) -> None:
    assert name == "ndcache._version" or (importlib.import_module(name).__doc__ or "").strip()


@pytest.mark.parametrize("name", MODULES)
def test_all_of_every_module(name: str) -> None:
    if name == "ndcache._version":
        return
    module = importlib.import_module(name)
    if hasattr(module, "__path__") and not hasattr(module, "__all__"):
        return  # a package is a place, and gives nothing itself
    assert module.__all__ == sorted(module.__all__, key=_as_ruff_sorts)
    for public in module.__all__:
        assert hasattr(module, public)


def _as_ruff_sorts(name: str) -> tuple[int, str]:
    """Sort constants first, then classes, then the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_there_are_modules() -> None:
    assert {"ndcache.format.manifest", "ndcache.devices.gpu.device", "ndcache.tvm"} <= set(MODULES)


def test_version() -> None:
    from ndcache._version import __version__

    assert ndcache.__version__ == __version__
    assert __version__[0].isdigit()
