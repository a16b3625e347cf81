"""The exceptions: their tree, their messages, and that they show no secrets."""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache import errors
from ndcache.errors import (
    DecodeError,
    IntegrityError,
    NdcacheError,
    NotFoundError,
    OfflineError,
    RateLimitedError,
    ServerError,
    SizeMismatchError,
    TransferError,
    redact,
)

from .helpers import models

CLASSES: list[type[NdcacheError]] = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, NdcacheError)
]

FIELDS: dict[str, Any] = {
    "url": "https://host/model/params_shard_0.bin",
    "shard": "params_shard_0.bin",
    "status": 503,
    "expected": 1 << 40,
    "received": "d41d8cd98f00b204e9800998ecf8427e",
    "attempts": 6,
    "hint": "Try again later.",
}


def drawn_tree() -> dict[str, tuple[str, ...]]:
    """Return the names of all errors, with those of their bases, from the tree in the module's docstring."""
    assert errors.__doc__ is not None
    tree: dict[str, tuple[str, ...]] = {}
    above: list[str] = []
    for line in errors.__doc__.partition("::\n")[2].splitlines():
        found = re.fullmatch(r"    (?P<lines>[│├└ ]*)(?P<name>\w+)(?: \((?P<also>\w+)\))?(?P<words> .*)?", line)
        if found is None:
            assert not line.strip(), line
            continue
        depth = len(found["lines"]) // 2
        above[depth:] = [found["name"]]
        tree[found["name"]] = tuple(filter(None, (above[depth - 1] if depth else "Exception", found["also"])))
    return tree


def test_the_tree_is_the_one_in_the_docstring() -> None:
    assert drawn_tree() == {kind.__name__: tuple(base.__name__ for base in kind.__bases__) for kind in CLASSES}


def test_the_docstring_is_read_correctly() -> None:
    tree = drawn_tree()
    assert tree["NdcacheError"] == ("Exception",)
    assert tree["ChecksumError"] == ("IntegrityError",)
    assert tree["TransferError"] == ("NdcacheError", "OSError")
    assert len(tree) == 35


def test_all() -> None:
    assert errors.__all__ == sorted(kind.__name__ for kind in CLASSES)


@pytest.mark.parametrize("kind", CLASSES)
def test_names_and_docstrings(kind: type[NdcacheError]) -> None:
    assert kind.__name__.endswith("Error")
    assert inspect.getdoc(kind)
    assert kind.__doc__ is not None
    assert kind.__doc__.strip().partition("\n")[0].endswith((".", ":"))


RETRYABLE = {
    *("ConnectError", "StallError", "TruncatedError", "ServerError", "RateLimitedError"),
    *("ProtocolError", "RangeError", "RemoteChangedError"),
    *("IntegrityError", "SizeMismatchError", "ChecksumError"),
}
RETRY_ONCE = {
    *("ProtocolError", "RangeError"),
    *("IntegrityError", "SizeMismatchError", "ChecksumError"),
}


def test_which_errors_are_retryable() -> None:
    assert {kind.__name__ for kind in CLASSES if kind.retryable} == RETRYABLE
    assert {kind.__name__ for kind in CLASSES if kind.max_retries == 1} == RETRY_ONCE
    assert {kind.__name__ for kind in CLASSES if kind.max_retries == 0} == {"RemoteChangedError"}


def test_retryable_belongs_to_the_instance() -> None:
    error = SizeMismatchError("it happened", retryable=False)
    assert not error.retryable
    assert not pickle.loads(pickle.dumps(error)).retryable
    assert SizeMismatchError("it happened").retryable


@pytest.mark.parametrize("damage", ["size", "bytes", "manifest"])
def test_wrong_bytes_in_local_files_are_not_retryable(tmp_path: Path, damage: str) -> None:
    models.simple_model(tmp_path, shards=1)
    shard = tmp_path / "params_shard_0.bin"
    integrity = {}
    if damage == "size":
        os.truncate(shard, 100)
    elif damage == "bytes":
        shard.write_bytes(bytes(shard.stat().st_size))
    else:
        integrity = {"tensor-cache.json": "sha256-" + "A" * 43 + "="}
    with pytest.raises(IntegrityError) as caught:
        ndcache.load(tmp_path, verify="always", integrity=integrity)
    assert not caught.value.retryable


# --- fields -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_fields(kind: type[NdcacheError]) -> None:
    error = kind("it happened", **FIELDS)
    assert {name: getattr(error, name) for name in FIELDS} == FIELDS
    assert (error.message, error.args, error.others) == ("it happened", ("it happened",), ())
    bare = kind("it happened")
    assert {getattr(bare, name) for name in FIELDS} == {None}
    assert str(bare) == "it happened"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", CLASSES)
def test_pickle(kind: type[NdcacheError], protocol: int) -> None:
    error = kind("it happened", **FIELDS)
    error.others = (SizeMismatchError("another", shard="b", expected=1, received=2), OfflineError("a third"))
    if isinstance(error, RateLimitedError):
        error.retry_after = 2.5
    if isinstance(error, OfflineError):
        error.missing = ("a.bin", "b.bin")
    for other in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is kind
        assert other.args == error.args
        assert str(other) == str(error)
        assert [str(inner) for inner in other.others] == [str(inner) for inner in error.others]
        assert other.others[0].expected == 1
        without_others = [{k: v for k, v in vars(e).items() if k != "others"} for e in (error, other)]
        assert without_others[0] == without_others[1]
        with pytest.raises(kind, match="it happened"):
            raise other


