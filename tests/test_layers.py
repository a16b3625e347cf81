"""Imports go down only.

The table below is the architecture: a file may import from the rows above its own, never from its own row or one
below. A new file needs a place here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ndcache

LAYERS: list[list[str]] = [
    # 0: names and words
    ["_version", "caller", "progress", "queries", "trace"],
    ["stats", "urls"],
    ["shown"],
    ["dtypes", "errors"],
    ["descriptors"],
    # 1: values from outside, checked
    ["hub", "manifest", "paths", "serial", "spans", "stop", "stop_iteration", "strict_json"],
    ["configuration", "connect", "locate", "raw_response", "tls"],
    ["proxies"],
    # 2: one concern each
    ["limits"],
    ["connections", "content_coding", "decode", "digests", "folders", "json_reader", "pieces", "retry"],
    ["cleanup", "failures", "locks", "parse", "reporting", "small_files"],
    ["options", "parts", "pins", "validator", "workers"],
    ["publishing"],
    ["cache"],
    ["in_memory"],
    # 3: devices, each above the one that it is built on; HTTP; a model in a directory
    ["devices.adapters", "devices.base", "devices.expand", "devices.layout", "devices.mapping", "devices.reading"],
    ["devices.limits", "devices.shield", "devices.staging"],
    ["inventory", "model", "transport"],
    ["devices.cpu"],
    ["devices.gpu"],
    ["devices", "transfer"],
    # 4: one shard; shards in order; the result
    ["download", "weights"],
    ["manifest_request"],
    ["manifest_source"],
    ["remote"],
    # 5: the pipeline
    ["loader"],
    ["api"],
    # 6: faces
    ["streams"],
    ["tensor_files", "terminal", "tvm", "writer"],
    ["public"],
    ["", "demo", "doctor"],  # "" is ndcache/__init__.py
    ["cli"],
    ["__main__"],
]
#: The first row of the faces: terminals begin there.
FACES = LAYERS.index(["streams"])

PACKAGE = Path(ndcache.__file__).parent
PLACE = {name: row for row, names in enumerate(LAYERS) for name in names}
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


class _Imports(ast.NodeVisitor):
    """Collects absolute names of what is imported, and whether a function has to run for it."""

    def __init__(self, module: str, is_package: bool) -> None:
        parts = ["ndcache", *filter(None, module.split("."))]
        self._package = parts if is_package else parts[:-1]
        self._depth = 0
        self.found: list[tuple[str, bool]] = []

    def _add(self, name: str) -> None:
        self.found.append((name, self._depth > 0))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self._package[: len(self._package) - node.level + 1] if node.level else []
        name = ".".join([*base, *([node.module] if node.module else [])])
        # ``from . import x``: x may be a module or a name of the package's.
        for alias in node.names:
            self._add(f"{name}.{alias.name}")

    def visit_If(self, node: ast.If) -> None:
        test = node.test
        name = test.attr if isinstance(test, ast.Attribute) else test.id if isinstance(test, ast.Name) else ""
        for child in node.orelse if name == "TYPE_CHECKING" else [node.test, *node.body, *node.orelse]:
            self.visit(child)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        self._depth += 1
        for child in node.body:
            self.visit(child)
        self._depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[str, bool]]:
    """What the source text of `module` imports: full names, and whether only inside a function."""
    visitor = _Imports(module, is_package)
    visitor.visit(ast.parse(source))
    yield from visitor.found


def own(name: str) -> str | None:
    """The package's module that a full name belongs to, or None: ``ndcache.devices.gpu.open_gpu`` → devices.gpu."""
    if name != "ndcache" and not name.startswith("ndcache."):
        return None
    inner = name.removeprefix("ndcache").lstrip(".")
    while inner and inner not in PLACE:
        inner = inner.rpartition(".")[0]
    return inner


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """The imports of `module` that do not go down."""
    if module not in PLACE:
        return [f"{module} has no place in the table"]
    targets = {own(name) for name, _ in imports(source, module, is_package=is_package)}
    return sorted(
        f"{module or '__init__'} imports {target or '__init__'}"
        for target in targets
        if target is not None and PLACE[target] >= PLACE[module]
    )


def check(module: str) -> list[str]:
    path = FILES[module]
    return violations(path.read_text("utf-8"), module, is_package=path.name == "__init__.py")


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    assert check(module) == []


