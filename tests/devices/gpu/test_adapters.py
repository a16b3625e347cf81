"""The list of GPU adapters, and the adapter that the ``device`` option names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.devices.gpu import adapters as adapters_module
from ndcache.devices.gpu import open_gpu

from ...helpers import models


class FakeAdapter:
    """An adapter with the information that `list_adapters` reads."""

    def __init__(self, device: str, adapter_type: str, backend: str = "Vulkan") -> None:
        self.info = {"device": device, "adapter_type": adapter_type, "backend_type": backend}


def test_adapters_are_listed_by_type_with_their_best_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    import wgpu

    found = [
        FakeAdapter("llvmpipe (LLVM 15)", "CPU", "Vulkan"),
        FakeAdapter("NVIDIA H200/PCIe/SSE2", "Unknown", "OpenGL"),
        FakeAdapter("NVIDIA H200", "DiscreteGPU", "Vulkan"),
        FakeAdapter("NVIDIA H200", "DiscreteGPU", "Vulkan"),
        FakeAdapter("Intel(R) UHD", "IntegratedGPU", "D3D12"),
        FakeAdapter("llvmpipe (LLVM 15)", "CPU", "OpenGL"),
    ]
    monkeypatch.setattr(adapters_module, "_known", [])
    monkeypatch.setattr(adapters_module, "_list_primary", lambda: None)
    monkeypatch.setattr(wgpu.gpu, "enumerate_adapters_sync", lambda: found)
    assert [(a.info["device"], a.info["backend_type"]) for a in adapters_module.list_adapters()] == [
        ("NVIDIA H200", "Vulkan"),
        ("NVIDIA H200", "Vulkan"),
        ("Intel(R) UHD", "D3D12"),
        ("llvmpipe (LLVM 15)", "Vulkan"),
    ]


class BrokenAdapter(FakeAdapter):
    """An adapter as NVIDIA's Vulkan gives it to a forked process."""

    features = limits = ()
    error = "GPUValidationError"

    def request_device_sync(self, **_: Any) -> None:
        import wgpu

        raise getattr(wgpu, self.error)("Parent device is lost")


@pytest.mark.parametrize("is_from_parent", [True, False])
def test_row_37_an_adapter_that_the_parent_process_had_used_is_blamed_on_the_fork(
    monkeypatch: pytest.MonkeyPatch, is_from_parent: bool
) -> None:
    adapter = BrokenAdapter("NVIDIA H100", "DiscreteGPU")
    monkeypatch.setattr(adapters_module, "_known", [adapter])
    monkeypatch.setattr(adapters_module, "_from_parent", [adapter] if is_from_parent else [])
    with pytest.raises(ndcache.DeviceError, match="forked" if is_from_parent else "lost") as caught:
        open_gpu("gpu")
    assert ("'spawn'" in str(caught.value)) == is_from_parent
    adapter.error = "GPUOutOfMemoryError"
    with pytest.raises(ndcache.OutOfDeviceMemoryError):
        open_gpu("gpu")


def test_the_adapters_of_this_machine_are_listed_once_hardware_first(gpu: Any) -> None:
    found = adapters_module.list_adapters()
    assert found
    names = [adapter.info["device"] for adapter in found]
    assert len(names) == len(set(names))
    software = [adapters_module.is_software(adapter) for adapter in found]
    assert software == sorted(software)


def test_row_38_a_machine_without_adapters_is_a_no_adapter_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import wgpu

    monkeypatch.setattr(adapters_module, "_known", [])
    monkeypatch.setattr(adapters_module, "_list_primary", list)
    monkeypatch.setattr(wgpu.gpu, "enumerate_adapters_sync", list)
    models.simple_model(tmp_path)
    with pytest.raises(ndcache.NoAdapterError, match="no GPU adapter") as caught:
        ndcache.load(tmp_path, "gpu")
    if sys.platform == "linux":
        assert "mesa-vulkan-drivers" in str(caught.value)
    assert ndcache.load(tmp_path, "auto").device == "cpu"


def test_row_38_an_adapter_index_that_is_too_high_is_refused(gpu: Any, tmp_path: Path) -> None:
    models.simple_model(tmp_path)
    with pytest.raises(ndcache.NoAdapterError, match="no GPU adapter 99"):
        ndcache.load(tmp_path, "gpu:99")


def test_row_38_a_wgpu_that_cannot_be_imported_is_a_no_adapter_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models.simple_model(tmp_path)
    monkeypatch.setitem(sys.modules, "wgpu", None)
    with pytest.raises(ndcache.NoAdapterError, match="wgpu cannot be loaded"):
        ndcache.load(tmp_path, "gpu")
    assert ndcache.load(tmp_path, "auto").device == "cpu"


@pytest.mark.parametrize(
    ("primary", "gpu_files", "lists_all"),
    [
        (["DiscreteGPU"], [__file__], False),
        (["CPU"], ["no/where"], False),
        (["CPU"], [__file__], True),  # a GPU whose driver supports only OpenGL
        ([], ["no/where"], True),
        (None, ["no/where"], True),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these files")
def test_row_61_opengl_is_listed_only_if_it_may_have_more(
    monkeypatch: pytest.MonkeyPatch, primary: Any, gpu_files: list[str], lists_all: bool
) -> None:
    wgpu = pytest.importorskip("wgpu")
    listings = 0

    def list_all() -> list[FakeAdapter]:
        nonlocal listings
        listings += 1
        return [FakeAdapter("IntegratedGPU", "IntegratedGPU")]

    found = None if primary is None else [FakeAdapter(kind, kind) for kind in primary]
    monkeypatch.setattr(adapters_module, "_known", [])
    monkeypatch.setattr(adapters_module, "_GPU_FILES", gpu_files)
    monkeypatch.setattr(adapters_module, "_list_primary", lambda: found)
    monkeypatch.setattr(wgpu.gpu, "enumerate_adapters_sync", list_all)
    assert len(adapters_module.list_adapters()) == 1
    assert len(adapters_module.list_adapters()) == 1
    assert listings == lists_all


def test_row_61_all_adapters_but_those_of_opengl_are_listed(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wgpu = pytest.importorskip("wgpu")
    primary = adapters_module._list_primary()
    if primary is not None:  # None: this version of wgpu cannot list them alone
        every = [adapter.info for adapter in wgpu.gpu.enumerate_adapters_sync()]
        assert [a.info["device"] for a in primary] == [i["device"] for i in every if i["backend_type"] != "OpenGL"]
