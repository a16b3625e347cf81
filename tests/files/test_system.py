"""Identities of processes, of the system's start and of its clock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ndcache.files import system
from ndcache.files.system import ProcessId, boot_id, clock_id

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system has no /proc")


def of(pid: int) -> ProcessId:
    """Return the identity of another process of this namespace."""
    return ProcessId(pid, system._state(pid)[1], ProcessId.current().namespace)


def test_this_process_lives() -> None:
    current = ProcessId.current()
    assert current.pid == os.getpid()
    assert current.started
    assert not current.has_ended()


def test_a_killed_process_has_ended_before_and_after_its_parent_asks_for_its_status() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child:
        identity = of(child.pid)
        assert not identity.has_ended()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert identity.has_ended()
    assert identity.has_ended()


def test_a_number_that_was_given_to_another_process() -> None:
    assert ProcessId.current()._replace(started="1").has_ended()


@pytest.mark.parametrize("namespace", ["", "pid:[1]"])
def test_of_another_namespace_nothing_is_known(namespace: str) -> None:
    assert not ProcessId(1 << 30, "1", namespace).has_ended()


@pytest.mark.parametrize("pid", [1 << 30, 1 << 70])
def test_a_number_that_no_process_has(pid: int) -> None:
    assert ProcessId.current()._replace(pid=pid).has_ended() is (pid == 1 << 30)


def test_a_process_whose_start_is_hidden_counts_as_living(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mount option ``hidepid`` hides those of other accounts."""
    current = ProcessId.current()
    monkeypatch.setattr(system, "_state", lambda pid: ("", ""))
    assert not current.has_ended()


def test_the_clock_is_that_of_this_boot() -> None:
    assert boot_id()
    assert boot_id() in clock_id()
