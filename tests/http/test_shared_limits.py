"""Limits that several processes share through the cache; row 67 of docs/faults.rst."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.files import shared_note
from ndcache.files.folder import Folder
from ndcache.files.shared_note import SharedNote
from ndcache.files.system import ProcessId
from ndcache.http.limits import shared
from ndcache.http.limits.note import from_note, to_note
from ndcache.http.limits.origin import OriginLimit, Permit
from ndcache.http.limits.rate_limits import RateLimits
from ndcache.http.limits.state import LimitState, Member
from ndcache.workers.cancellation import Cancellation

from ..helpers.models import assert_same, simple_model
from ..helpers.servers import FileServer, ScriptedServer, reply

URL = "http://host/model/"


@pytest.fixture
def folder(cache_dir: Path) -> Folder:
    return Folder(cache_dir, (".ndcache", "limits"))


@pytest.fixture
def member(folder: Folder) -> Callable[[], OriginLimit]:
    """Return a function that returns the limit of the same origin, as another process would have it."""
    return lambda: RateLimits(folder=folder).of(URL)


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def refuse(limit: OriginLimit, retry_after: float | None = None) -> None:
    permit = limit.acquire(Cancellation())
    permit.answered(429, retry_after)
    permit.release()


def look(limit: OriginLimit) -> LimitState:
    """Return the state as it is now."""
    with limit._lock, limit._updated():
        return limit.state


def hold(limit: OriginLimit, **settings: float) -> None:
    """Set what is known of the origin, and allow no trial for a long time."""
    with limit._lock, limit._updated() as now:
        for name, value in {"interval": 0.0, "pause_until": 0.0, **settings, "trial_at": now + 1000}.items():
            setattr(limit.state, name, value)


@contextlib.contextmanager
def waiting(limit: OriginLimit) -> Iterator[list[Permit]]:
    """Wait for a permit in a thread during the block; yield a list that has it as soon as it is given."""
    cancellation, given = Cancellation(), list[Permit]()

    def wait() -> None:
        with contextlib.suppress(ndcache.CancelledError):
            given.append(limit.acquire(cancellation))

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield given
    finally:
        cancellation.set()
        thread.join()
        for permit in given:
            permit.release()


# --- sharing ------------------------------------------------------------------------------------------


def test_row_67_a_server_that_refuses_nobody_costs_few_looks_and_no_file(
    member: Callable[[], OriginLimit], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, version = list[SharedNote](), SharedNote.version

    def look(note: SharedNote) -> tuple[int, int, int] | None:
        looks.append(note)
        return version(note)

    monkeypatch.setattr(SharedNote, "version", look)
    monkeypatch.setattr(SharedNote, "held", None)
    limit, begun = member(), time.monotonic()
    for _ in range(2000):
        permit = limit.acquire(Cancellation())
        permit.answered(200)
        permit.release()
    assert 1 <= len(looks) <= 1 + (time.monotonic() - begun) / shared._LOOK
    assert not cache_dir.exists()


def test_row_67_a_load_without_a_refusal_leaves_no_file(
    tmp_path: Path, serve: Callable[..., FileServer], cache_dir: Path
) -> None:
    arrays = simple_model(tmp_path / "model", shards=4)
    assert_same(ndcache.load(serve(tmp_path / "model").url), arrays)
    assert not (cache_dir / ".ndcache" / "limits").exists()


def test_row_67_a_refusal_is_known_to_others_at_their_next_request(member: Callable[[], OriginLimit]) -> None:
    one, other, late = member(), member(), member()
    other.acquire(Cancellation()).release()
    refuse(one)
    while not other.state.is_limited:
        other.acquire(Cancellation()).release()
    assert other.state.max_in_flight == 1
    assert (other.state.interval, other.state.refusals) == (one.state.interval, one.state.refusals)
    late.acquire(Cancellation()).release()
    assert late.state.is_limited


def test_row_67_requests_in_flight_count_over_all(member: Callable[[], OriginLimit]) -> None:
    one, other = member(), member()
    refuse(one)
    hold(one, max_in_flight=2)
    first = one.acquire(Cancellation())
    second = other.acquire(Cancellation())
    with waiting(other) as given:
        wait_until(lambda: look(one).members[other._name].waiting_since)
        assert not given
        first.release()
        wait_until(lambda: given)
        assert given[0].start.trial is None
        assert look(one).in_flight == 2
    second.release()
    assert look(one).members == {}


def test_row_67_all_wait_for_retry_after(member: Callable[[], OriginLimit]) -> None:
    one, other = member(), member()
    refuse(one, 100.0)
    with waiting(other) as given:
        wait_until(lambda: look(one).members)
        assert 90 < other.state.delay(time.monotonic()) <= 100
        assert not given


def test_row_67_who_is_less_patient_asks_nevertheless(member: Callable[[], OriginLimit], folder: Folder) -> None:
    """Its load ends with the server's answer, instead of after a pause that it would not make."""
    refuse(member(), 100.0)
    limit = RateLimits(longest_pause=50, folder=folder).of(URL)
    limit.acquire(Cancellation()).release()
    assert limit.state.pause_until > time.monotonic() + 50


