"""Fixtures that every test may use."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from .helpers.requirements import need_cuda
from .helpers.servers import FileServer, ScriptedServer

# So that spawned processes can import the tests. At the end, so that an installed ndcache comes before the checkout's.
sys.path.append(str(Path(__file__).parent.parent))

_VARIABLES = (
    *("NDCACHE_OFFLINE", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"),
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"),
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn skips into failures if NDCACHE_TEST_REQUIRE_ALL is set."""
    report = yield
    if report.skipped and os.environ.get("NDCACHE_TEST_REQUIRE_ALL") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and NDCACHE_TEST_REQUIRE_ALL is set: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the user's cache, tokens, credentials and proxies from every test."""
    monkeypatch.setenv("NDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in list(os.environ):
        is_own = name.startswith("NDCACHE_") and name != "NDCACHE_HOME" and not name.startswith("NDCACHE_TEST_")
        if is_own or name.lower().endswith("_proxy") or name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_leaks(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail tests that leave threads of ndcache, sockets or files behind."""
    if request.node.get_closest_marker("cuda"):
        need_cuda()
    before = _open_files(tmp_path)
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("ndcache")]
    assert not left, f"threads left behind: {left}"
    begun = time.monotonic()
    while still_open := _open_files(tmp_path) - before:
        waited = time.monotonic() - begun
        assert waited < 30, f"left open: {still_open}"
        time.sleep(0.005)  # threads of the servers may still be closing their sockets
        if waited > 0.2:
            gc.collect()


def _open_files(folder: Path) -> set[str]:
    """Return the open sockets, and open files below `folder`, of this process, if the system lists them."""
    found = set()
    with contextlib.suppress(OSError):
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{descriptor}")
                if target.startswith(("socket:", str(folder))) and not _is_of_cuda(int(descriptor)):
                    found.add(f"{descriptor} {target}")
    return found


def _is_of_cuda(descriptor: int) -> bool:
    """Return whether it is a socket of CUDA's driver, which keeps some open, and uses a type that nothing else does."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as copy:
        return copy.type == socket.SOCK_SEQPACKET
    return False


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """Return the directory of the default cache."""
    return tmp_path / "home"


@pytest.fixture
def serve() -> Iterator[Callable[..., FileServer]]:
    """Return a function that starts a `FileServer`, which is closed after the test."""
    started: list[FileServer] = []

    def start(directory: Path, **options: Any) -> FileServer:
        started.append(FileServer(directory, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    """Return a `ScriptedServer` with an empty script."""
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt this process, and its children: if pytest runs in the background, they ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def gpu() -> Any:
    """Return a `wgpu.GPUDevice`, perhaps a software one. Without one, skip the test; in CI, fail."""
    import ndcache
    from ndcache.devices.gpu import open_gpu

    try:
        device = open_gpu("gpu")
    except ndcache.NoAdapterError as error:
        if os.environ.get("NDCACHE_TEST_REQUIRE_ALL"):
            raise
        pytest.skip(str(error))
    assert device is not None
    return device.handle
