"""The calls of CUDA's driver, with functions of ours in place of the library's."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from ndcache.devices.torch import driver
from ndcache.devices.torch.api import TorchApi
from ndcache.devices.torch.driver import DriverApi, open_api

from ...helpers.requirements import need_module

pytestmark = pytest.mark.torch


class Library:
    """A library whose functions note that they were called, and return the codes of `codes`, or 0."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.called: list[str] = []

    def functions(self) -> dict[str, Any]:
        return {name: self._function(name) for name in (*driver._SHORT, *driver._LONG)}

    def _function(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.called.append(name)
            if name in ("cuGetErrorName", "cuGetErrorString"):
                arguments[1]._obj.value = {"cuGetErrorName": b"CUDA_ERROR", "cuGetErrorString": b"a text"}[name]
            return self.codes.get(name, 0)

        return call


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
def api(library: Library) -> DriverApi:
    return DriverApi(need_module("torch").device("cpu"), library.functions(), 17)


def test_the_context_is_left_after_an_error(api: DriverApi, library: Library) -> None:
    with pytest.raises(ZeroDivisionError), api.active():
        raise ZeroDivisionError
    assert library.called == ["cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"]


@pytest.mark.parametrize(
    ("code", "text"),
    [(2, "cuMemHostRegister_v2: out of memory"), (700, r"cuMemHostRegister_v2: CUDA_ERROR \(700\), a text")],
)
def test_codes_become_errors(api: DriverApi, library: Library, code: int, text: str) -> None:
    library.codes["cuMemHostRegister_v2"] = code
    with pytest.raises(RuntimeError, match=text):
        api.register(1 << 21, 8 << 20)


def test_an_event_has_happened_or_not(api: DriverApi, library: Library) -> None:
    assert api.has_happened(5)
    library.codes["cuEventQuery"] = 600
    assert not api.has_happened(5)
    library.codes["cuEventQuery"] = 700
    with pytest.raises(RuntimeError, match="cuEventQuery"):
        api.has_happened(5)


def test_the_default_stream_is_not_a_new_one(api: DriverApi, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = need_module("torch").cuda
    entered: list[object] = []
    monkeypatch.setattr(cuda, "ExternalStream", lambda stream, device: ("external", stream))
    monkeypatch.setattr(cuda, "default_stream", lambda device: "default")

    @contextmanager
    def enter(stream: object) -> Iterator[None]:
        entered.append(stream)
        yield

    monkeypatch.setattr(cuda, "stream", enter)
    for stream in (0, 5):
        with api.on(stream):
            pass
    assert entered == ["default", ("external", 5)]


def test_following_a_stream_leaves_no_event(api: DriverApi, library: Library) -> None:
    api.follow(1, 2)
    assert library.called == ["cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuEventDestroy_v2"]
    library.codes["cuStreamWaitEvent"] = 1
    with pytest.raises(RuntimeError, match="cuStreamWaitEvent"):
        api.follow(1, 2)
    assert library.called[-1] == "cuEventDestroy_v2"


@pytest.mark.parametrize("why", ["no library", "another GPU"])
def test_without_the_library_pytorch_is_enough(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    torch = need_module("torch")
    monkeypatch.setattr(torch.version, "cuda", "13.0" if why == "no library" else None)
    monkeypatch.setattr(driver, "_LIBRARY", "libcuda-of-nobody.so.1")
    with caplog.at_level(logging.DEBUG, "ndcache"):
        assert type(open_api(torch.device("cuda", 99))) is TorchApi
    assert ("libcuda-of-nobody" if why == "no library" else "other GPUs than NVIDIA's") in caplog.text


class Memory:
    """A tensor's memory at some address."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


@pytest.mark.parametrize(
    ("offset", "nbytes", "launches"),
    [
        (32, 64, [(4, 0, 0)]),
        (32, 70, [(4, 0, 0), (3, 64, 128)]),
        (32, 6, [(3, 0, 0)]),
        (33, 64, [(32, 0, 0)]),
        (40, 64, [(32, 0, 0)]),
    ],
)
def test_bfloat16_is_expanded_by_eights_where_it_is_aligned(
    api: DriverApi, library: Library, offset: int, nbytes: int, launches: list[tuple[int, int, int]]
) -> None:
    found: list[tuple[int, int, int]] = []

    def launch(kernel: Any, *arguments: Any) -> int:
        source, target, threads = (ctypes.c_uint64.from_address(arguments[8][index]).value for index in range(3))
        assert arguments[0] * arguments[3] >= threads > (arguments[0] - 1) * arguments[3]
        found.append((threads, source - (1 << 20) - offset, target - (1 << 21) - 400))
        return 0

    functions = api._functions
    functions["cuLaunchKernel"] = launch
    slots: Any = SimpleNamespace(device_address=1 << 20)
    tensor: Any = Memory(1 << 21)
    api.expand(tensor, 400, slots, offset, nbytes, 5)
    assert found == launches
    assert library.called.count("cuModuleLoadData") == 1


@pytest.mark.parametrize("refuses", ["cuModuleLoadData", "cuMemHostGetDevicePointer_v2"])
def test_pytorch_expands_if_the_driver_cannot(
    api: DriverApi, library: Library, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    torch = need_module("torch")
    library.codes[refuses] = 218
    monkeypatch.setattr(api, "on", lambda stream: nullcontext())
    stored = torch.tensor([0, 1.5, -2, float("inf"), 3e-39], dtype=torch.bfloat16)
    memory = torch.cat([torch.zeros(3, dtype=torch.uint8), stored.view(torch.uint8)])
    address = api.device_address(memory.data_ptr()) if refuses.startswith("cuMem") else 1 << 20
    slots: Any = SimpleNamespace(tensor=memory, device_address=address)
    target = torch.zeros(7)
    api.expand(target, 4, slots, 3, 10, 5)
    assert torch.equal(target, torch.tensor([0, *stored.float().tolist(), 0]))
    assert "cuLaunchKernel" not in library.called