def test_row_67_others_that_are_served_are_a_reason_to_try_again(member: Callable[[], OriginLimit]) -> None:
    one, other = member(), member()
    refuse(one)
    begun = time.monotonic()
    other.acquire(Cancellation()).release()
    other.sends(time.monotonic())
    refuse(one)
    assert one.state.served > begun


def test_row_67_origins_are_independent(folder: Folder) -> None:
    limits = RateLimits(folder=folder)
    refuse(limits.of(URL))
    others = RateLimits(folder=folder)
    for url in ("http://other/", "https://host/", "http://host:8080/"):
        others.of(url).acquire(Cancellation()).release()
        assert not others.of(url).state.is_limited
    assert len(folder.entries()) == 1


@pytest.mark.parametrize(
    ("waits", "silent", "yields"),
    [(1.0, 0.1, True), (0.4, 0.1, False), (1.0, 0.6, False), (None, 0.1, False)],
)
def test_row_67_nobody_waits_much_longer_than_the_others(waits: float | None, silent: float, yields: bool) -> None:
    """A process learns of a free place only at its next look, so others would always be faster."""
    since = None if waits is None else 100.0 - waits
    state = LimitState(members={"other": Member(ProcessId(), 100.0 - silent, waiting_since=since)})
    assert state.must_yield("own", 100.0, 100.0) is yields
    assert not state.must_yield("other", 100.0, 100.0)


def test_row_67_who_has_waited_longer_goes_first(member: Callable[[], OriginLimit]) -> None:
    limit = member()
    refuse(limit)
    hold(limit)
    with limit._lock:
        with limit._updated() as now:
            limit.state.members["other"] = Member(ProcessId(), now, waiting_since=now - 10)
        permit, seconds = limit._try(time.monotonic())
        assert permit is None
        assert seconds < 0.1
    limit.acquire(Cancellation()).release()  # the other one did not come


def test_row_67_waiting_for_others_can_be_cancelled(member: Callable[[], OriginLimit]) -> None:
    one, other = member(), member()
    refuse(one)
    hold(one, max_in_flight=1)
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(one.acquire(Cancellation()).release)
        with waiting(other) as given:
            wait_until(lambda: other._queue)
        assert not given
        assert not other._queue


# --- processes that end -------------------------------------------------------------------------------

_HOLDER = """
import sys, signal, time
from pathlib import Path
from ndcache.files import shared_note
from ndcache.files.folder import Folder
from ndcache.http.limits.rate_limits import RateLimits
from ndcache.workers.cancellation import Cancellation
limit = RateLimits(folder=Folder(Path(sys.argv[1]), (".ndcache", "limits"))).of(sys.argv[2])
refused = limit.acquire(Cancellation())
refused.answered(429)
refused.release()
with limit._lock, limit._updated() as now:
    limit.state.interval, limit.state.pause_until, limit.state.trial_at = 0.0, 0.0, now + 1000
permit = limit.acquire(Cancellation())
"""


@contextlib.contextmanager
def child(folder: Folder, then: str) -> Iterator[subprocess.Popen[str]]:
    """Run a process that has the only request that the origin allows, and does something then."""
    environ = {**os.environ, "PYTHONPATH": str(Path(ndcache.__file__).parents[1])}
    script = _HOLDER + textwrap.dedent(then)
    command = [sys.executable, "-c", script, str(folder.root), URL]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_row_67_a_killed_process_frees_its_share(member: Callable[[], OriginLimit], folder: Folder) -> None:
    limit = member()
    with child(folder, "print('ready', flush=True); signal.pause()") as process, waiting(limit) as given:
        wait_until(lambda: len(limit.state.members) == 2)
        time.sleep(0.7)  # longer than it takes to doubt a process that gives no sign: it lives, and counts
        assert not given
        process.kill()
        wait_until(lambda: given)
        assert given[0].start.others_in_flight == 0
        assert len(limit.state.members) == 1


