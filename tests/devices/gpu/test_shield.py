"""Ctrl-C and several threads while a GPU is opened or used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

import ndcache
from ndcache.devices.gpu import device as gpu_module
from ndcache.devices.gpu.shield import shielded
from ndcache.workers.threads import raise_hidden_interrupt

from ...helpers import models

PATIENCE = 60


@pytest.mark.usefixtures("interruptible")
def test_row_61_an_interrupt_waits_for_a_call_without_undo() -> None:
    done = []

    def work() -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)  # as long as a driver may take
        done.append(True)

    with pytest.raises(KeyboardInterrupt):
        shielded(work)
    assert done


def test_row_61_an_interrupt_that_became_a_lock_error_is_raised() -> None:
    def wait() -> None:
        condition = threading.Condition()
        with condition:  # as `Thread.start` does; here an interrupt does most harm
            condition.release()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        try:
            wait()
        except RuntimeError as error:
            raise_hidden_interrupt(error)
    raise_hidden_interrupt(RuntimeError("can't start new thread"))


@pytest.mark.usefixtures("interruptible")
def test_row_61_an_interrupt_abandons_a_call_that_does_not_end() -> None:
    may_end, undone = threading.Event(), SimpleQueue[int]()

    def work() -> int:
        signal.raise_signal(signal.SIGINT)
        may_end.wait(PATIENCE)
        return 7

    with pytest.raises(KeyboardInterrupt):
        shielded(work, undo=undone.put)
    assert undone.empty()
    may_end.set()
    assert undone.get(timeout=PATIENCE) == 7


@pytest.mark.usefixtures("interruptible")
def test_row_61_an_interrupted_call_is_undone() -> None:
    undone: list[int] = []

    def work() -> int:
        signal.raise_signal(signal.SIGINT)
        return 7

    with pytest.raises(KeyboardInterrupt):
        shielded(work, undo=undone.append)
    assert undone == [7]


def test_row_61_a_shielded_call_returns_and_raises() -> None:
    assert shielded(threading.current_thread) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        shielded(lambda: 1 / 0)


def test_row_61_other_threads_make_calls_themselves() -> None:
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(shielded(threading.current_thread) is thread))
    thread.start()
    thread.join()
    assert seen == [True]


@pytest.mark.parametrize("is_main", [True, False])
def test_row_61_cancel_ends_the_wait_for_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_main: bool
) -> None:
    models.simple_model(tmp_path)
    cancel, may_end, discarded = threading.Event(), threading.Event(), threading.Event()
    errors: list[BaseException] = []

    class Opened:
        def discard(self, tensors: Any) -> None:
            discarded.set()

    def hang(spec: str) -> Any:
        cancel.set()
        may_end.wait(PATIENCE)
        return Opened()

    def load() -> None:
        try:
            ndcache.load(tmp_path, "gpu", cancel=cancel)
        except ndcache.CancelledError as error:
            errors.append(error)

    monkeypatch.setattr(gpu_module, "_open", hang)
    if is_main:
        load()
    else:
        thread = threading.Thread(target=load)
        thread.start()
        thread.join(PATIENCE)
    assert len(errors) == 1
    may_end.set()
    assert discarded.wait(PATIENCE)


IN_THREADS = """
import gc, os, sys, threading, ndcache
def work():
    for _ in range(4):
        weights = ndcache.load(sys.argv[1], "gpu")
        weights["layer.0"].numpy()
        if threading.get_ident() % 2:
            weights.close()
        del weights
        gc.collect()
environ = dict(os.environ)
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
while any(thread.is_alive() for thread in threads):
    assert dict(os.environ) == environ
    work()
[thread.join() for thread in threads]
child = os.fork()
if not child:
    try:
        ndcache.load(sys.argv[1], "gpu").close()
    except ndcache.DeviceError as error:
        os._exit(1 if "forked" in str(error) else 2)
    os._exit(0)
adapter, status = ndcache.devices.gpu.adapters.list_adapters()[0], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
if adapter.info["backend_type"] == "OpenGL":
    assert status == 1
else:  # the drivers of hardware may refuse
    assert status in ((0,) if adapter.info["adapter_type"] == "CPU" else (0, 1))
"""


@pytest.mark.once
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("backend", ["any", "OpenGL alone"])
def test_row_61_several_threads_and_a_fork_load_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    models.simple_model(tmp_path)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if backend != "any":
        monkeypatch.setenv("VK_ICD_FILENAMES", "/no/where")
    for _ in range(3):
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", IN_THREADS, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if "NoAdapterError" in child.stderr:
            pytest.skip("no OpenGL")
        assert child.returncode == 0, child.stderr


INTERRUPTED = """
import collections, signal, sys, threading, time, ndcache
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
ndcache.load(sys.argv[1], "gpu").close()
begun = time.monotonic()
ndcache.load(sys.argv[1], "gpu").close()
seconds, seen = time.monotonic() - begun, collections.Counter()
for n in range(1, 101):
    weights = None
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds * n / 100)
        try:
            weights = ndcache.load(sys.argv[1], "gpu")
            seen["loaded"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException as error:
        seen[type(error).__name__] += 1
    if weights is not None:
        weights.close()
    end = time.monotonic() + 60  # a call that was left alone ends when the driver lets it
    # Python keeps listing a thread if the interrupt came just before it would have started.
    while any(each.name.startswith("ndcache-device") and each.is_alive() for each in threading.enumerate()):
        if time.monotonic() > end:
            seen["threads left"] += 1
            break
        time.sleep(0.01)
print(*sorted(what for what in seen if seen[what] and what != "loaded"))
"""


@pytest.mark.once
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="timers")
@pytest.mark.usefixtures("gpu")
def test_row_61_ctrl_c_at_any_moment_is_raised_and_leaves_no_thread(tmp_path: Path) -> None:
    models.simple_model(tmp_path)
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERRUPTED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (child.returncode, child.stdout) == (0, "KeyboardInterrupt\n"), child.stderr