def test_the_table_is_of_what_is_there() -> None:
    assert set(PLACE) == set(FILES)
    assert sum(map(len, LAYERS)) == len(PLACE)


@pytest.mark.parametrize("module", FILES)
def test_terminals_are_for_faces(module: str) -> None:
    path = FILES[module]
    found = {name.partition(".")[0] for name, _ in imports(path.read_text("utf-8"), module)} & {"click", "rich"}
    assert not found or PLACE[module] >= FACES


@pytest.mark.parametrize("module", FILES)
def test_wgpu_is_imported_when_asked_for(module: str) -> None:
    found = [lazy for name, lazy in imports(FILES[module].read_text("utf-8"), module) if name.split(".")[0] == "wgpu"]
    assert all(found)
    assert not found or module in ("devices.adapters", "devices.expand", "devices.gpu", "devices.staging")


def test_wgpu_is_imported_at_all() -> None:
    names = dict(imports(FILES["devices.gpu"].read_text("utf-8"), "devices.gpu"))
    assert names["wgpu"] is True


# --- the checker itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("errors", "from .manifest import Manifest", ["errors imports manifest"]),
        ("errors", "from . import manifest", ["errors imports manifest"]),
        ("errors", "from . import manifest as m, locate", ["errors imports locate", "errors imports manifest"]),
        ("errors", "import ndcache.manifest", ["errors imports manifest"]),
        ("errors", "import ndcache", ["errors imports __init__"]),
        ("errors", "from ndcache import Manifest", ["errors imports __init__"]),
        ("errors", "from . import __version__", ["errors imports __init__"]),
        ("errors", "from ndcache.manifest import Manifest", ["errors imports manifest"]),
        ("errors", "from .dtypes import DTYPES", ["errors imports dtypes"]),  # of its own row
        ("errors", "from .devices.gpu import open_gpu", ["errors imports devices.gpu"]),
        ("errors", "from .devices import open_device", ["errors imports devices"]),
        ("errors", "def f():\n    from .manifest import Manifest", ["errors imports manifest"]),
        ("errors", "class A:\n    async def f(self):\n        from . import cli", ["errors imports cli"]),
        ("errors", "try:\n    from . import cli\nexcept ImportError:\n    pass", ["errors imports cli"]),
        ("errors", "if 1:\n    pass\nelse:\n    from . import cli", ["errors imports cli"]),
        ("errors", "if TYPE_CHECKING:\n    pass\nelse:\n    from . import cli", ["errors imports cli"]),
        ("devices.base", "from .cpu import CpuDevice", ["devices.base imports devices.cpu"]),
        ("devices.base", "from . import gpu", ["devices.base imports devices.gpu"]),
        ("devices.cpu", "from ..loader import load", ["devices.cpu imports loader"]),
        ("devices.cpu", "from .. import loader", ["devices.cpu imports loader"]),
        ("devices.cpu", "from . import open_device", ["devices.cpu imports devices"]),
        ("", "from .cli import main", ["__init__ imports cli"]),
        ("", "from . import demo", ["__init__ imports demo"]),
        ("news", "import os", ["news has no place in the table"]),
        # and what may be
        ("manifest", "from .errors import ManifestError\nfrom . import dtypes", []),
        ("manifest", "import json, requests\nfrom ndcachex import y", []),
        ("manifest", "if TYPE_CHECKING:\n    from .loader import load", []),
        ("manifest", "if typing.TYPE_CHECKING:\n    from .loader import load", []),
        ("devices.cpu", "from .base import Device\nfrom ..manifest import Record", []),
        ("devices", "from .gpu import open_gpu\nfrom . import cpu", []),
        ("", "from . import errors\nfrom .api import load", []),
        ("cli", "from .demo import run_demo\nfrom . import __version__", []),
        ("__main__", "from .cli import main", []),
    ],
)
def test_the_checker(module: str, source: str, expected: list[str]) -> None:
    assert violations(source, module, is_package=module in ("", "devices")) == expected


def test_the_checker_tells_when() -> None:
    source = (
        "import a\nif TYPE_CHECKING:\n    import b\ndef f(x=1):\n    import c\n    def g():\n        import d\nimport e"
    )
    assert list(imports(source, "x")) == [("a", False), ("c", True), ("d", True), ("e", False)]