def test_row_67_a_process_that_is_stopped_with_the_lock_blocks_nobody(
    member: Callable[[], OriginLimit], folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = """
    with limit._lock, limit._updated():
        print("ready", flush=True)
        signal.pause()
    """
    tries, lock = list[float](), shared_note._lock

    def try_lock(handle: int, patience: float) -> bool:
        tries.append(patience)
        return lock(handle, patience)

    monkeypatch.setattr(shared_note, "_lock", try_lock)
    with child(folder, stop):
        begun = time.monotonic()
        limit = member()
        for _ in range(50):
            permit = limit.acquire(Cancellation())
            permit.answered(200)
            permit.release()
        refuse(limit)
        assert limit.state.is_limited
        assert 1 <= len(tries) <= 1 + (time.monotonic() - begun) / shared._RETRY
        assert max(tries) < 1


@pytest.mark.parametrize(
    ("silent", "process", "counts"),
    [
        (0.4, ProcessId(1 << 30, "1", ProcessId.current().namespace), True),
        (0.6, ProcessId(1 << 30, "1", ProcessId.current().namespace), False),
        (9.0, ProcessId.current(), True),
        (11.0, ProcessId.current(), False),
        (9.0, ProcessId(1 << 30, "1", "pid:[1]"), True),
        (11.0, ProcessId(1 << 30, "1", "pid:[1]"), False),
    ],
)
def test_row_67_how_long_a_silent_process_counts(silent: float, process: ProcessId, counts: bool) -> None:
    """Whether one in another container lives cannot be seen."""
    assert Member(process, 100.0, in_flight=1).counts(100.0 + silent) is counts


def test_row_67_the_trial_of_a_dead_process_ends() -> None:
    state = LimitState(last_cut=1.0, trial=("dead", 3), members={"dead": Member(ProcessId(), -100.0)})
    state.remove_dead(100.0, "own")
    assert (state.trial, state.members) == (None, {})


# --- files --------------------------------------------------------------------------------------------


def limited(now: float) -> LimitState:
    """Return a state as it can be, with all fields set."""
    state = LimitState()
    starts = [state.start(now + number / 1000, "one") for number in range(4)]
    for start in starts[1:]:
        state.refused(start, now + 0.01, 5.0)
        state.release(start)
    state.members["two"] = Member(ProcessId.current(), now, 2, now - 1)
    state.trial, state.used, state.served = ("two", 7), now, now - 1
    return state


def test_a_stored_state_is_read_as_it_was() -> None:
    now = time.monotonic()
    state = limited(now)
    assert from_note(json.loads(json.dumps(to_note(state))), now) == state


def test_a_state_is_forgotten_after_a_minute_without_requests() -> None:
    state = replace(limited(100.0), members={}, pause_until=150.0, used=120.0)
    assert LimitState().adopt(replace(state, members={}), 209.0, "own")
    assert not LimitState().adopt(replace(state, members={}), 211.0, "own")
    state.forget_if_old(209.0)
    assert state.is_limited
    state.forget_if_old(211.0)
    assert state == LimitState()


def test_row_67_a_limit_of_an_hour_ago_slows_nobody_down(member: Callable[[], OriginLimit], folder: Folder) -> None:
    one, other = member(), member()
    refuse(one)
    (path,) = (folder.path / name for name in folder.entries())
    old = time.monotonic() - 3600
    state = replace(limited(old), pause_until=old, trial=None)
    path.write_text(json.dumps(to_note(state)) + "\n")
    permits = [other.acquire(Cancellation()) for _ in range(3)]  # of which two are in flight at the look
    assert other._shared is not None
    other._shared._next_look = 0.0
    for permit in permits:
        permit.answered(200)
        permit.release()
    assert not other.state.is_limited


def test_a_state_is_not_forgotten_while_a_request_is_in_flight() -> None:
    state = LimitState()
    start = state.start(100.0)
    state.refused(state.start(100.0), 100.0)
    state.forget_if_old(500.0)
    assert state.is_limited
    state.release(start)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", 2),
        ("format", None),
        ("max_in_flight", 0),
        ("max_in_flight", -math.inf),
        ("max_in_flight", math.nan),
        ("max_in_flight", "2"),
        ("interval", 1e6),
        ("interval", -1),
        ("interval", math.inf),
        ("interval", True),
        ("refusals", 1.5),
        ("refusals", 10**30),
        ("successes", -1),
        ("pause_until", 1e12),
        ("pause_until", math.inf),
        ("trial_at", math.nan),
        ("trial", "one"),
        ("trial", [1]),
        ("last_start", math.inf),
        ("last_cut", 1e12),
        ("members", []),
        ("members", None),
        ("members", {"x": 1}),
        ("members", {"x": [[1, "", ""], 0, 1]}),
        ("members", {"x": [[-1, "", ""], 0.0, 1, None]}),
        ("members", {"x": [[1, "", ""], math.inf, 1, None]}),
        ("members", {"x": [[1, "", ""], 0.0, 1e9, None]}),
        ("members", {"x": [[1, "", ""], 0.0, -1, None]}),
    ],
)
def test_row_67_a_crafted_state_is_ignored(name: str, value: Any) -> None:
    now = time.monotonic()
    note = {**to_note(limited(now)), name: value}
    assert from_note(note, now) is None
    del note[name]
    assert from_note(note, now) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\0" * 100_000, b'{"format": 1}'])
