"""A loss of power at any moment leaves no bad file under a real name: recorded system calls, cut at every point."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from .helpers import power
from .helpers.models import random_array, write_model
from .helpers.power import Disk, NotModelledError, Replay, Step
from .helpers.servers import Connection, FileServer, Request, ScriptedServer, reply, then_close
from .helpers.servers import Step as Answer

pytestmark = pytest.mark.once

MANIFEST = "tensor-cache.json"
SHARD_BYTES = 300_000
FETCH = "import sys, ndcache; ndcache.fetch(sys.argv[1], cache_dir=sys.argv[2], retries=0)"


@pytest.fixture(scope="session")
def _strace() -> None:
    if reason := power.refusal():
        pytest.skip(reason)


@pytest.fixture
def fetched(_strace: None, cache_dir: Path, tmp_path: Path) -> Fetched:
    return Fetched(cache_dir.resolve(), tmp_path.resolve())


class Fetched:
    """System calls of child processes that fetch a model, one after the other."""

    def __init__(self, cache_dir: Path, log_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._log_dir = log_dir
        self._lines: list[str] = []

    def by_child(self, url: str, *, before: str = "") -> int:
        """Run a child that fetches `url`, after the Python code `before`; return its exit status."""
        log = self._log_dir / "strace.log"
        status = power.record([sys.executable, "-c", f"{before}\n{FETCH}", url, str(self._cache_dir)], log)
        self._lines += log.read_text().splitlines()
        return status

    @property
    def directory(self) -> Path:
        """Return the model's directory."""
        (manifest,) = (path for path in self._cache_dir.rglob(MANIFEST) if ".ndcache" not in path.parts)
        return manifest.parent

    def replay(self, *versions: dict[str, bytes]) -> Replay:
        """Replay all calls on a model disk, where each file may be that of any of `versions`."""
        steps = power.read_log(self._lines, str(self.directory), str(self._log_dir))
        complete = {name: {files[name] for files in versions if name in files} for files in versions for name in files}
        replay = Replay(steps, complete)
        assert {name: file.written for name in replay.disk.names() if (file := replay.disk.now(name))} == files_of(
            self.directory
        ), "the replay does not end with what is on disk"
        return replay


