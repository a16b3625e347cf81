"""Find what contenders need on this machine: modules, a GPU, torch."""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` is not imported here: `import_ndcache` times imports
if TYPE_CHECKING:
    from typing import Any

    from .timing import Given


class Unavailable(Exception):
    """Something that the contender needs is not on this machine."""


def need(name: str) -> Any:
    """Import a module that may not be installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except Exception as error:  # some fail with RuntimeError or OSError without a driver
        raise Unavailable(f"{name}: {error}") from error


def open_gpu(name: str = "gpu") -> Any:
    """Return the `wgpu.GPUDevice` that ndcache itself would open."""
    from ndcache.devices.gpu import open_gpu as open_device
    from ndcache.errors import NoAdapterError

    try:
        opened = open_device(name)
    except NoAdapterError as error:
        raise Unavailable(str(error)) from error
    assert opened is not None
    return opened.handle


def import_torch(given: Given) -> tuple[Any, str]:
    """Import torch, with CUDA ready on one GPU or ``given["count"]``, and return it and the name of its first device.

    In a quick run without CUDA, the device is the CPU, to see that the contender runs.
    """
    torch = need("torch")
    if torch.cuda.is_available():
        for index in range(min(given.get("count", 1), torch.cuda.device_count())):
            torch.zeros(1).to(f"cuda:{index}")  # the first copy is not timed, nor the first submission of a wgpu device
            torch.cuda.synchronize(index)
        return torch, "cuda:0"
    if given.get("quick"):
        return torch, "cpu"
    raise Unavailable("torch finds no CUDA")


def peak_bytes() -> int | None:
    """Return the most memory that this process had, if the system tells.

    Not ru_maxrss, which starts with that of the parent.
    """
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
