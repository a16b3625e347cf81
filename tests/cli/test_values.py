"""Options of requests on the command line and in the environment: tokens, headers, revisions, rates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from ndcache.cli.commands import main
from ndcache.cli.values import RateType

from ..helpers.commands import new_runner
from ..helpers.models import simple_model
from ..helpers.servers import FileServer


@pytest.fixture
def server(tmp_path: Path, serve: Callable[[Path], FileServer]) -> FileServer:
    simple_model(tmp_path / "www", shards=2)
    return serve(tmp_path / "www")


@pytest.mark.parametrize(
    ("text", "rate"),
    [("10MB/s", 1e7), ("10M", 1e7), ("500 kB/s", 5e5), ("1.5MiB", 1.5 * 2**20), ("2GiB/s", 2**31), ("4096", 4096)],
)
def test_rates(text: str, rate: float) -> None:
    assert RateType().convert(text, None, None) == rate


@pytest.mark.parametrize("text", ["", "0", "-1MB", "fast", "10Mbit/s", "1e3", "10MB/min"])
def test_texts_that_are_no_rate(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no rate: write 10MB/s"):
        RateType().convert(text, None, None)


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["--token", "secret", "--header", "X-Key: a: b", "--header", "X-Other:c"], {}),
        (["--token", "-", "--header", "X-Key:a: b", "--header", "X-Other: c"], {"input": "secret\n"}),
        ([], {"env": {"NDCACHE_TOKEN": "secret", "NDCACHE_HEADER": "X-Key: a: b\nX-Other: c"}}),
        ([], {"env": {"NDCACHE_TOKEN": "secret\n", "NDCACHE_HEADER": "X-Key: a: b\r\n\nX-Other: c\n"}}),
    ],
    ids=["arguments", "standard input", "environment", "environment with new lines"],
)
@pytest.mark.parametrize("command", ["inspect", "load", "fetch"])
def test_what_is_sent(server: FileServer, command: str, arguments: list[str], extra: dict[str, Any]) -> None:
    result = new_runner().invoke(main, [command, server.url, *arguments], **extra)
    assert result.exit_code == 0, result.output
    assert "secret" not in result.output + result.stderr
    sent = {(each.headers["authorization"], each.headers["x-key"], each.headers["x-other"]) for each in server.requests}
    assert sent == {("Bearer secret", "a: b", "c")}


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["--header", "secret"], "it must be 'NAME: VALUE'", 2),
        (["--header", "Range: secret"], "or ndcache sends it itself, as it does Range", 2),
        (["--header", "X Key: secret"], "HTTP allows no such header", 2),
        (["--token", "sec ret"], "token must be a text without spaces", 1),
        (["--token", "-"], "standard input has no token", 2),
        (["--limit-rate", "fast"], "'fast' is no rate: write 10MB/s", 2),
        (["--revision", "v1"], "revision is for repositories on Hugging Face", 1),
    ],
)
def test_mistakes(server: FileServer, arguments: list[str], message: str, status: int) -> None:
    result = new_runner().invoke(main, ["inspect", server.url, *arguments], input="")
    assert message in " ".join(result.stderr.replace("\u2502", " ").split())
    assert result.exit_code == status
    assert "secret" not in result.stderr
    assert "sec ret" not in result.stderr


def test_a_token_that_is_too_long_is_not_cut(server: FileServer) -> None:
    result = new_runner().invoke(main, ["inspect", server.url, "--token", "-"], input="a" * 5000)
    assert (result.exit_code, server.requests) == (2, [])
    assert "standard input has a line of more than 4,096 characters" in result.stderr


@pytest.mark.parametrize("timeout", ["3000000", "1e300", "5,99999999999"])
def test_timeouts_as_long_as_anybody_likes(server: FileServer, timeout: str) -> None:
    result = new_runner().invoke(main, ["fetch", server.url, "--timeout", timeout])
    assert result.exit_code == 0, result.output


def test_every_command_with_an_option_reads_the_same_variable() -> None:
    found: dict[str, set[Any]] = {}
    for command in main.commands.values():
        for option in command.params:
            if isinstance(option, click.Option) and option.name is not None and option.envvar is not None:
                found.setdefault(option.opts[0], set()).add(option.envvar)
    assert found["--max-workers"] == {"NDCACHE_MAX_WORKERS"}
    assert found["--device"] == {"NDCACHE_DEVICE"}
    assert all(len(names) == 1 for names in found.values())
    taken = {"NDCACHE_HOME", "NDCACHE_OFFLINE", "NDCACHE_DEBUG"}
    assert not taken & {name for names in found.values() for name in names}


def test_an_option_goes_before_the_environment(server: FileServer, tmp_path: Path) -> None:
    environ = {"NDCACHE_SCOPE": "mine", "NDCACHE_RETRIES": "many"}
    result = new_runner().invoke(main, ["fetch", server.url, "--retries", "1"], env=environ)
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "home").glob("mine/*"))
    result = new_runner().invoke(main, ["fetch", server.url], env=environ)
    assert "many" in result.stderr
