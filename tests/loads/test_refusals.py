"""Servers that refuse, fail, or ask for patience."""

from __future__ import annotations

import email.utils
import time
from pathlib import Path

import pytest

import ndcache
from ndcache.workers.cancellation import Cancellation

from ..helpers.loads import WHERE, assert_same, scripted_model
from ..helpers.servers import Connection, Request, ScriptedServer, reply, then_close


def test_a_missing_model_names_what_was_looked_for(scripted: ScriptedServer) -> None:
    with pytest.raises(ndcache.NotFoundError, match=r"tensor-cache\.json or ndarray-cache\.json") as caught:
        ndcache.load(scripted.url)
    assert caught.value.status == 404
    names = ["tensor-cache.json", "ndarray-cache.json", "model.safetensors.index.json", "model.safetensors"]
    assert [request.path for request in scripted.requests] == [f"/{name}" for name in names]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, ndcache.AuthError),
        (403, ndcache.AuthError),
        (404, ndcache.NotFoundError),
        (410, ndcache.NotFoundError),
    ],
)
def test_row_16_a_refusal_is_not_retried(
    model: Path, scripted: ScriptedServer, where: str, status: int, error: type[ndcache.TransferError]
) -> None:
    scripted_model(scripted, model)
    scripted.script[where] = [reply(status)]
    with pytest.raises(error) as caught:
        ndcache.load(scripted.url)
    assert type(caught.value) is error
    assert (caught.value.status, caught.value.retryable) == (status, False)
    assert len(scripted.requests_for(where)) == 1
    # The manifest may be there under its other name, unless it is not said who may ask at all.
    other_name = scripted.requests_for("/ndarray-cache.json")
    assert len(other_name) == (where == WHERE[0] and status != 401)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("status", [408, 500, 502, 504])
def test_row_15_a_server_that_fails_is_asked_again(
    model: Path, scripted: ScriptedServer, where: str, status: int
) -> None:
    assert_is_asked_again(model, scripted, where, status)


@pytest.mark.parametrize("where", WHERE)
def test_row_14_a_busy_server_is_asked_again(model: Path, scripted: ScriptedServer, where: str) -> None:
    assert_is_asked_again(model, scripted, where, 503)


def assert_is_asked_again(model: Path, scripted: ScriptedServer, where: str, status: int) -> None:
    arrays = scripted_model(scripted, model)
    good = scripted.script[where]
    scripted.script[where] = [reply(status), then_close(reply(status)), *good]
    policy = ndcache.RetryPolicy(retries=2, backoff=0.001)
    with ndcache.load(scripted.url, retries=policy) as weights:
        assert_same(weights, arrays)
        assert weights.stats.retries == 2
    ndcache.delete(scripted.url)
    scripted.requests.clear()
    scripted.script[where] = [reply(status)]
    with pytest.raises(ndcache.ServerError) as caught:
        ndcache.load(scripted.url, retries=policy)
    asked = len(scripted.requests_for(where))
    assert (caught.value.status, caught.value.attempts) == (status, asked)
    # What is refused is not counted while the server gives others something.
    assert asked == 3 or (status == 503 and where == WHERE[1] and 3 < asked <= 6)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the seconds slept between tries. The sleep takes no time, but the clock of the rate limits moves."""
    seconds: list[float] = []
    monkeypatch.setattr(Cancellation, "sleep", lambda self, wanted: seconds.append(wanted))
    for module in ("origin", "rate_limits", "shared"):
        monkeypatch.setattr(f"ndcache.http.limits.{module}.monotonic", lambda: time.monotonic() + sum(seconds))
    return seconds


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_row_14_retry_after_sets_the_wait(
    model: Path, scripted: ScriptedServer, slept: list[float], where: str, status: int, kind: str
) -> None:
    arrays = scripted_model(scripted, model)
    date = int(time.time()) + 120
    value = "120" if kind == "seconds" else email.utils.formatdate(date, usegmt=True)
    scripted.script[where].insert(0, reply(status, headers={"Retry-After": value}))
    assert_same(ndcache.load(scripted.url), arrays)
    wait = sum(slept)
    if kind == "seconds":
        assert wait == 120
    else:
        assert date - time.time() <= wait <= 120
    assert len(scripted.requests_for(where)) == 2


def test_row_14_retry_after_delays_the_next_request(model: Path, scripted: ScriptedServer) -> None:
    scripted_model(scripted, model)
    asked: list[float] = []
    good = scripted.script["/params_shard_0.bin"][0]
    assert isinstance(good, bytes)

    def later(connection: Connection, request: Request) -> None:
        asked.append(time.monotonic())
        connection.send(reply(429, headers={"Retry-After": "1"}) if len(asked) == 1 else good)

    scripted.script["/params_shard_0.bin"] = [later]
    ndcache.load(scripted.url)
    first, second = asked
    assert second - first >= 0.99  # the clock of the server is not the one that was slept by


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    "value",
    ["301", "99999999999", "9" * 400, email.utils.formatdate(4e9, usegmt=True), "Fri, 31 Dec 9999 23:59:59 GMT"],
)
def test_row_14_a_retry_after_beyond_the_budget_is_an_error_at_once(
    model: Path, scripted: ScriptedServer, slept: list[float], where: str, status: int, value: str
) -> None:
    scripted_model(scripted, model)
    scripted.script[where] = [reply(status, headers={"Retry-After": value})]
    with pytest.raises(ndcache.RateLimitedError) as caught:
        ndcache.load(scripted.url)
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 300
    assert len(scripted.requests_for(where)) == 1
    assert slept == []


@pytest.mark.parametrize(
    "value", ["", "soon", "-5", "1e9", "inf", "0x10", "9" * 5000, "Fri, 99 Foo 2026 99:99:99 GMT", "\u0664\u0662"]
)
def test_row_14_an_unreadable_retry_after_means_the_usual_wait(
    model: Path, scripted: ScriptedServer, slept: list[float], value: str
) -> None:
    arrays = scripted_model(scripted, model)
    answer = reply(429, headers={"Retry-After": value.encode().decode("latin-1")})
    scripted.script["/params_shard_0.bin"][:0] = [answer] * 3
    assert_same(ndcache.load(scripted.url), arrays)
    assert len(slept) == 3
    assert all(0 <= wait <= longest for wait, longest in zip(slept, (0.5, 1, 2), strict=True))
