"""Measure the link to a GPU of CUDA, without any load."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .framework import translated_errors

if TYPE_CHECKING:
    import torch

__all__ = ["seconds_of_copies"]


def seconds_of_copies(device: torch.device, nbytes: int, copies: int) -> float:
    """Return the seconds that it takes to copy pinned memory to a device several times.

    Raises
    ------
    DeviceError
    """
    import torch

    with translated_errors(device):
        source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
        target = source.to(device)  # the first copy, which is not counted
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(copies):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        return time.perf_counter() - begun
