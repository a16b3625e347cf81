"""The JSON that commands print has the fields that docs/guide/json.rst describes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ndcache.cli.commands import main

from ..helpers.companions import mlc_model
from ..helpers.servers import FileServer
from .test_commands import invoke

PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "json.rst").read_text("utf-8")
TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "null": lambda value: value is None,
}


def described(section: str) -> dict[str, str]:
    """Return the types of the fields that a section describes."""
    text = re.split(r"\n(?=\S+(?: \S+)?\n-+\n)", PAGE)
    (body,) = (part for part in text if part.startswith(f"{section}\n{'-' * len(section)}\n"))
    return dict(re.findall(r"^- ``([\w.\[\]]+)`` \(([a-z ]+)\):", body, re.M))


def fields(value: dict[str, Any], nested: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of fields; of arrays whose objects are described, the objects' fields."""
    for name, item in value.items():
        if name in nested:
            assert item
            for each in item:
                yield from ((f"{name}[].{inner}", found) for inner, found in each.items())
        else:
            yield name, item


def check(section: str, value: Any) -> None:
    types = described(section)
    nested = {name.partition("[")[0] for name in types if "[" in name}
    found = list(fields(value, nested))
    assert {name for name, _ in found} == types.keys()
    for name, item in found:
        assert any(TYPES[kind](item) for kind in types[name].split(" or ")), (name, item)


def printed(*args: object) -> Any:
    return printed_json(*args, "-q")


def printed_json(*args: object) -> Any:
    result = invoke(*args, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def test_every_command_prints_the_fields_that_are_described(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    mlc_model(tmp_path / "model")
    url = serve(tmp_path / "model").url
    check("fetch --dry-run", printed("fetch", url, "--dry-run")[0])
    check("fetch", printed("fetch", url)[0])
    check("load", printed("load", url))
    check("verify", printed("verify", url)[0])
    check("inspect", printed("inspect", url))
    summary = printed("inspect", url, "--summary")
    assert {name.partition("[")[0] for name in described("inspect")} - summary.keys() == {"shards"}
    assert printed("inspect", url, "--names") == ["layer.0", "layer.1", "layer.2"]
    check("convert", printed("convert", url, tmp_path / "new.safetensors"))
    check("dump", printed("dump", url, tmp_path / "dumped"))
    check("demo", printed("demo", "--size-mib", "1", "--rate-mib", "200", "--device", "cpu"))
    check("bench", printed("bench", url))
    check("lock", printed("lock", url))
    printed("load", url, "--trace", tmp_path / "trace.json")
    check("report", printed("report", tmp_path / "trace.json"))
    assert "ndcache" in printed("doctor")
    check("ls", printed_json("ls")[0])
    check("rm, prune", printed("prune", "--older-than", "0d", "--dry-run"))
    check("rm, prune", printed("rm", url))


def test_one_of_several_sources_fails(tmp_path: Path) -> None:
    mlc_model(tmp_path / "model")
    for name in ("fetch", "verify"):
        result = invoke(name, tmp_path / "none", tmp_path / "model", "--json", "-q")
        assert result.exit_code == 1
        bad, good = json.loads(result.stdout)
        assert bad["error"]["type"] == "NotFoundError"
        assert f"error: {bad['error']['message']}\n" == result.stderr
        assert good["source"] == str(tmp_path / "model")


@pytest.mark.parametrize(
    "args",
    [
        *(["load"], ["fetch"], ["fetch", "--dry-run"], ["inspect"], ["verify"], ["convert", "to.npz"]),
        *(["dump", "directory"], ["lock"], ["bench"]),
    ],
    ids=" ".join,
)
def test_the_only_source_fails(tmp_path: Path, args: list[str]) -> None:
    name, *others = args
    result = invoke(name, tmp_path / "none", *others, "--json", "-q")
    assert result.exit_code == 1
    value = json.loads(result.stdout)
    if name in ("fetch", "verify"):
        (value,) = value
    assert described("errors").keys() == {"source", *(f"error.{field}" for field in value["error"])}
    assert value["source"] == str(tmp_path / "none")
    assert (value["error"]["type"], value["error"]["retryable"]) == ("NotFoundError", False)
    assert result.stderr == f"error: {value['error']['message']}\n"


def test_errors_that_have_a_hint_or_no_source(tmp_path: Path) -> None:
    error = json.loads(invoke("load", "http://user:secret@localhost:9/", "--offline", "--json").stdout)
    assert (error["source"], error["error"]["type"]) == ("http://localhost:9/", "OfflineError")
    assert error["error"]["message"].endswith(error["error"]["hint"])
    assert json.loads(invoke("inspect", "ftp://host/", "--json").stdout)["error"]["type"] == "ValueError"
    (tmp_path / "file").touch()
    assert json.loads(invoke("report", tmp_path / "file", "--json").stdout).keys() == {"error"}
    assert invoke("load", tmp_path, "--json", "--retries", "x").stdout == ""


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_the_common_options(name: str) -> None:
    given = {option for parameter in main.commands[name].params for option in parameter.opts}
    assert {"--json", "--quiet", "-q", "--verbose"} <= given
