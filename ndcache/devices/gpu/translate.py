"""Translate wgpu's errors into ndcache's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import DeviceError, OutOfDeviceMemoryError
from ...workers.threads import main_thread_has_ended

__all__ = ["translated_errors"]


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise `DeviceError` for errors of wgpu in the block."""
    import wgpu

    try:
        yield
    except wgpu.GPUOutOfMemoryError as error:
        raise OutOfDeviceMemoryError(
            "the device has no memory left", hint="Free some, or load a part of the model with names=."
        ) from error
    except (wgpu.GPUError, RuntimeError, AttributeError) as error:
        # wgpu's poller is None once the device's owner has destroyed it; other AttributeErrors are our own bugs.
        if isinstance(error, AttributeError) and error.name != "get_token":
            raise
        if main_thread_has_ended() and "new thread" in str(error):  # wgpu starts a thread for each device
            raise DeviceError(
                f"no GPU can be opened, as Python is shutting down: {error}",
                hint="Open it before the main thread ends, or load with device='cpu'.",
            ) from error
        raise DeviceError(f"the device failed: {error}", hint="Load again, or with device='cpu'.") from error