def files_of(directory: Path) -> dict[str, bytes]:
    """Return the files of a model directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def model(directory: Path, *seeds: int, extra: int = 0) -> dict[str, bytes]:
    """Write a model with a shard for each of `seeds`, the last one longer by `extra` bytes; return its files."""
    sizes = [SHARD_BYTES] * (len(seeds) - 1) + [SHARD_BYTES + extra]
    shards = [
        {f"layer.{index}": random_array((size // 4,), seed=seed)}
        for index, (size, seed) in enumerate(zip(sizes, seeds, strict=True))
    ]
    write_model(directory, shards)
    return files_of(directory)


# --- ndcache


def test_row_25_power_loss_during_a_fetch_leaves_no_bad_file_under_a_real_name(
    fetched: Fetched, serve: Callable[..., FileServer], tmp_path: Path
) -> None:
    files = model(tmp_path / "served", 0, 1, 2, 3)
    assert fetched.by_child(serve(tmp_path / "served").url) == 0
    replay = fetched.replay(files)
    assert replay.faults == {}
    assert replay.disk.lasting() == files  # after the end of the child, nothing of the model can get lost


def test_row_25_power_loss_while_a_broken_transfer_is_resumed_leaves_no_bad_file_under_a_real_name(
    fetched: Fetched, scripted: ScriptedServer, tmp_path: Path
) -> None:
    files = model(tmp_path / "served", 0, 1, 2)
    for name, data in files.items():
        scripted.script[f"/{name}"] = [reply(200, data, {"ETag": etag_of(data)})]
    shard = files["params_shard_0.bin"]
    first_bytes = reply(200, shard[:-100_000], {"ETag": etag_of(shard)}, length=len(shard))
    scripted.script["/params_shard_0.bin"] = [then_close(first_bytes), rest_of(shard)]
    assert fetched.by_child(scripted.url) == 1
    (partial,) = partials_of(fetched.directory, "params_shard_0.bin")
    assert partial.stat().st_size == SHARD_BYTES - 100_000
    assert fetched.by_child(scripted.url) == 0
    assert scripted.requests_for("/params_shard_0.bin")[-1].headers["range"] == f"bytes={SHARD_BYTES - 100_000}-299999"
    replay = fetched.replay(files)
    assert replay.faults == {}
    assert replay.disk.lasting() == files


def test_row_25_power_loss_during_an_update_leaves_no_bad_file_under_a_real_name(
    fetched: Fetched, serve: Callable[..., FileServer], tmp_path: Path
) -> None:
    """One shard stays, one is replaced by another of the same size, one by a longer one."""
    server = serve(tmp_path / "served")
    old = model(tmp_path / "served", 0, 1, 2)
    assert fetched.by_child(server.url) == 0
    new = model(tmp_path / "served", 0, 11, 12, extra=4_000)
    assert fetched.by_child(server.url) == 0
    assert files_of(fetched.directory) == new
    replay = fetched.replay(old, new)
    assert replay.faults == {}
    assert replay.disk.lasting() == new


def test_row_25_without_fsync_the_replay_finds_bad_files(
    fetched: Fetched, serve: Callable[..., FileServer], tmp_path: Path
) -> None:
    files = model(tmp_path / "served", 0, 1, 2)
    assert fetched.by_child(serve(tmp_path / "served").url, before="import os; os.fsync = lambda handle: None") == 0
    replay = fetched.replay(files)
    assert replay.faults.keys() == files.keys()
    assert all(step.startswith("rename") for step in replay.faults.values())
    assert replay.disk.lasting() == {}


def test_row_25_without_fsync_of_the_directory_files_are_good_but_do_not_last(
    fetched: Fetched, serve: Callable[..., FileServer], tmp_path: Path
) -> None:
    files = model(tmp_path / "served", 0, 1, 2)
    before = "import ndcache.files.folder; ndcache.files.folder._sync_folder = lambda handle: None"
    assert fetched.by_child(serve(tmp_path / "served").url, before=before) == 0
    replay = fetched.replay(files)
    assert replay.faults == {}
    assert replay.disk.lasting() == {}


def etag_of(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def rest_of(data: bytes) -> Answer:
    """Answer with the range that the request asks for."""

    def answer(connection: Connection, request: Request) -> None:
        first = int(re.findall(r"\d+", request.headers["range"])[0])
        headers = {"ETag": etag_of(data), "Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        connection.send(reply(206, data[first:], headers))

    return answer


def partials_of(directory: Path, name: str) -> list[Path]:
    return [path for path in (directory / ".ndcache" / "parts").glob(f"{name}.*") if path.suffix != ".json"]


# --- the replay itself

PARTIAL, NAME, OLD, NEW = ".ndcache/parts/1", "shard.bin", b"the old bytes", b"these are new"
CREATE, WRITE, SYNC = Step("create", PARTIAL), Step("write", PARTIAL, data=NEW), Step("sync", PARTIAL)
RENAME, LINK, SYNC_DIRECTORY = Step("rename", PARTIAL, NAME), Step("link", PARTIAL, NAME), Step("sync", ".")
FIRST_HALF, SECOND_HALF = replace(WRITE, data=NEW[:6]), replace(WRITE, data=NEW[6:])
GOOD = [CREATE, WRITE, SYNC, RENAME, SYNC_DIRECTORY]
#: The same steps for an older file of that name.
OLD_PARTIAL = ".ndcache/parts/0"
OLD_GOOD = [replace(step, path=step.path.replace(PARTIAL, OLD_PARTIAL)) for step in GOOD]
OLD_GOOD[1] = replace(OLD_GOOD[1], data=OLD)


def replayed(*steps: Step) -> Replay:
    """Replay steps one after the other, where `NAME` may have all of the old or all of the new bytes."""
    numbered = [replace(step, begun=number, done=number) for number, step in enumerate(steps)]
    return Replay(numbered, {NAME: {OLD, NEW}})


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(GOOD, id="one write"),
        pytest.param([CREATE, FIRST_HALF, SECOND_HALF, SYNC, RENAME, SYNC_DIRECTORY], id="two writes"),
        pytest.param([CREATE, FIRST_HALF, SYNC, SECOND_HALF, SYNC, RENAME, SYNC_DIRECTORY], id="synced twice"),
        pytest.param([CREATE, WRITE, SYNC, LINK, Step("unlink", PARTIAL), SYNC_DIRECTORY], id="linked"),
        pytest.param([*OLD_GOOD, *GOOD], id="replaced"),
        pytest.param([*OLD_GOOD, Step("unlink", NAME), *GOOD], id="removed first"),
        pytest.param([*OLD_GOOD, Step("rename", NAME, ".ndcache/aside/1"), *GOOD], id="quarantined first"),
        pytest.param([CREATE, Step("write", PARTIAL, data=b"bad"), replace(SYNC), *OLD_GOOD], id="a bad partial file"),
        pytest.param(
            [CREATE, Step("truncate", PARTIAL, offset=6), SECOND_HALF, replace(FIRST_HALF, offset=0), *GOOD[2:]],
            id="out of order",
        ),
    ],
)
def test_the_replay_finds_no_fault_where_there_is_none(steps: list[Step]) -> None:
    replay = replayed(*steps)
    assert replay.faults == {}
    assert replay.disk.lasting() in ({NAME: NEW}, {NAME: OLD})


@pytest.mark.parametrize(
    ("steps", "where"),
    [
        pytest.param([CREATE, WRITE, RENAME, SYNC_DIRECTORY], f"rename {PARTIAL}", id="no sync"),
        pytest.param([CREATE, WRITE, SYNC_DIRECTORY, RENAME], f"rename {PARTIAL}", id="only the directory is synced"),
        pytest.param([CREATE, WRITE, RENAME, replace(SYNC, path=NAME)], f"rename {PARTIAL}", id="too late"),
        pytest.param([CREATE, SYNC, WRITE, RENAME], f"rename {PARTIAL}", id="too early"),
        pytest.param([CREATE, FIRST_HALF, SYNC, SECOND_HALF, RENAME], f"rename {PARTIAL}", id="half of it"),
        pytest.param([CREATE, FIRST_HALF, SYNC, RENAME, SYNC_DIRECTORY], f"rename {PARTIAL}", id="incomplete"),
        pytest.param([CREATE, SYNC, RENAME, SYNC_DIRECTORY], f"rename {PARTIAL}", id="empty"),
        pytest.param([CREATE, WRITE, LINK], f"link {PARTIAL}", id="linked"),
        pytest.param([*GOOD, Step("write", NAME, data=b"!")], f"write {NAME}", id="appended afterwards"),
        pytest.param([*GOOD, Step("write", NAME, data=NEW, offset=0)], f"write {NAME}", id="the same bytes again"),
        pytest.param([*GOOD, Step("truncate", NAME, offset=3)], f"truncate {NAME}", id="cut afterwards"),
        pytest.param([CREATE, WRITE, SYNC, LINK, WRITE], f"write {PARTIAL}", id="written under its other name"),
        pytest.param([Step("create", NAME)], f"create {NAME}", id="begun under its name"),
        pytest.param([*OLD_GOOD, CREATE, WRITE, RENAME], f"rename {PARTIAL}", id="replaced without a sync"),
        pytest.param([*OLD_GOOD, CREATE, WRITE, RENAME, *GOOD], f"rename {PARTIAL}", id="only for a moment"),
        pytest.param([CREATE, WRITE, SYNC, replace(RENAME, target="x")], f"rename {PARTIAL}", id="an unknown name"),
    ],
)
def test_the_replay_finds_the_fault(steps: list[Step], where: str) -> None:
    assert list(replayed(*steps).faults.values()) == [where]


def test_a_name_that_was_replaced_may_come_back_until_the_directory_is_synced() -> None:
    bad = [CREATE, replace(WRITE, data=b"bad"), SYNC, RENAME]
    assert replayed(*bad, Step("unlink", NAME)).disk.after_power_loss(NAME) != [None]
    assert replayed(*bad, Step("unlink", NAME), SYNC_DIRECTORY).disk.after_power_loss(NAME) == [None]


def test_bytes_that_were_not_synced_may_be_missing_or_zeros_or_there() -> None:
    disk = Disk()
    for step in (CREATE, FIRST_HALF, SYNC, SECOND_HALF):
        disk.apply(replace(step, begun=1))
    file = disk.now(PARTIAL)
    assert file is not None
    assert set(file.after_power_loss()) == {NEW[:6], NEW[:6] + bytes(len(NEW) - 6), NEW}


@pytest.mark.parametrize(
    "sync",
    [
        pytest.param(Step("sync", PARTIAL, begun=3, done=9), id="the write is under way when the sync begins"),
        pytest.param(Step("sync", PARTIAL, begun=5, done=20), id="the sync is under way at the rename"),
    ],
)
def test_only_a_sync_between_the_end_of_the_write_and_the_rename_counts(sync: Step) -> None:
    calls = [replace(CREATE, begun=0, done=1), replace(WRITE, begun=2, done=4), replace(RENAME, begun=10, done=11)]
    between = Step("sync", PARTIAL, begun=5, done=9)
    assert Replay([*calls, between], {NAME: {NEW}}).faults == {}
    assert list(Replay([*calls, sync], {NAME: {NEW}}).faults) == [NAME]


def test_a_sync_of_the_directory_that_began_before_the_rename_ended_does_not_count() -> None:
    calls = [replace(step, begun=number, done=number) for number, step in enumerate((CREATE, WRITE, SYNC))]
    calls.append(replace(RENAME, begun=10, done=12))
    assert Replay([*calls, replace(SYNC_DIRECTORY, begun=11, done=13)], {NAME: {NEW}}).disk.lasting() == {}
    assert Replay([*calls, replace(SYNC_DIRECTORY, begun=13, done=14)], {NAME: {NEW}}).disk.lasting() == {NAME: NEW}


def test_of_two_concurrent_syncs_the_earlier_one_takes_nothing_back() -> None:
    calls = [replace(step, begun=number, done=number) for number, step in enumerate((CREATE, WRITE, SYNC))]
    early, rename = replace(SYNC_DIRECTORY, begun=3, done=20), replace(RENAME, begun=4, done=5)
    late = replace(SYNC_DIRECTORY, begun=6, done=10)
    assert Replay([*calls, early, rename], {NAME: {NEW}}).disk.lasting() == {}
    assert Replay([*calls, early, rename, late], {NAME: {NEW}}).disk.lasting() == {NAME: NEW}


# --- the recording


@pytest.mark.usefixtures("_strace")
def test_a_recording_replayed_ends_with_what_is_on_disk(tmp_path: Path) -> None:
    code = """
