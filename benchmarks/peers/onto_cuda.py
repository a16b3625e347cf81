"""Loaders of safetensors files onto a GPU through CUDA, at their own settings.

With ``given["expand"]``, torch expands each bfloat16 tensor to float32 on the GPU as soon as it is there. Otherwise it
stays as it is stored.
"""

from __future__ import annotations

from .machine import Unavailable, import_torch, need
from .timing import alive, timed_loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from .timing import Given, Measured


def safetensors_load_file(given: Given) -> Measured:
    """Call ``safetensors.torch.load_file`` with one of its backends, or load to the CPU and copy the tensors."""
    torch, device = import_torch(given)
    module = need("safetensors.torch")
    path, how = _path(given), given["how"]

    def load() -> Iterable[Any]:
        if how == "CPU first":
            yield from (tensor.to(device) for tensor in module.load_file(path).values())
            return
        options = {} if how == "mmap" else {"backend": how}  # before 0.9, there was no other one
        yield from module.load_file(path, device=device, **options).values()

    return _timed(given, torch, device, load)


def safetensors_prefetch(given: Given) -> Measured:
    """Iterate ``safe_open(…).prefetch(threads=…)``, which exists since safetensors 0.9."""
    module = need("safetensors")
    if not hasattr(module.safe_open, "prefetch"):
        raise Unavailable(f"safetensors {module.__version__} has no prefetch")
    torch, device = _cuda(given)

    def load() -> Iterable[Any]:
        with (
            module.safe_open(_path(given), framework="pt", device=device) as file,
            file.prefetch(threads=given["threads"]) as loader,
        ):
            for _, tensor in loader:
                yield tensor

    return _timed(given, torch, device, load)


def instanttensor(given: Given) -> Measured:
    """Iterate ``instanttensor.safe_open(…).tensors()``, whose tensors own their memory."""
    torch, device = _cuda(given)
    module = need("instanttensor")
    options: dict[str, Any] = {}
    if given.get("backend") == "buffered":
        options["backend"] = module.BackendPolicy.BUFFERED
    if "threads" in given:
        options["concurrency"] = given["threads"]
    if "MiB" in given:
        options["chunk_size"] = given["MiB"] << 20

    def load() -> Iterable[Any]:
        with module.safe_open(_path(given), framework="pt", device=device, **options) as file:
            for _, tensor in file.tensors():
                yield tensor

    return _timed(given, torch, device, load)


def fastsafetensors(given: Given) -> Measured:
    """Use fastsafetensors without GPUDirect Storage, with bounce buffers of some MiB."""
    torch, device = import_torch(given)
    module = need("fastsafetensors")

    def load() -> Iterable[Any]:
        loader = module.SafeTensorsFileLoader(
            None, device, nogds=True, bbuf_size_kb=given["MiB"] << 10, max_threads=given["threads"]
        )
        alive.append(loader)
        loader.add_filenames({0: [_path(given)]})
        buffers = loader.copy_files_to_device()
        alive.append(buffers)
        return (buffers.get_tensor(name) for name in list(loader.get_keys()))

    return _timed(given, torch, device, load)


def runai(given: Given) -> Measured:
    """Use Run:ai's streamer, which copies each tensor to the GPU when it has arrived."""
    import os

    os.environ["RUNAI_STREAMER_CONCURRENCY"] = str(given["threads"])
    if "strategy" in given:
        os.environ["RUNAI_STREAMER_FS_STRATEGY"] = given["strategy"]
    torch, device = import_torch(given)
    streamer_class = need("runai_model_streamer").SafetensorsStreamer

    def load() -> Iterable[Any]:
        with streamer_class() as streamer:
            streamer.stream_file(_path(given), device=device)
            for _, tensor in streamer.get_tensors():
                yield tensor

    return _timed(given, torch, device, load)


def _timed(given: Given, torch: Any, device: str, load: Callable[[], Iterable[Any]]) -> Measured:
    """Time a loader: keep its tensors, and wait until they are on the GPU."""

    def work() -> int:
        tensors = [tensor.float() if given.get("expand") else tensor for tensor in load()]
        alive.append(tensors)
        if device != "cpu":
            torch.cuda.synchronize()
        return sum(tensor.nbytes for tensor in tensors)

    return timed_loads(given, work)


def _cuda(given: Given) -> tuple[Any, str]:
    """Return torch and its device for a loader that knows no device but CUDA's."""
    torch, device = import_torch(given)
    if device == "cpu":
        raise Unavailable("torch finds no CUDA")
    return torch, device


def _path(given: Given) -> str:
    return f"{given['directory']}/model.safetensors"
