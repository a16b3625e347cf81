"""Notes that several processes change in turn."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ndcache.files import shared_note
from ndcache.files.folder import Folder
from ndcache.files.shared_note import SharedNote

from ..helpers.processes import run_script


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_note, "_are_effective", {})


@pytest.fixture
def note(tmp_path: Path) -> SharedNote:
    return SharedNote(Folder(tmp_path / "root", ("state",)), "note.json")


@pytest.fixture
def path(note: SharedNote) -> Path:
    note.folder.make()
    return note.folder.path / note.name


def test_what_is_written_is_read(note: SharedNote) -> None:
    assert note.version() is None
    with note.held(creates=False) as held:
        assert held is None
    assert not note.folder.root.exists()
    for content in ({"a": "long" * 100}, {"b": 1}, {}):
        with note.held(creates=True) as held:
            assert held is not None
            held.write(content)
        with note.held(creates=False) as held:
            assert held is not None
            assert held.read() == content
    assert note.version() is not None


def test_processes_take_turns(note: SharedNote, path: Path) -> None:
    script = """
    import sys
    from pathlib import Path
    from ndcache.files.folder import Folder
    from ndcache.files.shared_note import SharedNote
    note = SharedNote(Folder(Path(sys.argv[1]), ("state",)), "note.json")
    done = 0
    while done < 200:
        with note.held(creates=True) as held:
            if held is not None:
                held.write({"count": (held.read() or {"count": 0})["count"] + 1})
                done += 1
    """
    code = "import textwrap; exec(textwrap.dedent(" + repr(script) + "))"
    environ = {**os.environ, "PYTHONPATH": str(Path(shared_note.__file__).parents[2])}
    children = [subprocess.Popen([sys.executable, "-c", code, note.folder.root], env=environ) for _ in range(3)]
    assert [child.wait(120) for child in children] == [0, 0, 0]
    with note.held(creates=False) as held:
        assert held is not None
        assert held.read() == {"count": 600}


def test_somebody_who_keeps_the_lock_is_not_waited_for_long(note: SharedNote, path: Path) -> None:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with note.held(creates=True) as held:
            assert held is None
    with note.held(creates=True) as held:
        assert held is not None


def test_locks_that_keep_nobody_out_are_no_locks(note: SharedNote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with note.held(creates=True) as held:
        assert held is None


def test_a_system_without_locks(note: SharedNote, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(fcntl, "flock", fail)
    with note.held(creates=True) as held:
        assert held is None


def test_a_fork_of_somebody_who_holds_it_does_not_keep_the_lock() -> None:
    script = """
    import os, signal, sys, tempfile
    from pathlib import Path
    from ndcache.files.folder import Folder
    from ndcache.files.shared_note import SharedNote
    with tempfile.TemporaryDirectory() as root:
        note = SharedNote(Folder(Path(root)), "note.json")
        with note.held(creates=True) as held:
            assert held is not None
            child = os.fork()
            if child == 0:
                signal.pause()
        with note.held(creates=True) as held:
            print(held is not None)
        os.kill(child, signal.SIGKILL)
        os.wait()
    """
    assert run_script(script) == "True\n"


def _link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def _hard_link(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def _folder(path: Path, victim: Path) -> None:
    path.mkdir()


def _pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def _linked_folder(path: Path, victim: Path) -> None:
    path.parent.rmdir()
    path.parent.symlink_to(victim.parent)


@pytest.mark.parametrize("plant", [_link, _hard_link, _folder, _pipe, _linked_folder])
def test_what_is_not_a_file_of_its_own_is_left_alone(
    note: SharedNote, path: Path, tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    victim = tmp_path / "victim" / "note.json"
    victim.parent.mkdir()
    victim.write_text("precious")
    plant(path, victim)
    with note.held(creates=True) as held:
        assert held is None
    note.version()  # raises nothing
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]\n",
        b"\xff\n",
        b"\0" * 10_000_000,
        b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"a": ' + b"1" * 60_000 + b"}",
        b"[" * 10_000_000,
    ],
    ids=["empty", "cut", "list", "encoding", "zeros", "deep", "number", "huge"],
)
def test_a_damaged_note_counts_as_none_and_is_replaced(note: SharedNote, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with note.held(creates=False) as held:
        assert held is not None
        assert held.read() is None
        held.write({"good": 1})
        assert held.read() == {"good": 1}
    assert json.loads(path.read_bytes().partition(b"\n")[0]) == {"good": 1}


def test_a_full_disk_is_no_error(note: SharedNote, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "no space left on device")

    with note.held(creates=True) as held:
        assert held is not None
        monkeypatch.setattr(os, "pwrite", fail)
        held.write({"a": 1})
        assert held.read() is None


def test_a_file_that_is_removed_while_others_wait_is_made_anew(note: SharedNote, path: Path) -> None:
    with note.held(creates=True) as held:
        assert held is not None
        path.unlink()
        with note.held(creates=True) as other:
            assert other is not None
            other.write({"new": 1})
    with note.held(creates=False) as held:
        assert held is not None
        assert held.read() == {"new": 1}
