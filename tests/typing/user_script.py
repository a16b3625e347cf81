"""A user's script, which is type-checked and never run."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

import ndcache
import ndcache.torch
from ndcache import GPUTensor, TransferError, Weights

URL = "https://host/model/"
Array = npt.NDArray[Any]


def arrays_on_the_cpu() -> None:
    weights = ndcache.load(URL)
    assert_type(weights, Weights[Array])
    assert_type(ndcache.load(URL, "cpu"), Weights[Array])
    assert_type(ndcache.load(Path("model"), device="cpu", max_workers=2), Weights[Array])
    array: np.ndarray[Any, Any] = weights["embedding"]
    assert_type(array.nbytes, int)
    with weights as same:
        assert_type(same, Weights[Array])
    for _, value in weights.items():
        assert_type(value, Array)


def tensors_on_a_gpu() -> None:
    assert_type(ndcache.load(URL, "gpu"), Weights[GPUTensor])
    assert_type(ndcache.load(URL, device="gpu:1"), Weights[GPUTensor])
    assert_type(ndcache.load(URL, device="gpu")["embedding"].shape, tuple[int, ...])


class Device:
    """A device of which only this is known, as of wgpu's, which has no types."""

    def create_buffer(self, *, size: int, usage: int) -> object:
        return size, usage


def tensors_on_a_device(device: Device) -> None:
    assert_type(ndcache.load(URL, device), Weights[GPUTensor])


def tensors_somewhere(name: str) -> None:
    # They may also be tensors of PyTorch, whose type is known only where it is installed.
    for device in ("auto", name):
        tensor = ndcache.load(URL, device)["embedding"]
        if isinstance(tensor, GPUTensor):
            assert_type(tensor.shape, tuple[int, ...])


def tensors_of_pytorch(name: str) -> None:
    for weights in (ndcache.load(URL, "cuda"), ndcache.load(URL, "cuda:1"), ndcache.torch.load(URL, name)):
        assert_type(weights.nbytes, int)
        print(weights["embedding"].untyped_storage())


def memory_of_the_callers(array: Array, buffer: object, device: Device) -> None:
    assert_type(ndcache.load(URL, into={"embedding": array}), Weights[Array])
    assert_type(ndcache.load(URL, device, into={"embedding": buffer, "head": (buffer, 256)}), Weights[Any])
    assert_type(ndcache.load(URL, into=ndcache.load(URL, copy=True)), Weights[Array])
    for _, tensor in ndcache.stream(URL, device, into={"embedding": buffer}):
        assert_type(tensor, Any)


def streams(name: str) -> None:
    for _, array in ndcache.stream(URL):
        assert_type(array, Array)
    for _, tensor in ndcache.stream(URL, "gpu", names={"w": slice(0, 512)}):
        assert_type(tensor, ndcache.GPUTensor)
    for _, tensor in ndcache.stream(URL, "gpu", names="model.*"):
        assert_type(tensor, GPUTensor)
    for _, either in ndcache.stream(URL, device=name, offline=True):
        print(either.nbytes)


def with_a_loader(name: str) -> None:
    with ndcache.Loader(max_workers=3, processes="auto", retries=ndcache.RetryPolicy(2), verify="always") as loader:
        assert_type(loader, ndcache.Loader)
        assert_type(loader.load(URL), Weights[Array])
        assert_type(loader.load(URL, "gpu:0"), Weights[GPUTensor])
        print(loader.load(URL, name).nbytes)
        for _, array in loader.stream(URL):
            assert_type(array, Array)
        assert_type(loader.fetch(URL), Path)


def other_verbs() -> None:
    assert_type(ndcache.fetch(URL, progress=True), Path)
    assert_type(ndcache.read_manifest(URL, timeout=3), ndcache.Manifest)
    assert_type(ndcache.is_cached(URL, cache_dir="here"), bool)
    assert_type(ndcache.verify(URL).ok, bool)
    assert_type(ndcache.delete(URL), int)


def handled() -> str | None:
    try:
        ndcache.fetch(URL)
    except TransferError as error:
        return error.url
    except (ndcache.CacheError, ndcache.errors.OfflineError) as error:
        return error.hint
    return None