def test_fields_of_single_errors() -> None:
    assert RateLimitedError("x").retry_after is None
    assert OfflineError("x").missing == ()


@pytest.mark.parametrize(
    ("kind", "standard"), [(NotFoundError, OSError), (DecodeError, ValueError), (errors.DiskFullError, OSError)]
)
def test_errors_are_caught_as_their_standard_bases(kind: type[NdcacheError], standard: type[Exception]) -> None:
    with pytest.raises(standard, match="it happened"):
        raise kind("it happened", **FIELDS)


def test_cause() -> None:
    def fail() -> None:
        try:
            raise ConnectionResetError(104, "reset")
        except OSError as error:
            raise TransferError("it broke") from error

    with pytest.raises(TransferError) as caught:
        fail()
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    # The cause may not be picklable, so it is left out; unless tblib is installed in this process, which Dask and Ray
    # load for their own exceptions.
    file = io.BytesIO()
    pickler = pickle.Pickler(file)
    pickler.dispatch_table = {}
    pickler.dump(caught.value)
    assert pickle.loads(file.getvalue()).__cause__ is None


# --- words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "it happened"),
        ({"shard": "a.bin"}, "it happened: a.bin"),
        ({"shard": ""}, "it happened"),
        ({"url": "https://host/a.bin"}, "it happened (https://host/a.bin)"),
        ({"shard": "a.bin", "url": "https://host/a.bin"}, "it happened: a.bin (https://host/a.bin)"),
        ({"attempts": 1}, "it happened"),
        ({"attempts": 6}, "it happened, after 6 tries"),
        ({"hint": "Try again."}, "it happened. Try again."),
        ({"status": 500, "expected": 1, "received": 2}, "it happened"),
        (
            {"shard": "x", "url": "https://host/b", "attempts": 2, "hint": "Stop."},
            "it happened: x (https://host/b), after 2 tries. Stop.",
        ),
    ],
)
def test_str(fields: dict[str, Any], text: str) -> None:
    assert str(ServerError("it happened", **fields)) == text


def test_str_repeats_nothing() -> None:
    error = ServerError("no answer for a.bin of https://host/a.bin", shard="a.bin", url="https://host/a.bin")
    assert str(error) == error.message


def test_str_with_others() -> None:
    error = ServerError("it happened", hint="Stop.")
    error.others = (ServerError("x"), ServerError("y"))
    assert str(error) == "it happened; 2 more failed. Stop."


# --- row 40: secrets ----------------------------------------------------------------------------------

SECRETS = [
    ("https://user:secret@host/a.bin", "https://host/a.bin"),
    ("https://secret@host/a.bin", "https://host/a.bin"),
    ("https://user:se@cret:secret@host:8443/a.bin", "(unreadable URL)"),
    ("https://user:%73ecret@host/secret-free", "https://host/secret-free"),
    ("https://host/a.bin?sig=secret", "https://host/a.bin"),
    ("https://host?sig=secret", "https://host"),
    ("https://host/a.bin#secret", "https://host/a.bin"),
    ("https://host/a.bin?x#secret?secret", "https://host/a.bin"),
    ("https://host/a@b/c:d", "https://host/a@b/c:d"),
    ("http://http//user:secret@host/a", "http://http/…@host/a"),
    ("https://user:1234/secret@host/a", "https://user/…@host/a"),
    ("https://[::1]:80/a", "https://[::1]:80/a"),
    ("https://u:secret@[::1]/a", "https://[::1]/a"),
    ("//user:secret@host/a", "//host/a"),
    ("hf://user:secret@owner/name", "hf://owner/name"),
    ("user:secret@host/a?secret", "host/a"),
    ("https:/user:secret@host/a", "https:/host/a"),
    ("https:user:secret@host/a", "https:host/a"),
    ("https://user:secret/secret@host/a", "(unreadable URL)"),
    ("https://user:secret@[::1/a", "(unreadable URL)"),
    ("https://[::1/a?secret", "https://[::1/a"),
    ("https://host:99999/a?secret#secret", "https://host:99999/a"),
    ("/srv/a@b/c", "/srv/a@b/c"),
    ("owner/name@v1", "owner/name@v1"),
    ("C:/models/x@y", "C:/models/x@y"),
    ("", ""),
]


@pytest.mark.parametrize(("url", "shown"), SECRETS)
def test_row_40_redacting_removes_secrets(url: str, shown: str) -> None:
    assert redact(url) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(("url", "shown"), SECRETS)
def test_row_40_errors_show_no_secrets(url: str, shown: str) -> None:
    error = TransferError("it happened", url=url)
    assert error.url == shown
    everything = f"{error} {error!r} {vars(error)} {pickle.dumps(error)!r}"
    assert "secret" not in everything.replace("secret-free", "")