import os, threading
os.mkdir("d")
def write(name):
    with open(name, "wb", buffering=0) as file:
        for number in range(50):
            file.write(bytes([number]) * 1000)
            os.fsync(file.fileno())
threads = [threading.Thread(target=write, args=(f"d/{number}",)) for number in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
handle = os.open("d", os.O_RDONLY)
os.rename("0", "6", src_dir_fd=handle, dst_dir_fd=handle)
os.replace("d/1", "d/7 \\u00fc\\n\\"")
os.link("d/2", "d/8")
os.unlink("3", dir_fd=handle)
file = os.open("d/9", os.O_RDWR | os.O_CREAT)
os.writev(file, [b"one, ", b"two"])
os.pwrite(file, b"ONE", 0)
os.ftruncate(file, 6)
os.close(os.dup(file))
if os.fork() == 0:
    os.write(os.open("d/5", os.O_WRONLY | os.O_CREAT), b"a child's")
    os._exit(0)
os.wait()
os.unlink("d/2")
os.write(os.open("d/2", os.O_WRONLY | os.O_CREAT), b"another file")
os.fsync(handle)
"""
    tmp_path = tmp_path.resolve()
    log = tmp_path / "log"
    assert power.record([sys.executable, "-c", code], log) == 0
    directory = tmp_path / "d"
    disk = Replay(power.read_log(log.read_text().splitlines(), str(directory), str(tmp_path)), {}).disk
    found = {name: file.written for name in disk.names() if (file := disk.now(name))}
    assert found == files_of(directory)
    assert sorted(found) == ["2", "5", "6", '7 ü\n"', "8", "9"]
    assert sorted(disk.lasting()) == ["6", '7 ü\n"', "8"]


@pytest.mark.parametrize(
    ("lines", "steps"),
    [
        pytest.param(
            ['7 openat(AT_FDCWD</c>, "/m/x", O_RDWR|O_CREAT|O_EXCL, 0644) = 3</m/x>', '7 write(3</m/x>, "abc", 3) = 2'],
            [Step("create", "x"), Step("write", "x", data=b"ab", begun=1, done=1)],
            id="a write that was not complete",
        ),
        pytest.param(
            ["7 fsync(3</m/x> <unfinished ...>", '8 rename("/m/a", "/m/b") = 0', "7 <... fsync resumed>) = 0"],
            [Step("rename", "a", "b", begun=1, done=1), Step("sync", "x", begun=0, done=2)],
            id="threads that take turns",
        ),
        pytest.param(
            ['7  openat(AT_FDCWD, "y" <unfinished ...>', "7  <... openat resumed>, O_WRONLY|O_TRUNC) = 3</m/y>"],
            [Step("truncate", "y", offset=0, begun=0, done=1)],
            id="a relative path",
        ),
        pytest.param(
            [r'7 pwrite64(3<\x2f\x6d\x2f\x78>, "\x61\x22", 2, 40) = 2', "7 fdatasync(4</m>) = 0"],
            [Step("write", "x", data=b'a"', offset=40), Step("sync", ".", begun=1, done=1)],
            id="in hex",
        ),
        pytest.param(
            ['7 renameat2(4</m>, "a", 5</m/d>, "b", RENAME_NOREPLACE) = 0', '7 unlinkat(4</m>, "d", AT_REMOVEDIR) = 0'],
            [Step("rename", "a", "d/b")],
            id="relative to open directories",
        ),
        pytest.param(
            [
                '7 unlink("/m/x") = -1 ENOENT (No such file or directory)',
                '7 write(3</m/x>(deleted), "a", 1) = 1',
                '7 write(3</m/x (deleted)>, "a", 1) = 1',
                '7 write(3</mm/x>, "a", 1) = 1',
                '7 write(2<pipe:[123]>, "/m/x", 4) = 4',
                '7 openat(AT_FDCWD</c>, "/m/x", O_RDONLY) = 3</m/x>',
                "7 mmap(NULL, 9, PROT_READ|PROT_WRITE, MAP_PRIVATE, 3</m/x>, 0) = 0x7f00",
                "7 mmap(NULL, 9, PROT_READ, MAP_SHARED, 3</m/x>, 0) = 0x7f00",
                "7 copy_file_range(3</a/x>, NULL, 4</b/x>, NULL, 9, 0) = 9",
                "7 fsync(3</m/x>) = ?",
                "7 --- SIGCHLD {si_signo=SIGCHLD} ---",
                "7 +++ exited with 0 +++",
            ],
            [],
            id="nothing that matters",
        ),
    ],
)
def test_logs_of_strace_are_read(lines: list[str], steps: list[Step]) -> None:
    assert power.read_log(lines, "/m", "/m") == steps


@pytest.mark.parametrize(
    "line",
    [
        "7 copy_file_range(3</a/x>, NULL, 4</m/x>, NULL, 9, 0) = 9",
        "7 sendfile(4</m/x>, 3</a/x>, NULL, 9) = 9",
        "7 mmap(NULL, 9, PROT_READ|PROT_WRITE, MAP_SHARED, 3</m/x>, 0) = 0x7f00",
        '7 truncate("/m/x", 3) = 0',
        '7 symlink("/a/x", "/m/x") = 0',
        "7 sync() = 0",
        '7 write(3</m/x>, "ab"..., 3) = 3',
    ],
)
def test_calls_that_the_replay_does_not_know_are_errors(line: str) -> None:
    with pytest.raises(NotModelledError):
        power.read_log([line], "/m", "/m")


@pytest.mark.parametrize("step", [RENAME, Step("rename", "", NAME), WRITE, Step("truncate", NAME, offset=0)])
def test_steps_on_a_file_of_unknown_content_are_errors(step: Step) -> None:
    with pytest.raises(NotModelledError):
        replayed(step)
