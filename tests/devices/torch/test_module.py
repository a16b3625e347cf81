"""Models read into the parameters and buffers of modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import ndcache
import ndcache.torch
from ndcache.devices.cpu import CpuUpload
from ndcache.options import OPTION_NAMES

from ...helpers import models
from ...helpers.loads import page_data
from ...helpers.requirements import need_module
from ...helpers.servers import FileServer

pytestmark = pytest.mark.torch
Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"


@pytest.fixture
def torch() -> Any:
    return need_module("torch")


def make_module(torch: Any, device: str = "cpu") -> Any:
    """Return a module with tied weights, buffers of integers, a scalar, a frozen and a half-precision parameter."""
    nn = torch.nn
    with torch.device(device):
        module = nn.Module()
        module.embedding = nn.Embedding(10, 4)
        module.head = nn.Linear(4, 10, bias=False)
        module.head.weight = module.embedding.weight
        module.norm = nn.BatchNorm1d(4)
        module.frozen = nn.Linear(3, 4).half()
        module.frozen.weight.requires_grad_(False)
        module.register_buffer("scratch", torch.full((3,), 7.0), persistent=False)
    return module


def write(torch: Any, directory: Path, *, without: tuple[str, ...] = (), others: Arrays | None = None) -> Arrays:
    """Write a model for `make_module`; return its tensors."""
    arrays: Arrays = {
        name: models.random_array(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), seed=seed)
        for seed, (name, tensor) in enumerate(make_module(torch).state_dict().items())
        if name not in without
    }
    if "head.weight" in arrays and "embedding.weight" in arrays:
        arrays["embedding.weight"] = arrays["head.weight"]
    arrays |= others or {}
    models.write_model(directory, [{name: array} for name, array in arrays.items()])
    return arrays


def assert_loaded(module: Any, arrays: Arrays) -> None:
    state = module.state_dict()
    for name, array in arrays.items():
        assert state[name].cpu().numpy().tobytes() == array.tobytes(), name


def test_the_memory_of_parameters_and_buffers_is_kept(torch: Any, tmp_path: Path) -> None:
    arrays, module = write(torch, tmp_path), make_module(torch)
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in module.state_dict(keep_vars=True).items()}
    result = ndcache.torch.load_model(module, tmp_path)
    assert_loaded(module, arrays)
    for name, tensor in module.state_dict(keep_vars=True).items():
        assert before[name] == (tensor, tensor.data_ptr()), name
    assert module.head.weight is module.embedding.weight
    assert (module.scratch == 7).all()
    # The result is that of PyTorch's own function.
    expected = make_module(torch).load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize("known", ["embedding.weight", "head.weight"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_name_of_tied_weights_is_enough(torch: Any, tmp_path: Path, known: str, device: str) -> None:
    other = {"embedding.weight": "head.weight", "head.weight": "embedding.weight"}[known]
    arrays, module = write(torch, tmp_path, without=(other,)), make_module(torch, device)
    assert ndcache.torch.load_model(module, tmp_path, names=lambda name: name != "nothing") == ([], [])
    assert module.head.weight is module.embedding.weight
    assert_loaded(module, arrays | {other: arrays[known]})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_of_tied_weights_the_last_one_is_loaded_as_by_pytorch(torch: Any, tmp_path: Path, device: str) -> None:
    first = models.random_array((10, 4), seed=99)
    arrays = write(torch, tmp_path, others={"embedding.weight": first})
    expected, module = make_module(torch), make_module(torch, device)
    expected.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    ndcache.torch.load_model(module, tmp_path)
    assert torch.equal(module.head.weight, expected.head.weight)


def test_a_module_on_meta_gets_memory(torch: Any, tmp_path: Path) -> None:
    arrays, module = write(torch, tmp_path), make_module(torch, "meta")
    assert ndcache.torch.load_model(module, tmp_path) == ([], [])
    assert_loaded(module, arrays)
    assert module.head.weight is module.embedding.weight
    assert isinstance(module.head.weight, torch.nn.Parameter)
    assert module.head.weight.requires_grad
    assert not module.frozen.weight.requires_grad
    assert not isinstance(module.norm.running_mean, torch.nn.Parameter)
    with torch.no_grad():
        module.head.weight.zero_()
    assert_loaded(make_and_load(torch, tmp_path), arrays)  # the file is as it was


def make_and_load(torch: Any, source: Path) -> Any:
    module = make_module(torch)
    ndcache.torch.load_model(module, source)
    return module


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_the_device_of_what_is_on_meta(torch: Any, tmp_path: Path, device: str) -> None:
    arrays, module = write(torch, tmp_path), make_module(torch, "meta")
    module.norm = torch.nn.BatchNorm1d(4)
    ndcache.torch.load_model(module, tmp_path, device)
    assert_loaded(module, arrays)
    for impossible, kind in (("xpu", ndcache.NoAdapterError), ("meta", ValueError)):
        with pytest.raises(kind):
            ndcache.torch.load_model(module, "http://127.0.0.1:9/nothing/", impossible)


def test_a_module_partly_on_meta(torch: Any, tmp_path: Path) -> None:
    arrays, module = write(torch, tmp_path), make_module(torch)
    module.frozen = module.frozen.to("meta")
    kept = module.norm.weight
    ndcache.torch.load_model(module, tmp_path)
    assert_loaded(module, arrays)
    assert module.norm.weight is kept


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_dtypes_are_converted_as_by_pytorch(torch: Any, tmp_path: Path, device: str) -> None:
    arrays = write(torch, tmp_path, others={"norm.weight": models.random_array((4,), "float16")})
    expected, module = make_module(torch), make_module(torch, device)
    expected.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    ndcache.torch.load_model(module, tmp_path)
    assert module.norm.weight.dtype == torch.float32
    assert torch.equal(module.norm.weight, expected.norm.weight)


@pytest.mark.parametrize("decode", [True, False])
def test_bfloat16_is_expanded(torch: Any, tmp_path: Path, decode: bool) -> None:
    array = models.random_array((4, 3))
    models.write_model(tmp_path, [{"weight": array}], encoding="f32-to-bf16")
    module = torch.nn.Linear(3, 4, bias=False)
    ndcache.torch.load_model(module, tmp_path, decode=decode)
    assert (module.weight.detach().numpy() == models.through_bf16(array)).all()


def test_parameters_that_are_not_contiguous(torch: Any, tmp_path: Path) -> None:
    array = models.random_array((4, 3))
    models.write_model(tmp_path, [{"weight": array}])
    module = torch.nn.Linear(3, 4, bias=False)
    module.weight = torch.nn.Parameter(torch.zeros(3, 4).t())
    ndcache.torch.load_model(module, tmp_path)
    assert (module.weight.detach().numpy() == array).all()
    assert not module.weight.is_contiguous()


@pytest.mark.parametrize("names", [("a",), ("b",), ("a", "b")])
def test_parameters_with_the_same_memory_are_tied(torch: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    models.write_model(tmp_path, [{name: models.random_array((4, 3), seed=ord(name)) for name in names}])
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(torch.zeros(4, 3))
    module.b = torch.nn.Parameter(torch.zeros(4, 3))
    module.b.data = module.a.data
    assert ndcache.torch.load_model(module, tmp_path) == ([], [])
    assert_loaded(module, {name: models.random_array((4, 3), seed=ord(names[-1])) for name in ("a", "b")})
    assert module.a.data_ptr() == module.b.data_ptr()


def test_buffers_that_overlap_are_written_in_the_order_of_pytorch(torch: Any, tmp_path: Path) -> None:
    arrays = {name: models.random_array((6,), seed=n) for n, name in enumerate("cdabe")}
    models.write_model(tmp_path, [arrays])

    def make() -> Any:
        module, shared = torch.nn.Module(), torch.zeros(20)
        for name, start in {"a": 4, "b": 0, "c": 8, "d": 14}.items():  # d only begins where c ends
            module.register_buffer(name, shared[start : start + 6])
        module.register_buffer("e", torch.zeros(6))
        return module

    expected, module = make(), make()
    expected.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    ndcache.torch.load_model(module, tmp_path)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(module.get_buffer(name), tensor), name


def test_expanded_buffers_are_refused_before_anything_is_written(torch: Any, tmp_path: Path) -> None:
    models.write_model(tmp_path, [{"a": models.random_array((4,)), "b": models.random_array((4,))}])
    module = torch.nn.Module()
    module.register_buffer("a", torch.zeros(4))
    module.register_buffer("b", torch.zeros(1).expand(4))
    with pytest.raises(RuntimeError, match="b cannot be written: its elements share memory"):
        ndcache.torch.load_model(module, tmp_path)
    assert not module.a.any()


def test_what_is_no_module_is_refused_before_any_request(torch: Any) -> None:
    no_modules: list[Any] = [{}, "model", torch.nn.Linear]
    for module in no_modules:
        with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, not"):
            ndcache.torch.load_model(module, "http://127.0.0.1:9/nothing/", retries=0)


def test_a_page_about_the_load(torch: Any, tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    arrays = write(torch, tmp_path / "model")
    server, module, page = serve(tmp_path / "model"), make_module(torch), tmp_path / "load.html"
    ndcache.torch.load_model(module, server.url, cache_dir=tmp_path / "cache", report=page)
    data = page_data(page.read_text("utf-8"))
    assert (data["title"], data["outcome"]) == (f"Load of {server.url}", "done")
    assert dict(data["facts"])["shards"] == "{0} of {0}".format(len(arrays) - 1)  # the weights that are tied are one
    assert {"network", "read"} <= {name for name, _ in data["phases"]}


def test_a_page_about_a_module_that_does_not_fit(torch: Any, tmp_path: Path) -> None:
    write(torch, tmp_path / "model", without=("norm.bias",))
    page, recorded = tmp_path / "load.html", tmp_path / "trace.json"
    with pytest.raises(RuntimeError, match="Missing key"):
        ndcache.torch.load_model(make_module(torch), tmp_path / "model", report=page, trace=recorded)
    data = page_data(page.read_text("utf-8"))
    assert (data["title"], data["outcome"]) == (f"Load of {tmp_path / 'model'}", "failed")
    assert data["error"].startswith("RuntimeError: ")
    assert "norm.bias" in data["error"]
    assert recorded.is_file()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_does_not_fit_is_listed_as_by_pytorch(
    torch: Any, tmp_path: Path, serve: Callable[..., FileServer], device: str
) -> None:
    arrays = write(
        torch,
        tmp_path,
        without=("norm.bias",),
        others={"frozen.bias": models.random_array((5,), "float16"), "more": np.ones(2, np.float32)},
    )
    server, module = serve(tmp_path), make_module(torch, device)
    before = dict(module.state_dict(keep_vars=True))
    with pytest.raises(RuntimeError) as expected:
        make_module(torch).load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    with pytest.raises(RuntimeError) as caught:
        ndcache.torch.load_model(module, server.url)
    assert str(caught.value) == str(expected.value)
    with pytest.raises(RuntimeError, match=r"size mismatch for frozen\.bias") as caught:
        ndcache.torch.load_model(module, server.url, strict=False)  # that is an error anyway
    assert "Missing" not in str(caught.value)
    assert server.shard_requests() == []
    assert dict(module.state_dict(keep_vars=True)) == before


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_strict_the_rest_is_loaded(torch: Any, tmp_path: Path, device: str) -> None:
    arrays = write(torch, tmp_path, without=("norm.bias",), others={"more": np.ones(2, np.float32)})
    module = make_module(torch, device)
    result = ndcache.torch.load_model(module, tmp_path, strict=False)
    assert result == (["norm.bias"], ["more"])
    del arrays["more"]
    assert_loaded(module, arrays)
    assert module.norm.bias.is_meta == (device == "meta")


def test_names_select(torch: Any, tmp_path: Path) -> None:
    arrays, module = write(torch, tmp_path), make_module(torch)
    before = module.norm.weight.detach().clone()
    missing, unexpected = ndcache.torch.load_model(module, tmp_path, names="frozen.*", strict=False)
    assert "norm.weight" in missing
    assert unexpected == []
    assert_loaded(module, {name: array for name, array in arrays.items() if name.startswith("frozen")})
    assert torch.equal(module.norm.weight, before)


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_slices_go_into_smaller_parameters(torch: Any, tmp_path: Path, where: str) -> None:
    arrays = {name: models.random_array((6, 4), seed=n) for n, name in enumerate(("weight", "other"))}
    models.write_model(tmp_path, [arrays])
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(2, 4, device=where))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        ndcache.torch.load_model(module, tmp_path, names="weight")
    assert ndcache.torch.load_model(module, tmp_path, names={"weight": slice(-2, None)}) == ([], [])
    assert_loaded(module, {"weight": arrays["weight"][-2:]})
    with pytest.raises(TypeError, match="must be a slice"):
        ndcache.torch.load_model(module, "http://127.0.0.1:9/", names={"weight": 3})


def test_a_failure_names_what_is_undefined(torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, module = write(torch, tmp_path), make_module(torch)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    original = CpuUpload.stage

    def stage(upload: Any, file: Any, segment: Any) -> Any:
        if segment.shard.data_path == "params_shard_4.bin":
            raise ZeroDivisionError
        return original(upload, file, segment)

    monkeypatch.setattr(CpuUpload, "stage", stage)
    with pytest.raises(ZeroDivisionError) as caught:
        ndcache.torch.load_model(module, tmp_path)
    undefined = caught.value.undefined  # type: ignore[attr-defined]
    assert undefined
    for name, tensor in module.state_dict().items():
        same = [array.tobytes() for array in (before[name].numpy(), arrays[name])]
        assert name in undefined or tensor.numpy().tobytes() in same or name == "embedding.weight"


def test_a_module_on_meta_stays_there_if_the_load_fails(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(torch, tmp_path)
    module = make_module(torch, "meta")
    monkeypatch.setattr(CpuUpload, "stage", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        ndcache.torch.load_model(module, tmp_path)
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_unknown_options_are_refused(torch: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"load_model\(\) got an unexpected keyword argument 'max_worker'. Did you"):
        ndcache.torch.load_model(make_module(torch), tmp_path, max_worker=3)
    parameters = inspect.signature(ndcache.torch.load_model).parameters
    assert list(parameters)[-len(OPTION_NAMES) :] == list(OPTION_NAMES)


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_a_module_on_cuda(torch: Any, tmp_path: Path, device: str) -> None:
    arrays, module = write(torch, tmp_path), make_module(torch, device)
    ndcache.torch.load_model(module, tmp_path, "cuda")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cuda"}
    assert_loaded(module, arrays)


@pytest.mark.cuda
def test_a_module_on_two_devices(torch: Any, tmp_path: Path) -> None:
    arrays, module = write(torch, tmp_path), make_module(torch)
    module.norm.cuda()
    assert ndcache.torch.load_model(module, tmp_path) == ([], [])
    assert module.norm.weight.is_cuda
    assert not module.head.weight.is_cuda
    assert_loaded(module, arrays)
