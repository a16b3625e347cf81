"""Devices of PyTorch that are there, and one error for each reason why one is not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ndcache
import ndcache.torch
from ndcache.devices import open_device

from ...helpers import models
from ...helpers.processes import run_script
from ...helpers.requirements import need_module
from ...helpers.servers import FileServer


@pytest.fixture
def torch() -> Any:
    return need_module("torch")


@pytest.fixture
def no_requests(tmp_path: Path, serve: Callable[..., FileServer]) -> Any:
    """Return the URL of a model; after the test, check that no request was made for it."""
    models.simple_model(tmp_path / "model")
    server = serve(tmp_path / "model")
    yield server.url
    assert server.requests == []


#: The calls that need PyTorch.
CALLS = [ndcache.load, ndcache.stream, ndcache.torch.load, ndcache.torch.stream]


@pytest.mark.parametrize("call", CALLS)
def test_row_79_no_pytorch(no_requests: str, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ndcache.DeviceError, match="PyTorch is not installed") as caught:
        call(no_requests, "cuda")
    assert "pip install torch" in str(caught.value)


def test_row_79_a_pytorch_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import ctypes; ctypes.CDLL('libcudart-of-nobody.so.12')")
    script = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import ndcache
        try:
            ndcache.load("model", "cuda")
        except ndcache.DeviceError as error:
            print(error)
    """
    text = run_script(script, tmp_path)
    assert text.startswith("PyTorch cannot be imported: libcudart-of-nobody.so.12")
    assert "Reinstall it" in text


@pytest.mark.torch
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_row_80_a_pytorch_without_cuda(
    torch: Any, no_requests: str, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], device: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "empty", fail(AssertionError("Torch not compiled with CUDA enabled")))
    with pytest.raises(ndcache.NoAdapterError, match=f"without CUDA, and '{device}' needs it") as caught:
        call(no_requests, device)
    assert "Install a PyTorch with CUDA" in str(caught.value)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("count", "text", "hint"),
    [
        (0, "finds no device of CUDA: no NVIDIA driver", "Install NVIDIA's driver"),
        (1, "finds 1 device of CUDA, and so no 'cuda:7'", "`ndcache doctor` lists them"),
        (2, "finds 2 devices of CUDA, and so no 'cuda:7'", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_row_80_no_such_device_of_cuda(
    torch: Any, no_requests: str, monkeypatch: pytest.MonkeyPatch, count: int, text: str, hint: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch, "empty", fail(RuntimeError("no NVIDIA driver\nand much more")))
    with pytest.raises(ndcache.NoAdapterError, match=text) as caught:
        ndcache.load(no_requests, "cuda:7")
    assert hint in str(caught.value)
    assert "much more" not in str(caught.value)


@pytest.mark.torch
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_row_80_a_device_of_cuda_that_cannot_be_used(
    torch: Any, no_requests: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    reason = "Cannot re-initialize CUDA in forked subprocess."
    monkeypatch.setattr(torch, "empty", fail(RuntimeError(reason)))
    with pytest.raises(ndcache.NoAdapterError, match=f"cannot use the device '{device}': {reason}") as caught:
        ndcache.load(no_requests, device)
    assert "Look at nvidia-smi" in str(caught.value)


@pytest.mark.torch
def test_row_80_another_device_that_is_not_there(torch: Any, no_requests: str) -> None:
    with pytest.raises(ndcache.NoAdapterError, match="cannot use the device 'xpu'"):
        ndcache.torch.load(no_requests, "xpu")


@pytest.mark.torch
@pytest.mark.parametrize(("device", "kind"), [("nonsense", ValueError), ("meta", ValueError), (3, TypeError)])
def test_devices_that_make_no_sense(torch: Any, no_requests: str, device: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="device"):
        ndcache.torch.load(no_requests, device)


@pytest.mark.torch
@pytest.mark.parametrize("device", ["cuda0", "CUDA", "cuda:-1", "gpu", ""])
def test_a_mistyped_device_is_answered_with_examples(torch: Any, no_requests: str, device: str) -> None:
    with pytest.raises(ValueError, match=f"'{device}' is no device of PyTorch, as 'cpu', 'cuda', 'cuda:1' or 'mps' is"):
        ndcache.torch.load(no_requests, device)


@pytest.mark.parametrize("device", ["mps", "cpu:0", "xpu:1"])
def test_other_devices_of_pytorch_are_for_another_function(no_requests: str, device: str) -> None:
    with pytest.raises(ValueError, match=r"ndcache\.torch\.load takes all devices of PyTorch"):
        ndcache.load(no_requests, device)


@pytest.mark.torch
def test_a_torch_device_is_a_device_of_load(torch: Any, tmp_path: Path) -> None:
    models.simple_model(tmp_path)
    with ndcache.load(tmp_path, torch.device("cpu")) as weights:
        assert weights.device == torch.device("cpu")
        assert isinstance(weights["layer.0"], torch.Tensor)
    assert open_device(torch.device("cpu")).name == "cpu"


@pytest.mark.torch
def test_row_79_a_dtype_that_this_pytorch_lacks(
    torch: Any, tmp_path: Path, serve: Callable[..., FileServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    models.write_model(tmp_path, [{"q_weight": models.random_array((4,), "uint32")}])
    monkeypatch.delattr(torch, "uint32")
    server = serve(tmp_path)
    with pytest.raises(ndcache.UnsupportedDtypeError, match=r"'q_weight' is uint32, which PyTorch .* does not have"):
        ndcache.torch.load(server.url)
    assert not [request for request in server.requests if request.path.endswith(".bin")]


@pytest.mark.torch
def test_a_dtype_that_the_device_lacks(
    torch: Any, tmp_path: Path, serve: Callable[..., FileServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    models.write_model(tmp_path, [{"t": models.random_array((4,), "float64")}])
    empty = torch.empty

    def refuse(*arguments: Any, **options: Any) -> Any:
        if options.get("dtype") is torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    server = serve(tmp_path)
    with pytest.raises(ndcache.UnsupportedDtypeError, match="'t' is float64, which 'cpu' does not have: Cannot"):
        ndcache.torch.load(server.url)
    assert not [request for request in server.requests if request.path.endswith(".bin")]


def fail(error: Exception) -> Callable[..., Any]:
    """Return a function that raises this error."""

    def raise_it(*_: Any, **__: Any) -> Any:
        raise error

    return raise_it