def test_row_67_a_damaged_file_slows_nobody_down_and_is_replaced(
    member: Callable[[], OriginLimit], folder: Folder, content: bytes
) -> None:
    one, other = member(), member()
    refuse(one)
    (path,) = (folder.path / name for name in folder.entries())
    path.write_bytes(content)
    other.acquire(Cancellation()).release()
    assert not other.state.is_limited
    refuse(other)
    assert from_note(json.loads(path.read_bytes().partition(b"\n")[0]), time.monotonic()) is not None
    assert look(member()).is_limited


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder", "linked folder", "file as folder"])
def test_row_67_a_load_leaves_alone_what_others_planted(
    tmp_path: Path, scripted: ScriptedServer, cache_dir: Path, folder: Folder, kind: str
) -> None:
    arrays = simple_model(tmp_path / "model", shards=1)
    for path in (tmp_path / "model").iterdir():
        scripted.script[f"/{path.name}"] = [reply(200, path.read_bytes())]
    scripted.script["/params_shard_0.bin"].insert(0, reply(429))
    limit = RateLimits(folder=folder).of(scripted.url)
    assert limit._shared is not None
    planted, victim = folder.path / limit._shared._note.name, tmp_path / "victim"
    victim.write_text("precious")
    planted.parent.parent.mkdir(parents=True)
    if kind == "file as folder":
        planted.parent.write_text("precious")
    elif kind == "linked folder":
        (tmp_path / "elsewhere").mkdir()
        planted.parent.symlink_to(tmp_path / "elsewhere")
    else:
        planted.parent.mkdir()
        plant: dict[str, Callable[[], None]] = {
            "link": lambda: planted.symlink_to(victim),
            "hard link": lambda: planted.hardlink_to(victim),
            "pipe": lambda: os.mkfifo(planted),
            "folder": planted.mkdir,
        }
        plant[kind]()
    assert_same(ndcache.load(scripted.url), arrays)
    assert victim.read_text() == "precious"
    assert not list(tmp_path.glob("elsewhere/*"))
    assert len(scripted.requests_for("/params_shard_0.bin")) == 2


def test_row_67_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    limit = RateLimits(folder=Folder(tmp_path / "file", (".ndcache", "limits"))).of(URL)
    refuse(limit)
    permit = limit.acquire(Cancellation())
    assert (limit.state.in_flight, limit.state.max_in_flight) == (1, 1)
    permit.release()


def test_row_67_a_lock_that_somebody_keeps(member: Callable[[], OriginLimit], folder: Folder) -> None:
    one = member()
    refuse(one)
    (path,) = (folder.path / name for name in folder.entries())
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuse(one, 30.0)  # nobody else can learn of it now
        assert one.state.pause_until > time.monotonic() + 20
    hold(one)
    assert look(member()).is_limited


def test_files_that_nobody_has_used_for_long_are_removed(member: Callable[[], OriginLimit], folder: Folder) -> None:
    folder.make()
    names = [f"{'a' * 32}.json", f"{'b' * 32}.json", "of-somebody-else.json"]
    for name, age in zip(names, [2 * shared._UNUSED, 0, 2 * shared._UNUSED], strict=True):
        (folder.path / name).write_text("{}")
        os.utime(folder.path / name, (time.time() - age, time.time() - age))
    refuse(member())
    assert set(names[1:]) < set(folder.entries())
    assert names[0] not in folder.entries()


def test_row_67_no_file_shows_the_origin(folder: Folder) -> None:
    limit = RateLimits(folder=folder).of("https://user:secret@private.example:8443/model/?token=secret")
    refuse(limit)
    (name,) = folder.entries()
    text = name + (folder.path / name).read_text()
    assert not any(part in text for part in ("secret", "user", "private", "8443", "model"))


def test_a_loader_shares_through_the_cache_of_its_scope(cache_dir: Path, tmp_path: Path) -> None:
    folders = [
        ndcache.Loader(scope=scope, cache_dir=place)._resources.cache.limits
        for scope, place in itertools.product(("one", "two"), (None, tmp_path / "x"))
    ]
    roots = [folder and folder.path for folder in folders]
    assert roots == [cache_dir / ".ndcache" / "limits", tmp_path / "x" / ".ndcache" / "limits"] * 2
